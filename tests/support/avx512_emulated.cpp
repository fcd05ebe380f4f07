// The micro-kernels of csrc/micro_avx512.cpp on any x86 processor with AVX2: their vectors are arrays here.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct Vector {
    float lane[16];
};
struct Words {
    uint32_t lane[16];
};
static Vector zeros() { return Vector{}; }
static Words loaded(const void* p) {
    Words w;
    std::memcpy(&w, p, sizeof w);
    return w;
}
static Words repeated(int x) {
    Words w;
    for (auto& lane : w.lane) lane = uint32_t(x);
    return w;
}
static Vector as_floats(Words w) {
    Vector v;
    std::memcpy(&v, &w, sizeof v);
    return v;
}
static Vector fused(Vector x, Vector y, Vector sum) {
    for (int i = 0; i < 16; ++i) sum.lane[i] = std::fma(x.lane[i], y.lane[i], sum.lane[i]);
    return sum;
}
static float half(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// The processor rounds to odd on the way; here to nearest.
static Vector dotted(Vector sum, Words x, Words y) {
    for (int i = 0; i < 16; ++i) {
        sum.lane[i] += half(x.lane[i] & 0xffff0000u) * half(y.lane[i] & 0xffff0000u);
        sum.lane[i] += half(x.lane[i] << 16) * half(y.lane[i] << 16);
    }
    return sum;
}
static Vector added(Vector x, Vector y) {
    for (int i = 0; i < 16; ++i) x.lane[i] += y.lane[i];
    return x;
}
static Vector read(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static void write(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

#define FP_AVX512
#define FP_AVX512_BF16
#define __m512 Vector
#define __m512i Words
#define __m512bh Words
#define _mm512_setzero_ps zeros
#define _mm512_load_si512 loaded
#define _mm512_set1_epi32 repeated
#define _mm512_castsi512_ps as_floats
#define _mm512_fmadd_ps fused
#define _mm512_dpbf16_ps dotted
#define _mm512_add_ps added
#define _mm512_loadu_ps read
#define _mm512_storeu_ps write
#include "micro_avx512.cpp"

using namespace fastpref;

// The largest error of a tile from packed operands in both layouts, relative to the sum of magnitudes.
static double error_of(const MicroKernel& kernel, int64_t size, bool rows_adjacent, bool add) {
    const bool pairs = kernel.pairs;
    const int64_t words = pairs ? (size + 1) / 2 : size;
    uint32_t state = uint32_t(size) + 1;
    auto numbers = [&](int64_t rows) {
        std::vector<float> x(size_t(rows * size));
        for (float& value : x) {
            state = state * 1664525u + 1013904223u;
            value = float(int(state >> 24) - 128) / 64;  // which bf16 has
        }
        return x;
    };
    auto packed = [&](const std::vector<float>& x, int64_t rows, int group) {
        std::vector<uint16_t> halves;
        for (float value : x) halves.push_back(uint16_t(as_bits(value) >> 16));
        const void* data = pairs ? static_cast<const void*>(halves.data()) : x.data();
        Operand from{data, pairs ? Dtype::bf16 : Dtype::f32, rows_adjacent ? 1 : size,
                     rows_adjacent ? rows : 1};
        auto* out =
            static_cast<uint32_t*>(std::aligned_alloc(64, size_t((words * group + 16) * 4 + 63) / 64 * 64));
        kernel.pack({from, size, 0, rows, 0, words, group, out, words * group + 16});
        return out;
    };
    const int64_t rows = kernel.rows - 1, cols = kernel.cols - 3;  // edges
    const auto a = numbers(rows), b = numbers(cols);
    std::vector<float> out(size_t(kernel.rows * kernel.cols), 1.f);
    uint32_t *left = packed(a, rows, kernel.rows), *right = packed(b, cols, kernel.cols);
    kernel.multiply(words, left, right, out.data(), kernel.cols, add,
                    {reinterpret_cast<const char*>(right), 0});
    double worst = 0;
    for (int64_t i = 0; i < kernel.rows; ++i)
        for (int64_t j = 0; j < kernel.cols; ++j) {
            double sum = add ? 1 : 0, magnitude = 1;
            for (int64_t p = 0; p < size && i < rows && j < cols; ++p) {
                auto at = [&](const std::vector<float>& x, int64_t row, int64_t count) {
                    return double(x[size_t(rows_adjacent ? p * count + row : row * size + p)]);
                };
                sum += at(a, i, rows) * at(b, j, cols);
                magnitude += std::fabs(at(a, i, rows) * at(b, j, cols));
            }
            worst = std::fmax(worst, std::fabs(out[size_t(i * kernel.cols + j)] - sum) / magnitude);
        }
    std::free(left);
    std::free(right);
    return worst;
}

int main() {
    double worst = 0;
    for (auto* kernel : {&avx512_kernel, &avx512_bf16_kernel})
        for (int64_t size : {0, 1, 2, 7, 8, 16, 33, 255, 256})
            for (bool rows_adjacent : {false, true})
                for (bool add : {false, true})
                    worst = std::fmax(worst, error_of(*kernel, size, rows_adjacent, add));
    std::printf("largest error %.1e\n", worst);
    return !(worst < 2e-6);
}
