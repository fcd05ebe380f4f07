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

// As store, of what is known to be no NaN.
FP_INLINE void store_number(float* p, float v) { *p = v; }
FP_INLINE void store_number(bf16* p, float v) {
    uint32_t u = as_bits(v);
    p->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FP_INLINE void store_number(f16* p, float v) { store(p, v); }

// The bounds of exp, opaque to compilers: gcc follows a bound that it knows through the polynomial and replaces
// the maximum by branches, or by masks and blends.
extern const float EXP_LOW, EXP_HIGH;

// sign * exp(x) to about 1 ulp for x <= 88.7, where sign is the bits of 0 or -0. Below -87 it is 0. NaN stays NaN.
FP_INLINE float signed_exp(float x, uint32_t sign) {
    // The bound's factor 2^(n - 1) below is 0. This order of the operands is one instruction that keeps NaN.
    const float c = EXP_LOW > x ? EXP_LOW : x;
    // n is about x / ln 2: with a factor that is a little less than 1 / ln 2, all x >= -87 have a normal 2^(n - 1).
    // 1.5 * 2^23: the sum rounds to an integer. Its last bits are n + 126, the exponent of 2^(n - 1).
    const float t = c * 1.4425f + 12583038.f;
    const float n = t - 12583038.f;
    float r = c - n * 0.693359375f;  // ln 2 in two parts
    r = r + n * 2.12194440e-4f;
    // 2 exp(r): a polynomial that was fitted on |r| <= 0.3585 for the least relative error (3e-9).
    float p = 2.7680739295e-03f;
    p = p * r + 1.6753949225e-02f;
    p = p * r + 8.3336390555e-02f;
    p = p * r + 3.3332794905e-01f;
    p = p * r + 9.9999988079e-01f;
    p = p * r + 2.f;
    p = p * r + 2.f;
    return p * as_float(as_bits(t) << 23 | sign);
}

// exp(x) as above; beyond 88.7 it is exp(88.7).
FP_INLINE float exp_(float x) { return signed_exp(EXP_HIGH < x ? EXP_HIGH : x, 0); }

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
