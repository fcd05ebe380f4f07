// The micro-kernel and the packing for AVX2 with FMA and F16C, as x86 servers have had since 2013.
#include "pack.h"
#include "pack_avx2.h"

namespace fastpref {
#ifdef FP_HAVE_X86
namespace {

// 12 of the 16 registers hold sums, two hold b, one a broadcast of a.
constexpr int ROWS = 6, COLS = 16;

FP_AVX2 void multiply(int64_t words, const uint32_t* a_words, const uint32_t* b_words, float* out,
                      int64_t stride, bool add, Ahead) {
    auto a = reinterpret_cast<const float*>(a_words), b = reinterpret_cast<const float*>(b_words);
    __m256 sum[ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
        sum[i][0] = sum[i][1] = _mm256_setzero_ps();
        _mm_prefetch(reinterpret_cast<const char*>(out + i * stride), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out + i * stride + 15), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < words; ++p, a += ROWS, b += COLS) {
        __m256 b0 = _mm256_load_ps(b), b1 = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            __m256 x = _mm256_broadcast_ss(a + i);
            sum[i][0] = _mm256_fmadd_ps(x, b0, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(x, b1, sum[i][1]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            float* to = out + i * stride + 8 * j;
            if (add) sum[i][j] = _mm256_add_ps(_mm256_loadu_ps(to), sum[i][j]);
            _mm256_storeu_ps(to, sum[i][j]);
        }
}

bool works() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c(); }
FP_AVX2 void pack(const Packing& p) { pack_avx2(p, false); }

}  // namespace

const MicroKernel avx2_kernel{"avx2", ROWS, COLS, false, works, multiply, pack};
#else
const MicroKernel avx2_kernel{"avx2", 0, 0, false, nullptr, nullptr, nullptr};
#endif
}  // namespace fastpref
