// The logits product with fp32 results from bf16 operands, which torch's CPU GEMM cannot give: it
// rounds them to bf16. Needs AVX512-BF16; elsewhere the caller widens slices of the weight.
//
// Each result is a sum over chunks of h, each a chain of vdpbf16ps, in order, whatever tile it falls
// into: the logits of a token do not depend on the other tokens of the call, nor on the threads.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "parallel.h"
#include "tile.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 10)
#define FP_HAVE_AVX512BF16 1
#include <immintrin.h>
#define FP_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace fastpref {

#ifdef FP_HAVE_AVX512BF16
namespace {

// 6 x 64 results in 24 of the 32 registers, 4 for the weights, broadcasts straight from memory.
constexpr int ROWS = 6, COLS = 64, VECS = COLS / 16;
// Pairs in one chain: short enough that the chain's rounding stays small and that a chunk of the
// weights, 64 KiB, stays near the core while all tokens pass over it.
constexpr int64_t CHUNK = 256;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint32_t, Free>;

Buffer aligned(int64_t words) {
    size_t bytes = size_t((words * 4 + 63) / 64 * 64);
    auto* p = static_cast<uint32_t*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!p) throw std::bad_alloc();
    return Buffer(p);
}

// Rows of bf16 as pairs: packed[group][pair][row in group], zero where there is no row or element.
void pack_x(const uint16_t* x, int64_t stride, int64_t n, int64_t h, uint32_t* packed) {
    int64_t pairs = (h + 1) / 2;
    for (int64_t i = 0; i < (n + ROWS - 1) / ROWS * ROWS; ++i) {
        uint32_t* to = packed + i / ROWS * pairs * ROWS + i % ROWS;
        for (int64_t p = 0; p < pairs; ++p) {
            uint32_t pair = 0;
            if (i < n) std::memcpy(&pair, x + i * stride + 2 * p, 2 * p + 1 < h ? 4 : 2);
            to[p * ROWS] = pair;
        }
    }
}

// 16 rows of 16 words, transposed in registers.
FP_TARGET inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    // r[4g + c] holds column c (mod 4) of rows 4g..4g+3, one column of four in each 128-bit lane.
    for (int c = 0; c < 4; ++c) {
        __m512i low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), lo2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i high = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), hi2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low, lo2, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low, lo2, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(high, hi2, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high, hi2, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Up to 64 rows of w as packed[pair][row], zero where there is no row or element.
FP_TARGET void pack_w(const uint16_t* w, int64_t stride, int64_t rows, int64_t h, uint32_t* packed) {
    int64_t pairs = (h + 1) / 2;
    for (int64_t p = 0; p < pairs; p += 16) {
        int64_t elements = h - 2 * p < 32 ? h - 2 * p : 32;
        __mmask32 mask = elements == 32 ? ~__mmask32(0) : (__mmask32(1) << elements) - 1;
        int64_t take = pairs - p < 16 ? pairs - p : 16;
        for (int v = 0; v < VECS; ++v) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                int64_t row = v * 16 + i;
                r[i] = row < rows ? _mm512_maskz_loadu_epi16(mask, w + row * stride + 2 * p)
                                  : _mm512_setzero_si512();
                _mm_prefetch(reinterpret_cast<const char*>(w + (row + COLS) * stride + 2 * p), _MM_HINT_T1);
            }
            transpose16(r);
            for (int64_t i = 0; i < take; ++i)
                _mm512_store_si512(packed + (p + i) * COLS + v * 16, r[i]);
        }
    }
}

FP_TARGET void multiply(const uint32_t* x, const uint32_t* w, int64_t pairs, float* out, int64_t stride,
                        int64_t rows, int64_t cols, bool add) {
    __m512 c[ROWS][VECS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECS; ++j) c[i][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512i b[VECS];
        for (int j = 0; j < VECS; ++j) b[j] = _mm512_load_si512(w + p * COLS + j * 16);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            __m512bh a = (__m512bh)_mm512_set1_epi32(int(x[p * ROWS + i]));
            for (int j = 0; j < VECS; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], a, (__m512bh)b[j]);
        }
    }
    for (int j = 0; j < VECS; ++j) {
        int64_t left = cols - j * 16;
        __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
        for (int i = 0; i < ROWS; ++i)
            if (i < rows && mask) {
                float* to = out + i * stride + j * 16;
                if (add) c[i][j] = _mm512_add_ps(c[i][j], _mm512_maskz_loadu_ps(mask, to));
                _mm512_mask_storeu_ps(to, mask, c[i][j]);
            }
    }
}

}  // namespace

bool have_linear_bf16() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

void linear_bf16(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, float* out,
                 int64_t out_stride, int64_t n, int64_t v, int64_t h, int threads) {
    if (!have_linear_bf16()) throw std::runtime_error("linear_bf16: needs AVX512-BF16");
    int64_t pairs = (h + 1) / 2, groups = (n + ROWS - 1) / ROWS, panels = (v + COLS - 1) / COLS;
    Buffer px = aligned(groups * pairs * ROWS);
    pack_x(x, x_stride, n, h, px.get());
    parallel_ranges(panels, threads, [&](int64_t first, int64_t last) {
        Buffer pw = aligned((pairs + 15) / 16 * 16 * COLS);
        for (int64_t panel = first; panel < last; ++panel) {
            int64_t col = panel * COLS, cols = v - col < COLS ? v - col : COLS;
            pack_w(w + col * w_stride, w_stride, cols, h, pw.get());
            for (int64_t p = 0; p < pairs || p == 0; p += CHUNK)
                for (int64_t g = 0; g < groups; ++g)
                    multiply(px.get() + (g * pairs + p) * ROWS, pw.get() + p * COLS,
                             pairs - p < CHUNK ? pairs - p : CHUNK,
                             out + g * ROWS * out_stride + col, out_stride, n - g * ROWS, cols, p > 0);
        }
    });
}

#else

bool have_linear_bf16() { return false; }
void linear_bf16(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, int64_t, int64_t, int64_t,
                 int64_t, int) {
    throw std::runtime_error("linear_bf16: not compiled for this processor");
}

#endif

}  // namespace fastpref
