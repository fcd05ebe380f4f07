// The micro-kernel of any processor: vectors of the compiler's default target, which on aarch64 is NEON.
#include "pack.h"

namespace fastpref {
namespace {

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(16)));
constexpr int LANES = 4;
#else
typedef float Vector;
constexpr int LANES = 1;
#endif
#if defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;  // 24 of 32 registers
#else
constexpr int ROWS = 4, VECTORS = 2;  // 8 of 16
#endif
constexpr int COLS = VECTORS * LANES;

void multiply(int64_t words, const uint32_t* a, const uint32_t* b, float* out, int64_t stride, bool add,
              Ahead) {
    Vector sum[ROWS][VECTORS] = {};
    for (int64_t p = 0; p < words; ++p, a += ROWS, b += COLS) {
        Vector right[VECTORS];
        std::memcpy(right, b, sizeof right);
        for (int i = 0; i < ROWS; ++i) {
            float left = as_float(a[i]);
            for (int j = 0; j < VECTORS; ++j) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) {
            float* to = out + i * stride + j * LANES;
            Vector old;
            if (add) {
                std::memcpy(&old, to, sizeof old);
                sum[i][j] += old;
            }
            std::memcpy(to, &sum[i][j], sizeof(Vector));
        }
}

void pack(const Packing& pack) {
    uint32_t* out = pack.out;
    for (int64_t i = pack.first; i < pack.last; i += pack.group, out += pack.group_stride)
        pack_words(pack, false, i, pack.p0, pack.p1, out);
}

bool works() { return true; }

}  // namespace

const MicroKernel portable_kernel{"portable", ROWS, COLS, false, works, multiply, pack};

}  // namespace fastpref
