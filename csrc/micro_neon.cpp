// The micro-kernel and the packing for NEON, which every aarch64 processor has.
#include "pack.h"

#if defined(__aarch64__) && defined(__GNUC__)
#define FP_HAVE_NEON 1
#include <arm_neon.h>
#endif

namespace fastpref {
#ifdef FP_HAVE_NEON
namespace {

// 24 of the 32 registers hold sums, two hold b, three a: multiply-adds take a lane of a as it is.
constexpr int ROWS = 12, COLS = 8;

#define FP_ROWS_OF(X, FIRST)                                          \
    sum[FIRST][0] = vfmaq_laneq_f32(sum[FIRST][0], b0, X, 0);         \
    sum[FIRST][1] = vfmaq_laneq_f32(sum[FIRST][1], b1, X, 0);         \
    sum[FIRST + 1][0] = vfmaq_laneq_f32(sum[FIRST + 1][0], b0, X, 1); \
    sum[FIRST + 1][1] = vfmaq_laneq_f32(sum[FIRST + 1][1], b1, X, 1); \
    sum[FIRST + 2][0] = vfmaq_laneq_f32(sum[FIRST + 2][0], b0, X, 2); \
    sum[FIRST + 2][1] = vfmaq_laneq_f32(sum[FIRST + 2][1], b1, X, 2); \
    sum[FIRST + 3][0] = vfmaq_laneq_f32(sum[FIRST + 3][0], b0, X, 3); \
    sum[FIRST + 3][1] = vfmaq_laneq_f32(sum[FIRST + 3][1], b1, X, 3)

void multiply(int64_t words, const uint32_t* a_words, const uint32_t* b_words, float* out, int64_t stride,
              bool add, Ahead) {
    auto a = reinterpret_cast<const float*>(a_words), b = reinterpret_cast<const float*>(b_words);
    float32x4_t sum[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = vdupq_n_f32(0.f);
    for (int64_t p = 0; p < words; ++p, a += ROWS, b += COLS) {
        const float32x4_t b0 = vld1q_f32(b), b1 = vld1q_f32(b + 4);
        const float32x4_t x = vld1q_f32(a), y = vld1q_f32(a + 4), z = vld1q_f32(a + 8);
        FP_ROWS_OF(x, 0);
        FP_ROWS_OF(y, 4);
        FP_ROWS_OF(z, 8);
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            float* to = out + i * stride + 4 * j;
            if (add) sum[i][j] = vaddq_f32(vld1q_f32(to), sum[i][j]);
            vst1q_f32(to, sum[i][j]);
        }
}
#undef FP_ROWS_OF

// Four adjacent elements as floats.
inline float32x4_t load4(const float* p) { return vld1q_f32(p); }
inline float32x4_t load4(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
inline float32x4_t load4(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }

// out[4 words][4 rows] = the transpose of r, rows that lie `stride` words apart.
inline void store_transposed(const float32x4_t r[4], float* out, int64_t stride) {
    const float64x2_t low = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1])),
                      high = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3])),
                      odd_low = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1])),
                      odd_high = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    vst1q_f32(out, vreinterpretq_f32_f64(vtrn1q_f64(low, high)));
    vst1q_f32(out + stride, vreinterpretq_f32_f64(vtrn1q_f64(odd_low, odd_high)));
    vst1q_f32(out + 2 * stride, vreinterpretq_f32_f64(vtrn2q_f64(low, high)));
    vst1q_f32(out + 3 * stride, vreinterpretq_f32_f64(vtrn2q_f64(odd_low, odd_high)));
}

template <class T> void pack_groups(const Packing& pack) {
    auto data = static_cast<const T*>(pack.from.data);
    const int64_t row = pack.from.row, k = pack.from.k;
    const int group = pack.group;
    uint32_t* out = pack.out;
    for (int64_t i = pack.first; i < pack.last; i += group, out += pack.group_stride) {
        auto to = reinterpret_cast<float*>(out);
        int64_t p = pack.p0;
        if (i + group <= pack.last) {
            if (k == 1)
                for (; p + 4 <= pack.p1; p += 4, to += 4 * group)
                    for (int g = 0; g < group; g += 4) {
                        float32x4_t r[4];
                        for (int j = 0; j < 4; ++j) r[j] = load4(data + (i + g + j) * row + p);
                        store_transposed(r, to + g, group);
                    }
            else
                for (; p < pack.p1; ++p, to += group)
                    for (int g = 0; g < group; g += 4)
                        vst1q_f32(to + g, load4(column_at<T>(pack.from, p) + i + g));
        }
        pack_words(pack, false, i, p, pack.p1, out + (p - pack.p0) * group);
    }
}

void pack(const Packing& p) {
    switch (p.from.dtype) {
        case Dtype::bf16: return pack_groups<bf16>(p);
        case Dtype::f16: return pack_groups<f16>(p);
        default: return pack_groups<float>(p);
    }
}

bool works() { return true; }

}  // namespace

const MicroKernel neon_kernel{"neon", ROWS, COLS, false, works, multiply, pack};
#else
const MicroKernel neon_kernel{"neon", 0, 0, false, nullptr, nullptr, nullptr};
#endif
}  // namespace fastpref
