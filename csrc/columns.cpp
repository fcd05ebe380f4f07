// Columns of a block of D: the sums of all of them, and a gather of some. See fastpref/logps/columns.py.
#include "columns.h"

#include <vector>

#include "parallel.h"
#include "row.h"

namespace fastpref {
namespace {

constexpr int64_t WIDTH = 2048;  // columns whose sums stay in the first cache

// Columns [first, last) of all rows. part[row * parts] takes the row's sum over them.
template <class T>
FP_INLINE void sum_columns(const ColumnSums& s, int64_t first, int64_t last, double* part, int64_t parts) {
    for (int64_t j = first; j < last; ++j) s.squares[j] = 0, s.totals[j] = 0;
    for (int64_t row = 0; row < s.rows; ++row) {
        const T* d = static_cast<const T*>(s.d) + row * s.stride;
        const float scale = s.row_scale ? s.row_scale[row] : 1.f;
        float lane[LANES] = {};
        auto entry = [&](int64_t j, int k) FP_INLINE_LAMBDA {
            // Scaled before it is squared: the square of an unscaled entry may overflow.
            const float value = load(d + j), scaled = value * scale;
            lane[k] += value;
            s.totals[j] += scaled;
            s.squares[j] += scaled * scaled;
        };
        int64_t j = first;
        for (; j + LANES <= last; j += LANES)
            for (int k = 0; k < LANES; ++k) entry(j + k, k);
        for (int k = 0; j < last; ++j, ++k) entry(j, k);
        double sum = 0;
        for (int k = 0; k < LANES; ++k) sum += lane[k];
        part[row * parts] = sum;
    }
}

template <class T> FP_INLINE void gather_rows(const GatherColumns& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const T* d = static_cast<const T*>(s.d) + row * s.stride;
        T* out = static_cast<T*>(s.out) + row * s.out_stride;
        double rest = s.row_sums[row];
        for (int64_t j = 0; j < s.kept; ++j) {
            const T value = d[s.index[j]];
            out[j] = value;
            rest -= load(&value);
        }
        const float r = float(rest);
        double left = r;
        for (int64_t j = s.kept; j < s.count; ++j) {
            const float value = (load(d + s.index[j]) - r * s.mean[j]) * s.factor[j];
            store(out + j, value);
            left -= value;
        }
        store(out + s.count, float(left));
        s.rest[row] = r;
    }
}

template <class T>
FP_CLONES void sum_clone(const ColumnSums& s, int64_t first, int64_t last, double* part, int64_t parts) {
    sum_columns<T>(s, first, last, part, parts);
}

}  // namespace

void column_sums(const ColumnSums& s, int threads) {
    const int64_t parts = (s.cols + WIDTH - 1) / WIDTH;
    std::vector<double> part(size_t(s.rows * parts));
    auto f = s.dtype == Dtype::bf16  ? sum_clone<bf16>
             : s.dtype == Dtype::f16 ? sum_clone<f16>
                                     : sum_clone<float>;
    parallel_ranges(parts, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            f(s, i * WIDTH, std::min((i + 1) * WIDTH, s.cols), part.data() + i, parts);
    });
    for (int64_t row = 0; row < s.rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < parts; ++i) sum += part[size_t(row * parts + i)];
        s.row_sums[row] = float(sum);
    }
}

void gather_columns(const GatherColumns& s, int threads) {
    parallel_ranges(s.rows, threads, [&](int64_t first, int64_t last) {
        switch (s.dtype) {
            case Dtype::bf16: return gather_rows<bf16>(s, first, last);
            case Dtype::f16: return gather_rows<f16>(s, first, last);
            default: return gather_rows<float>(s, first, last);
        }
    });
}

}  // namespace fastpref
