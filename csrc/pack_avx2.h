// Packing with AVX2, eight words at a time; the micro-kernels of AVX-512 share it.
#pragma once
#include "pack.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FP_HAVE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#define FP_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace fastpref {

// gcc 10 and older do not know it by name.
static inline bool cpu_has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// out[8 words][8 rows] = the transpose of r, rows that lie `stride` words apart.
FP_AVX2 static inline void store_transposed(__m256 r[8], uint32_t* out, int64_t stride) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    __m256 u[8];
    for (int half = 0; half < 8; half += 4)
        for (int k = 0; k < 2; ++k) {
            u[half + 2 * k] = _mm256_shuffle_ps(t[half + k], t[half + k + 2], 0x44);
            u[half + 2 * k + 1] = _mm256_shuffle_ps(t[half + k], t[half + k + 2], 0xee);
        }
    auto to = reinterpret_cast<float*>(out);
    // In ascending order: where a group has six rows, a store's last two words are the next one's first.
    for (int i = 0; i < 4; ++i)
        _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(u[i], u[i + 4], 0x20));
    for (int i = 0; i < 4; ++i)
        _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(u[i], u[i + 4], 0x31));
}

// Eight adjacent elements as eight floats.
FP_AVX2 static inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
FP_AVX2 static inline __m256 load8(const bf16* p) {
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FP_AVX2 static inline __m256 load8(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <class T, bool PAIRS> FP_AVX2 static inline void pack_groups(const Packing& pack) {
    constexpr int PER = PAIRS ? 2 : 1;  // elements in a word
    auto data = static_cast<const T*>(pack.from.data);
    const int64_t row = pack.from.row, k = pack.from.k;
    const int64_t whole = pack.p0 + (pack.size - PER * pack.p0) / PER;  // words with all their elements
    const int group = pack.group;
    if (k == 1) {  // words are adjacent: blocks of 8 rows x 8 words, transposed
        const int64_t limit = whole < pack.p1 ? whole : pack.p1;
        uint32_t* out = pack.out;
        for (int64_t i = pack.first; i < pack.last; i += group, out += pack.group_stride) {
            int64_t p = pack.p0;
            for (; p + 8 <= limit; p += 8)
                for (int g = 0; g < group; g += 8) {
                    __m256 r[8];
                    for (int j = 0; j < 8; ++j) {
                        bool there = g + j < group && i + g + j < pack.last;
                        const T* from = data + (i + g + j) * row + PER * p;
                        if (!there) r[j] = _mm256_setzero_ps();
                        else if (PAIRS) r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
                        else r[j] = load8(from);
                        // The same rows further on, and the next group's.
                        _mm_prefetch(reinterpret_cast<const char*>(from + group * row), _MM_HINT_T1);
                    }
                    store_transposed(r, out + (p - pack.p0) * group + g, group);
                }
            pack_words(pack, PAIRS, i, p, pack.p1, out + (p - pack.p0) * group);
        }
        return;
    }
    for (int64_t p = pack.p0; p < pack.p1; ++p) {  // rows are adjacent
        uint32_t* out = pack.out + (p - pack.p0) * group;
        const int64_t element = PER * p, later = element + 4 * PER;
        const bool second = element + 1 < pack.size;
        const T* from = column_at<T>(pack.from, element);
        const T* from_second = second ? column_at<T>(pack.from, element + 1) : nullptr;
        const T* ahead = later < pack.size ? column_at<T>(pack.from, later) : from;
        int64_t i = pack.first;
        for (; i + (group + 7) / 8 * 8 <= pack.last; i += group, out += pack.group_stride)
            for (int g = 0; g < group; g += 8) {
                __m256 v = load8(from + i + g);
                _mm_prefetch(reinterpret_cast<const char*>(ahead + i + g), _MM_HINT_T0);
                if (PAIRS) {  // v has the first element in the upper half of each word
                    __m256i low = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
                    __m256i high =
                        second ? _mm256_castps_si256(load8(from_second + i + g)) : _mm256_setzero_si256();
                    v = _mm256_castsi256_ps(_mm256_or_si256(low, high));
                }
                _mm256_storeu_ps(reinterpret_cast<float*>(out + g), v);
            }
        for (; i < pack.last; i += group, out += pack.group_stride)
            pack_words(pack, PAIRS, i, p, p + 1, out);
    }
}

FP_AVX2 static inline void pack_avx2(const Packing& pack, bool pairs) {
    switch (pack.from.dtype) {
        case Dtype::bf16: return pairs ? pack_groups<bf16, true>(pack) : pack_groups<bf16, false>(pack);
        case Dtype::f16: return pack_groups<f16, false>(pack);
        default: return pack_groups<float, false>(pack);
    }
}

}  // namespace fastpref
#endif
