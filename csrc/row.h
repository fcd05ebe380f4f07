// What is done to one row of logits: the transform, its maximum, its sums.
#pragma once
#include <limits>

#include "tile.h"
#include "vec.h"

namespace fastpref {

constexpr int LANES = 64;    // independent accumulators: the reductions vectorise without -ffast-math
constexpr int BLOCK = 2048;  // columns summed in fp32 before the sum goes on in double

// The sum and the largest of LANES lanes. In a chain of 64, each would wait for the one before.
FP_INLINE double lanes_sum(const float* lane) {
    double part[8] = {};
    for (int i = 0; i < LANES; i += 8)
        for (int k = 0; k < 8; ++k) part[k] += lane[i + k];
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}
FP_INLINE float lanes_max(float* lane) {  // which it overwrites
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int k = 0; k < n; ++k) lane[k] = lane[k + n] > lane[k] ? lane[k + n] : lane[k];
    return lane[0];
}

struct Affine {  // the transform, with reciprocals in place of divisors
    float scale, cap, inv_cap, inv_t, slope;
    explicit Affine(const Transform& t)
        : scale(t.softcap > 0 ? t.scale : t.scale * t.inv_temperature), cap(t.softcap),
          inv_cap(t.softcap > 0 ? 1.f / t.softcap : 0.f), inv_t(t.inv_temperature),
          slope(t.scale * t.inv_temperature) {}
};

template <bool CAP> FP_INLINE float logit(const Affine& a, float raw) {
    if (CAP) return a.cap * tanh_(raw * a.scale * a.inv_cap) * a.inv_t;
    return raw * a.scale;
}

// The largest z: the transform is monotone, so it is that of the largest (or smallest) raw logit.
template <class T, bool CAP> FP_INLINE float row_max(const Affine& a, const T* x, int64_t cols) {
    float sign = a.scale < 0 ? -1.f : 1.f, lane[LANES];
    for (int k = 0; k < LANES; ++k) lane[k] = -std::numeric_limits<float>::infinity();
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES)
        for (int k = 0; k < LANES; ++k) {
            float v = sign * load(x + j + k);
            lane[k] = v > lane[k] ? v : lane[k];
        }
    float m = lanes_max(lane);
    for (; j < cols; ++j) {
        float v = sign * load(x + j);
        m = v > m ? v : m;
    }
    return logit<CAP>(a, sign * m);
}

struct Sums {
    double e = 0, weighted = 0, squared = 0, total = 0;
};

template <class T, bool CAP, bool EXTRAS>
FP_INLINE Sums row_sums(const Affine& a, const T* x, int64_t cols, float m) {
    Sums s;
    for (int64_t block = 0; block < cols; block += BLOCK) {
        int64_t end = block + BLOCK < cols ? block + BLOCK : cols, j = block;
        float e_[LANES] = {}, w_[LANES] = {}, q_[LANES] = {}, t_[LANES] = {};
        auto add = [&](int k, int64_t at) FP_INLINE_LAMBDA {
            float z = logit<CAP>(a, load(x + at)), d = z - m, e = exp_(d);
            e_[k] += e;
            if (EXTRAS) {
                w_[k] += e * (d < -200.f ? -200.f : d);  // e is 0 there; 0 * -inf is not
                q_[k] += e * e;
                t_[k] += z;
            }
        };
        for (; j + LANES <= end; j += LANES) {
            FP_PREFETCH(x + j + BLOCK);
            FP_PREFETCH(x + j + BLOCK + LANES / 2);
            for (int k = 0; k < LANES; ++k) add(k, j + k);
        }
        for (int k = 0; j < end; ++j, ++k) add(k, j);
        s.e += lanes_sum(e_);
        if (EXTRAS) s.weighted += lanes_sum(w_), s.squared += lanes_sum(q_), s.total += lanes_sum(t_);
    }
    return s;
}

}  // namespace fastpref
