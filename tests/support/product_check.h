// The product of one micro-kernel against float64: every layout and dtype, edges, several threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "product.h"
#include "vec.h"

namespace product_check {
using namespace fastpref;

// Rows [rows, k] of numbers between -2 and 2 that every dtype has, in either layout.
struct Numbers {
    int64_t rows, k;
    std::vector<double> value;
    std::vector<float> f32;
    std::vector<uint16_t> half;
    Operand operand;

    Numbers(int64_t rows, int64_t k, Dtype dtype, bool rows_adjacent, uint32_t state)
        : rows(rows), k(k), value(size_t(rows * k)), f32(value.size() + 1), half(value.size() + 1) {
        operand = {dtype == Dtype::f32 ? static_cast<void*>(f32.data()) : half.data(), dtype,
                   rows_adjacent ? 1 : k, rows_adjacent ? rows : 1};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t p = 0; p < k; ++p) {
                state = state * 1664525u + 1013904223u;
                const float x = float(int(state >> 24) - 128) / 64;
                value[size_t(i * k + p)] = x;
                const auto at = size_t(i * operand.row + p * operand.k);
                f32[at] = x;
                if (dtype == Dtype::bf16) store(reinterpret_cast<bf16*>(&half[at]), x);
                if (dtype == Dtype::f16) store(reinterpret_cast<f16*>(&half[at]), x);
            }
    }
};

// The largest error relative to the sum of magnitudes; infinity where threads change a bit.
inline double error_of(const MicroKernel& kernel, Dtype dtype, int64_t m, int64_t n, int64_t k) {
    double worst = 0;
    for (int layout = 0; layout < 4; ++layout) {
        const Numbers a(m, k, dtype, layout & 1, 1), b(n, k, dtype, layout & 2, 2);
        std::vector<float> out(size_t(m * n), NAN), again(out.size(), NAN);
        product({a.operand, b.operand, m, n, k, out.data(), Dtype::f32, n}, kernel, 1);
        product({a.operand, b.operand, m, n, k, again.data(), Dtype::f32, n}, kernel, 3);
        if (std::memcmp(out.data(), again.data(), out.size() * 4) != 0) return INFINITY;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
                double sum = 0, magnitude = 1;
                for (int64_t p = 0; p < k; ++p) {
                    const double term = a.value[size_t(i * k + p)] * b.value[size_t(j * k + p)];
                    sum += term, magnitude += std::fabs(term);
                }
                const double error = std::fabs(out[size_t(i * n + j)] - sum) / magnitude;
                worst = error <= worst ? worst : error;  // NaN is the worst
            }
    }
    return worst;
}

// Whether the kernel is right; says what it found.
inline bool is_right(const MicroKernel& kernel, Dtype dtype) {
    constexpr int64_t SHAPES[][3] = {{1, 1, 1},     {5, 63, 2},     {7, 65, 513}, {6, 64, 0},
                                     {70, 130, 37}, {33, 97, 1031}, {4, 9, 9001}, {32, 64, 1024}};
    double worst = 0;
    for (const auto& shape : SHAPES) {
        const double error = error_of(kernel, dtype, shape[0], shape[1], shape[2]);
        worst = error <= worst ? worst : error;
    }
    std::printf("%s, dtype %d: largest error %.1e\n", kernel.name, int(dtype), worst);
    return worst < 2e-6;
}

}  // namespace product_check
