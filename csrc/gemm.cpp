// The products that torch's CPU GEMM does badly or not at all: fp32 results from bf16 operands, which
// it rounds to bf16, and fp32 products on processors where its library avoids AVX-512. Needs AVX-512
// (and AVX512-BF16 for bf16); elsewhere the caller stays with torch.
//
// Each result is a sum over chunks of k, each a chain of multiply-adds, in order, whatever tile it
// falls into: it does not depend on the other rows of the call, nor on the threads.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "parallel.h"
#include "tile.h"

#if defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 10)
#define FP_HAVE_AVX512 1
#include <immintrin.h>
#define FP_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#endif

namespace fastpref {

#ifdef FP_HAVE_AVX512
namespace {

// Operands are packed into 32-bit words along k: one float, or a pair of bf16. 6 x 64 results live in
// 24 of the 32 registers, 4 hold b, and a is broadcast straight from memory.
constexpr int ROWS = 6, COLS = 64, VECS = COLS / 16;
// Words in one chain: short enough that the chain's rounding stays small and that a chunk of b,
// 64 KiB, stays near the core while all rows pass over it.
constexpr int64_t CHUNK = 256;
constexpr int64_t BLOCK = 16 * CHUNK;  // words packed at a time
constexpr int64_t ROW_BLOCK = 16 * ROWS;

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

// Element (i, k) of an operand, and word (i, p): zero beyond the last element.
struct View {
    const char* data;
    int64_t row, k, size;  // strides in elements; how many elements along k
    bool pairs;            // bf16
    const char* at(int64_t i, int64_t e) const { return data + (i * row + e * k) * (pairs ? 2 : 4); }
    int64_t words() const { return pairs ? (size + 1) / 2 : size; }
    uint32_t word(int64_t i, int64_t p) const {
        uint32_t w = 0;
        if (!pairs) {
            std::memcpy(&w, at(i, p), 4);
            return w;
        }
        uint16_t low, high = 0;
        std::memcpy(&low, at(i, 2 * p), 2);
        if (2 * p + 1 < size) std::memcpy(&high, at(i, 2 * p + 1), 2);
        return uint32_t(high) << 16 | low;
    }
    // Whether word (i, p) lies in memory as it is, at `at(i, 0)` + 4 p.
    bool direct() const { return k == 1 && !(pairs && size % 2); }
};

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
    // r[4g + c]: column c of rows 4g..4g+3 in the first 128 bits, columns c + 4, ... in the others.
    for (int c = 0; c < 4; ++c) {
        __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// packed[word][column] of the words [p0, p1) of up to 64 columns of b, zero where there is none.
FP_TARGET void pack_b(const View& b, int64_t col0, int64_t cols, int64_t p0, int64_t p1, uint32_t* packed) {
    if (b.k == 1) {  // words are adjacent: blocks of 16 columns x 16 words, transposed
        int per = b.pairs ? 2 : 1;
        for (int64_t p = p0; p < p1; p += 16) {
            int64_t elements = b.size - per * p;
            if (elements > per * 16) elements = per * 16;
            __mmask32 mask2 = elements >= 32 ? ~__mmask32(0) : (__mmask32(1) << elements) - 1;
            __mmask16 mask4 = elements >= 16 ? __mmask16(~0) : __mmask16((1u << elements) - 1);
            int64_t take = p1 - p < 16 ? p1 - p : 16;
            for (int v = 0; v < VECS; ++v) {
                __m512i r[16];
                for (int i = 0; i < 16; ++i) {
                    int64_t c = v * 16 + i;
                    const char* from = b.at(col0 + c, per * p);
                    r[i] = c >= cols ? _mm512_setzero_si512()
                           : b.pairs ? _mm512_maskz_loadu_epi16(mask2, from)
                                     : _mm512_maskz_loadu_epi32(mask4, from);
                    // The next panel: sixteen streams are more than the hardware follows by itself.
                    _mm_prefetch(from + COLS * b.row * (b.pairs ? 2 : 4), _MM_HINT_T1);
                }
                transpose16(r);
                for (int64_t i = 0; i < take; ++i)
                    _mm512_store_si512(packed + (p - p0 + i) * COLS + v * 16, r[i]);
            }
        }
        return;
    }
    for (int64_t p = p0; p < p1; ++p)  // columns are adjacent
        for (int v = 0; v < VECS; ++v) {
            int64_t left = cols - v * 16;
            __mmask16 mask = left >= 16 ? __mmask16(~0) : left <= 0 ? 0 : __mmask16((1u << left) - 1);
            int64_t c = col0 + v * 16;
            __m512i w;
            if (b.pairs) {
                __mmask16 second = 2 * p + 1 < b.size ? mask : 0;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b.at(c, 2 * p)));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, b.at(c, 2 * p + 1)));
                w = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            } else {
                w = _mm512_maskz_loadu_epi32(mask, b.at(c, p));
            }
            _mm512_store_si512(packed + (p - p0) * COLS + v * 16, w);
        }
}

