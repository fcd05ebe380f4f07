// Logits in memory and in registers: 16 bytes at a time where a row allows it, else one by one.
#pragma once
#include "device.h"
#include "launch.h"

namespace fastpref::cuda {

template <class T> constexpr int WIDTH = 16 / int(sizeof(T));  // logits in 16 bytes

DEVICE float read(const float* p) { return *p; }
DEVICE float read(const bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
DEVICE float read(const f16* p) { return half_to_float(p->bits); }

DEVICE void unpack(const float*, const Vector& v, float* z) {
    UNROLL for (int j = 0; j < 4; ++j) z[j] = bits_to_float(v.word[j]);
}
DEVICE void unpack(const bf16*, const Vector& v, float* z) {
    UNROLL for (int j = 0; j < 4; ++j) {
        z[2 * j] = bits_to_float(v.word[j] << 16);
        z[2 * j + 1] = bits_to_float(v.word[j] & 0xffff0000u);
    }
}
DEVICE void unpack(const f16*, const Vector& v, float* z) {
    UNROLL for (int j = 0; j < 4; ++j) {
        z[2 * j] = half_to_float(v.word[j] & 0xffffu);
        z[2 * j + 1] = half_to_float(v.word[j] >> 16);
    }
}

// The logits of N / WIDTH vectors, whose columns are `step` apart; `first` is that of the first one.
// All whole vectors are asked for before any of them is used. Past the row's end the values are 0.
template <int N, class T>
DEVICE void read_logits(const T* row, int first, int step, int columns, bool aligned, float (&z)[N]) {
    constexpr int E = WIDTH<T>;
    Vector raw[N / E];
    const T* at = row + first;
    UNROLL for (int i = 0, column = first; i < N / E; ++i, column += step, at += step) {
        raw[i] = Vector{};
        if (aligned && column + E <= columns) raw[i] = load_vector(at);
    }
    at = row + first;
    UNROLL for (int i = 0, column = first; i < N / E; ++i, column += step, at += step) {
        unpack(row, raw[i], z + i * E);
        if (column < columns && (!aligned || column + E > columns))
            UNROLL for (int j = 0; j < E; ++j) z[i * E + j] = column + j < columns ? read(at + j) : 0.f;
    }
}

// E gradients to a row's columns from `column` on, of which `left` are in the row. They are rounded
// here, once, to nearest even.
template <int E>
DEVICE void write_gradients(void* row, Dtype dtype, int column, int left, bool aligned, const float* d) {
    const bool whole = aligned && left >= E;
    if (dtype == Dtype::f32) {
        float* p = static_cast<float*>(row) + column;
        if (whole) {
            UNROLL for (int k = 0; k < E; k += 4) {
                store_vector(p + k, {{float_to_bits(d[k]), float_to_bits(d[k + 1]),
                                      float_to_bits(d[k + 2]), float_to_bits(d[k + 3])}});
            }
        } else {
            UNROLL for (int j = 0; j < E; ++j)
                if (j < left) p[j] = d[j];
        }
        return;
    }
    uint32_t packed[E / 2];
    if (dtype == Dtype::bf16) {
        UNROLL for (int k = 0; k < E / 2; ++k) packed[k] = pack_bf16(d[2 * k], d[2 * k + 1]);
    } else {
        UNROLL for (int k = 0; k < E / 2; ++k) packed[k] = pack_f16(d[2 * k], d[2 * k + 1]);
    }
    uint16_t* p = static_cast<uint16_t*>(row) + column;
    if (whole) {
        if constexpr (E == 4) store_pair(p, packed[0], packed[1]);
        else store_vector(p, {{packed[0], packed[1], packed[2], packed[3]}});
    } else {
        UNROLL for (int j = 0; j < E; ++j)
            if (j < left) p[j] = uint16_t(j % 2 ? packed[j / 2] >> 16 : packed[j / 2] & 0xffffu);
    }
}

// Zeros to a row, by the threads of `sharers` blocks of which this is number `rank`.
DEVICE void write_zeros(void* row, Dtype dtype, int columns, int rank, int sharers) {
    for (int j = rank * threads() + thread(); j < columns; j += sharers * threads()) {
        if (dtype == Dtype::f32) static_cast<float*>(row)[j] = 0.f;
        else static_cast<uint16_t*>(row)[j] = 0;
    }
}

DEVICE void* row_of(void* out, Dtype dtype, int64_t row, int64_t stride) {
    return static_cast<char*>(out) + row * stride * (dtype == Dtype::f32 ? 4 : 2);
}

// tanh x by a rational function, to 4e-7 of its size however small: one special-function operation,
// the reciprocal. From 7.999 on it is 1 to the last bit. The coefficients are Eigen's and XLA's.
DEVICE float hyperbolic_tangent(float x) {
    x = clamp(x, -7.99881172180175781f, 7.99881172180175781f);
    float y = x * x;
    float p = fmaf(y, -2.76076847742355e-16f, 2.00018790482477e-13f);
    p = fmaf(y, p, -8.60467152213735e-11f);
    p = fmaf(y, p, 5.12229709037114e-08f);
    p = fmaf(y, p, 1.48572235717979e-05f);
    p = fmaf(y, p, 6.37261928875436e-04f);
    p = fmaf(y, p, 4.89352455891786e-03f);
    float q = fmaf(y, 1.19825839466702e-06f, 1.18534705686654e-04f);
    q = fmaf(y, q, 2.26843463243900e-03f);
    q = fmaf(y, q, 4.89352518554385e-03f);
    return x * p * reciprocal(q);
}

// 1 - tanh^2: never above 1, and never below 0 by a rounding.
DEVICE float flatness(float t) { return fmaxf(fmaf(-t, t, 1.f), 0.f); }

inline Affine affine(const Transform& t) {
    double slope = double(t.scale) * t.inv_temperature;
    if (!(t.softcap > 0)) return {0.f, float(slope), float(slope)};
    return {float(double(t.scale) / t.softcap), float(double(t.softcap) * t.inv_temperature), float(slope)};
}

inline bool starts_at_vectors(const void* data, int64_t stride, int bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0;
}

inline int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace fastpref::cuda
