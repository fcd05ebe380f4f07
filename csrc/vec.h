// Scalar building blocks that compilers vectorise on every instruction set: no branches, no calls.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define FP_INLINE static inline __attribute__((always_inline))
#define FP_INLINE_LAMBDA __attribute__((always_inline))
#define FP_PREFETCH(P) __builtin_prefetch(P)
#else
#define FP_INLINE static __forceinline
#define FP_INLINE_LAMBDA
#define FP_PREFETCH(P) (void)(P)
#endif

// Before a loop: no iteration reads what an earlier one writes, so that it may be vectorised.
#if defined(__clang__)
#define FP_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FP_IVDEP _Pragma("GCC ivdep")
#else
#define FP_IVDEP
#endif

namespace fastpref {

FP_INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
FP_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

FP_INLINE float load(const float* p) { return *p; }
FP_INLINE float load(const bf16* p) { return as_float(uint32_t(p->bits) << 16); }
FP_INLINE float load(const f16* p) {
    uint32_t h = p->bits, sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
    // 2^112 moves the exponent from half's bias to float's, and makes subnormals normal.
    float magnitude = as_float(rest) * as_float(0x77800000u);
    uint32_t special = as_bits(magnitude) | 0x7f800000u;  // infinity, NaN
    return as_float(sign | (rest >= 0x0f800000u ? special : as_bits(magnitude)));
}

FP_INLINE void store(float* p, float v) { *p = v; }
FP_INLINE void store(bf16* p, float v) {  // to nearest, ties to even
    uint32_t u = as_bits(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    p->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}
FP_INLINE void store(f16* p, float v) {  // to nearest, ties to even
    uint32_t u = as_bits(v), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    // Below 2^-14 the fp32 adder does the rounding: 0.5 has the spacing of half's subnormals.
    uint32_t small = as_bits(as_float(mag) + 0.5f) - as_bits(0.5f);
    uint32_t normal = (mag + 0xc8000fffu + ((mag >> 13) & 1u)) >> 13;
    uint32_t r = mag < 0x38800000u ? small : normal;
    r = mag >= 0x477ff000u ? 0x7c00u : r;  // rounds beyond 65504
    r = mag > 0x7f800000u ? 0x7e00u : r;   // NaN
    p->bits = uint16_t(sign | r);
}

// exp to about 1 ulp on [-87.3, 88.7]; below it 0 (smaller than any normal number). NaN stays NaN.
FP_INLINE float exp_(float x) {
    // One selection serves as the lower bound and as the zero: at -88.1 the factor 2^n below is 0.
    float c = x < -87.3f ? -88.1f : x;
    c = c > 88.7f ? 88.7f : c;
    float t = c * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum rounds to an integer
    float n = t - 12582912.f;
    float r = c - n * 0.693359375f;  // ln 2 in two parts
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    return p * as_float((as_bits(t) << 23) + 0x3f800000u);
}

// tanh to about 2 ulp of its size. Near 0, where e - 1 would cancel, it is x + x^3 p(x^2): p is fitted
// to (tanh x / x - 1) / x^2 at the Chebyshev nodes of x^2 in [0, 0.36].
FP_INLINE float tanh_(float x) {
    float e = exp_(2.f * (x > 15.f ? 15.f : x < -15.f ? -15.f : x));
    float s = x * x;
    float p = -6.2691136e-3f;
    p = p * s + 2.1110954e-2f;
    p = p * s - 5.3873949e-2f;
    p = p * s + 1.3332915e-1f;
    p = p * s - 3.3333331e-1f;
    return s < 0.36f ? x + x * s * p : (e - 1.f) / (e + 1.f);
}

}  // namespace fastpref
