// The micro-kernels for AVX-512: floats, and pairs of bf16 where the processor has dot products of them.
#include "pack.h"
#include "pack_avx2.h"

#if defined(FP_HAVE_X86) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 10)
#define FP_HAVE_AVX512 1
#ifndef FP_AVX512  // a test defines them to nothing
#define FP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define FP_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#endif
#endif

namespace fastpref {
#ifdef FP_HAVE_AVX512
namespace {

// 24 of the 32 registers hold sums, four hold b, the rest broadcasts of a.
constexpr int ROWS = 6, VECTORS = 4, COLS = 16 * VECTORS;

struct Floats {
    FP_AVX512 static inline __m512 add(__m512 sum, __m512i x, __m512i y) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
    }
};
struct Pairs {
    FP_AVX512_BF16 static inline __m512 add(__m512 sum, __m512i x, __m512i y) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
    }
};

// A macro, since the two have different targets.
#define FP_MULTIPLY(NAME, TARGET, KIND)                                                                \
    TARGET void NAME(int64_t words, const uint32_t* a, const uint32_t* b, float* out, int64_t stride,  \
                     bool add, Ahead ahead) {                                                          \
        __m512 sum[ROWS][VECTORS];                                                                     \
        _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; ++i)                                         \
            _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_setzero_ps(); \
        for (int64_t p = 0; p < words; ++p, a += ROWS, b += COLS, ahead.from += ahead.step) {          \
            _mm_prefetch(ahead.from, _MM_HINT_T1);                                                     \
            __m512i right[VECTORS];                                                                    \
            _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; ++j) right[j] =                       \
                _mm512_load_si512(b + 16 * j);                                                         \
            _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; ++i) {                                   \
                __m512i left = _mm512_set1_epi32(int(a[i]));                                           \
                _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; ++j) sum[i][j] =                  \
                    KIND::add(sum[i][j], left, right[j]);                                              \
            }                                                                                          \
        }                                                                                              \
        _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; ++i)                                         \
            _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; ++j) {                                \
            float* to = out + i * stride + 16 * j;                                                     \
            if (add) sum[i][j] = _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]);                        \
            _mm512_storeu_ps(to, sum[i][j]);                                                           \
        }                                                                                              \
    }
FP_MULTIPLY(multiply_floats, FP_AVX512, Floats)
FP_MULTIPLY(multiply_pairs, FP_AVX512_BF16, Pairs)
#undef FP_MULTIPLY

bool works() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && cpu_has_f16c();
}
bool bf16_works() { return works() && __builtin_cpu_supports("avx512bf16"); }
FP_AVX2 void pack_floats(const Packing& p) { pack_avx2(p, false); }
FP_AVX2 void pack_pairs(const Packing& p) { pack_avx2(p, true); }

}  // namespace

const MicroKernel avx512_kernel{"avx512", ROWS, COLS, false, works, multiply_floats, pack_floats};
const MicroKernel avx512_bf16_kernel{"avx512_bf16", ROWS,           COLS,      true,
                                     bf16_works,    multiply_pairs, pack_pairs};
#else
const MicroKernel avx512_kernel{"avx512", 0, 0, false, nullptr, nullptr, nullptr};
const MicroKernel avx512_bf16_kernel{"avx512_bf16", 0, 0, true, nullptr, nullptr, nullptr};
#endif
}  // namespace fastpref
