// The micro-kernel for AMX: tiles of 16 rows of 64 bytes, with products of bf16 pairs.
#include "pack.h"
#include "pack_avx2.h"

#if defined(FP_HAVE_X86) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FP_HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#ifndef FP_AMX  // a test defines it to nothing
#define FP_AMX __attribute__((target("amx-tile,amx-bf16,avx512f")))
#endif
#endif

namespace fastpref {
#ifdef FP_HAVE_AMX
namespace {

// Tiles 0 to 3 hold 32 x 32 sums, 4 and 5 a, 6 and 7 b: each loaded tile is used twice. A group of b has two
// such halves, because its length is how `pack` tells it from a group of a.
constexpr int SIDE = 16, HALF = 2 * SIDE, ROWS = HALF, COLS = 2 * HALF;
constexpr int TILE = SIDE * SIDE;  // words

// A group of a, and a half of a group of b, is [block of 16 words][2] tiles. A tile of a is [row][word], one
// of b [word][column]. Of the last block there are only the words that exist.

FP_AVX2 void transpose(const uint32_t* from, uint32_t* to) {
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < SIDE; j += 8) {
            __m256 r[8];
            for (int k = 0; k < 8; ++k)
                r[k] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + (i + k) * SIDE + j));
            store_transposed(r, to + j * SIDE + i, SIDE);
        }
}

// A tile of b: rows [first, first + 16) of the operand, words [p0, p1).
FP_AVX2 void pack_right(const Packing& p, int64_t first, int64_t p0, int64_t p1, uint32_t* out) {
    if (first >= p.last) {
        std::memset(out, 0, size_t((p1 - p0) * SIDE) * 4);
        return;
    }
    const int64_t last = first + SIDE < p.last ? first + SIDE : p.last;
    pack_avx2({p.from, p.size, first, last, p0, p1, SIDE, out, 0}, true);
}

// A tile of a.
FP_AVX2 void pack_left(const Packing& p, int64_t first, int64_t p0, int64_t p1, uint32_t* out) {
    const int64_t words = p1 - p0;
    if (p.from.k != 1) {
        alignas(64) uint32_t turned[TILE];
        pack_right(p, first, p0, p1, turned);
        if (words == SIDE) return transpose(turned, out);
        for (int i = 0; i < SIDE; ++i)
            for (int64_t w = 0; w < words; ++w) out[i * words + w] = turned[w * SIDE + i];
        return;
    }
    auto data = static_cast<const uint16_t*>(p.from.data);
    const int64_t end = p.size / 2 < p1 ? p.size / 2 : p1;  // of the words with two elements
    for (int64_t i = first; i < first + SIDE; ++i, out += words) {
        if (i >= p.last) {
            std::memset(out, 0, size_t(words) * 4);
            continue;
        }
        std::memcpy(out, data + i * p.from.row + 2 * p0, size_t(end - p0) * 4);
        for (int64_t w = end; w < p1; ++w) out[w - p0] = pair_at(p, i, w);
    }
}

FP_AVX2 void pack(const Packing& p) {
    const int64_t words = p.p1 - p.p0;
    uint32_t* group = p.out;
    for (int64_t first = p.first; first < p.last; first += p.group, group += p.group_stride)
        for (int half = 0; half < p.group / HALF; ++half)
            for (int64_t w = 0; w < words; w += SIDE) {
                const int64_t count = words - w < SIDE ? words - w : SIDE;
                for (int tile = 0; tile < 2; ++tile) {
                    uint32_t* out = group + half * words * HALF + w * HALF + tile * count * SIDE;
                    const int64_t row = first + half * HALF + tile * SIDE;
                    (p.group == ROWS ? pack_left : pack_right)(p, row, p.p0 + w, p.p0 + w + count, out);
                }
            }
}

FP_AMX inline void add_block(const uint32_t* left, const uint32_t* right) {
    constexpr int ROW = SIDE * 4;  // bytes
    _tile_loadd(4, left, ROW);
    _tile_loadd(6, right, ROW);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + TILE, ROW);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + TILE, ROW);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}
// The last block, with words of zeros after those that exist.
FP_AMX void add_part(int64_t words, const uint32_t* left, const uint32_t* right) {
    alignas(64) uint32_t a[2 * TILE] = {}, b[2 * TILE] = {};
    for (int row = 0; row < HALF; ++row) std::memcpy(a + row * SIDE, left + row * words, size_t(words) * 4);
    for (int tile = 0; tile < 2; ++tile)
        std::memcpy(b + tile * TILE, right + tile * words * SIDE, size_t(words * SIDE) * 4);
    // gcc's intrinsics do not say that they read memory: without this it may leave the copies out.
    asm volatile("" ::"r"(a), "r"(b) : "memory");
    add_block(a, b);
}

FP_AMX void multiply(int64_t words, const uint32_t* a, const uint32_t* b, float* out, int64_t stride,
                     bool add, Ahead) {
    const int64_t part = words % SIDE, whole = words - part;
    for (int half = 0; half < 2; ++half, b += words * HALF, out += HALF) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t w = 0; w < whole; w += SIDE) add_block(a + w * HALF, b + w * HALF);
        if (part) add_part(part, a + whole * HALF, b + whole * HALF);
        // The sums of this chunk are complete before they are added to what out holds, as at the edges.
        alignas(64) float sums[HALF * HALF];
        float* to = add ? sums : out;
        const int64_t row = add ? HALF : stride;
        _tile_stored(0, to, row * 4);
        _tile_stored(1, to + SIDE, row * 4);
        _tile_stored(2, to + SIDE * row, row * 4);
        _tile_stored(3, to + SIDE * row + SIDE, row * 4);
        if (!add) continue;
        for (int i = 0; i < HALF; ++i)
            for (int j = 0; j < HALF; ++j) out[i * stride + j] += sums[i * HALF + j];
    }
}

// The shapes of a thread's tiles. A constant, since gcc's intrinsic reads more of it than it says.
struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Config CONFIG;

// Other libraries give a thread's tiles other shapes: they are set whenever a thread begins a product.
FP_AMX void begin() { _tile_loadconfig(&CONFIG); }
FP_AMX void end() { _tile_release(); }

// The kernel gives a process the memory for tiles when it asks, once; threads and forks inherit that.
bool permitted() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}
bool works() {
    unsigned a, b, c, d;
    constexpr unsigned TILES = 1u << 24, BF16 = 1u << 22;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2") && cpu_has_f16c() &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & BF16) && permitted();
}

}  // namespace

const MicroKernel amx_bf16_kernel{"amx_bf16", ROWS, COLS, true, works, multiply, pack, begin, end};
#else
const MicroKernel amx_bf16_kernel{"amx_bf16", 0, 0, true, nullptr, nullptr, nullptr};
#endif
}  // namespace fastpref