// packed[group][word][row in group] of the words [p0, p1) of rows [row0, row1) of a.
void pack_a(const View& a, int64_t row0, int64_t row1, int64_t p0, int64_t p1, uint32_t* packed) {
    for (int64_t p = p0; p < p1; ++p)
        for (int64_t i = row0; i < row1; ++i) {
            int64_t g = (i - row0) / ROWS, r = (i - row0) % ROWS;
            packed[(g * (p1 - p0) + p - p0) * ROWS + r] = a.word(i, p);
        }
}

// A word where the caller's memory has it: rows of bf16 may start at any even address.
typedef uint32_t Word __attribute__((aligned(2), may_alias));

// Rows of a for one call of multiply: word p of row i is row[i][p * step].
struct Rows {
    const Word* row[ROWS];
    int64_t step;
};

template <bool PAIRS>
FP_TARGET void multiply(const Rows& a, const uint32_t* b, int64_t words, float* out, int64_t stride,
                        int64_t rows, int64_t cols, bool add) {
    __m512 c[ROWS][VECS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECS; ++j) c[i][j] = _mm512_setzero_ps();
    const Word *a0 = a.row[0], *a1 = a.row[1], *a2 = a.row[2], *a3 = a.row[3], *a4 = a.row[4],
               *a5 = a.row[5];
    const int64_t step = a.step;
    for (int64_t p = 0, at = 0; p < words; ++p, at += step) {
        __m512i v[VECS];
        for (int j = 0; j < VECS; ++j) v[j] = _mm512_load_si512(b + p * COLS + j * 16);
        const int w[ROWS] = {int(a0[at]), int(a1[at]), int(a2[at]), int(a3[at]), int(a4[at]), int(a5[at])};
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            __m512i x = _mm512_set1_epi32(w[i]);
            for (int j = 0; j < VECS; ++j)
                c[i][j] = PAIRS
                              ? _mm512_dpbf16_ps(c[i][j], (__m512bh)x, (__m512bh)v[j])
                              : _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(v[j]), c[i][j]);
        }
    }
    for (int j = 0; j < VECS; ++j) {
        int64_t left = cols - j * 16;
        __mmask16 mask = left >= 16 ? __mmask16(~0) : left <= 0 ? 0 : __mmask16((1u << left) - 1);
        for (int i = 0; i < ROWS; ++i)
            if (i < rows && mask) {
                float* to = out + i * stride + j * 16;
                if (add) c[i][j] = _mm512_add_ps(c[i][j], _mm512_maskz_loadu_ps(mask, to));
                _mm512_mask_storeu_ps(to, mask, c[i][j]);
            }
    }
}

// Rows [row0, row1) of out, for the words [p0, p1) and one packed panel of b.
void panel(const Gemm& g, const View& a, const uint32_t* packed_a, const uint32_t* packed_b, int64_t row0,
           int64_t row1, int64_t col0, int64_t p0, int64_t p1) {
    int64_t cols = g.n - col0 < COLS ? g.n - col0 : COLS;
    for (int64_t p = p0; p < p1 || p == 0; p += CHUNK) {
        int64_t words = p1 - p < CHUNK ? p1 - p : CHUNK;
        for (int64_t i = row0; i < row1; i += ROWS) {
            Rows rows;
            for (int r = 0; r < ROWS; ++r) {
                if (packed_a) {
                    rows.row[r] = packed_a + ((i - row0) * (p1 - p0) + (p - p0) * ROWS) + r;
                } else {  // rows beyond the last read the last and are not stored
                    int64_t row = i + r < g.m ? i + r : g.m - 1;
                    rows.row[r] = reinterpret_cast<const Word*>(a.at(row, 0)) + p;
                }
            }
            rows.step = packed_a ? ROWS : 1;
            auto f = a.pairs ? multiply<true> : multiply<false>;
            f(rows, packed_b + (p - p0) * COLS, words, g.out + i * g.out_stride + col0, g.out_stride,
              row1 - i, cols, p > 0);
        }
    }
}

}  // namespace

bool have_gemm(bool bf16) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && (!bf16 || __builtin_cpu_supports("avx512bf16"));
}
bool gemm_beats_library() { return have_gemm(false) && __builtin_cpu_is("amd"); }

void gemm(const Gemm& g, int threads) {
    if (!have_gemm(g.bf16)) throw std::runtime_error("gemm: the processor lacks AVX-512 or its bf16");
    auto view = [&](const void* data, int64_t row, int64_t k) {
        return View{static_cast<const char*>(data), row, k, g.k, g.bf16};
    };
    View a = view(g.a, g.a_row, g.a_k), b = view(g.b, g.b_row, g.b_k);
    int64_t words = a.words(), panels = (g.n + COLS - 1) / COLS;
    auto padded = [](int64_t rows) { return (rows + ROWS - 1) / ROWS * ROWS; };
    for (int64_t p0 = 0; p0 < words || p0 == 0; p0 += BLOCK) {
        int64_t p1 = words - p0 < BLOCK ? words : p0 + BLOCK, length = (p1 - p0 + 15) / 16 * 16;
        if (g.m <= g.n * 4) {  // a panel of b at a time, over all rows of a
            Buffer pa;
            if (!a.direct()) {
                pa = aligned(padded(g.m) * (p1 - p0));
                std::memset(pa.get(), 0, size_t(padded(g.m) * (p1 - p0) * 4));
                pack_a(a, 0, g.m, p0, p1, pa.get());
            }
            parallel_ranges(panels, threads, [&](int64_t first, int64_t last) {
                Buffer pb = aligned(length * COLS);
                for (int64_t i = first; i < last; ++i) {
                    int64_t col = i * COLS, cols = g.n - col < COLS ? g.n - col : COLS;
                    pack_b(b, col, cols, p0, p1, pb.get());
                    panel(g, a, pa.get(), pb.get(), 0, g.m, col, p0, p1);
                }
            });
        } else {  // many rows: all of b, over a block of rows at a time
            Buffer pb = aligned(panels * length * COLS);
            parallel_ranges(panels, threads, [&](int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) {
                    int64_t col = i * COLS, cols = g.n - col < COLS ? g.n - col : COLS;
                    pack_b(b, col, cols, p0, p1, pb.get() + i * length * COLS);
                }
            });
            int64_t blocks = (g.m + ROW_BLOCK - 1) / ROW_BLOCK;
            parallel_ranges(blocks, threads, [&](int64_t first, int64_t last) {
                Buffer pa = aligned(ROW_BLOCK * (p1 - p0));
                std::memset(pa.get(), 0, size_t(ROW_BLOCK * (p1 - p0) * 4));
                for (int64_t i = first; i < last; ++i) {
                    int64_t row0 = i * ROW_BLOCK, row1 = row0 + ROW_BLOCK < g.m ? row0 + ROW_BLOCK : g.m;
                    if (!a.direct()) pack_a(a, row0, row1, p0, p1, pa.get());
                    for (int64_t j = 0; j < panels; ++j)
                        panel(g, a, a.direct() ? nullptr : pa.get(), pb.get() + j * length * COLS, row0,
                              row1, j * COLS, p0, p1);
                }
            });
        }
    }
}

#else

bool have_gemm(bool) { return false; }
bool gemm_beats_library() { return false; }
void gemm(const Gemm&, int) { throw std::runtime_error("gemm: not compiled for this processor"); }

#endif

}  // namespace fastpref
