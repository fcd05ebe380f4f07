// Columns of a block of D: the sums of all of them, and a gather of some. See fastpref/logps/columns.py.
#include "columns.h"

#include <vector>

#include "clones.h"
#include "parallel.h"
#include "row.h"

namespace fastpref {
namespace {

constexpr int64_t PARTS = 64;    // of a sum over the vocabulary, whatever the threads
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
        for (; j + LANES <= last; j += LANES) {
            // Of the next row, which the processor's own prefetcher finds too late.
            for (int k = 0; k < LANES; k += 64 / int(sizeof(T))) FP_PREFETCH(d + s.stride + j + k);
            for (int k = 0; k < LANES; ++k) entry(j + k, k);
        }
        for (int k = 0; j < last; ++j, ++k) entry(j, k);
        part[row * parts] = lanes_sum(lane);
    }
}

// Several sums, so that no entry waits for the one before.
constexpr int CHAINS = 8;
FP_INLINE double chains_sum(const double* chain) {
    double sum = 0;
    for (int k = 0; k < CHAINS; ++k) sum += chain[k];
    return sum;
}

template <class T> FP_INLINE void gather_block(const GatherColumns& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const T* d = static_cast<const T*>(s.d) + row * s.stride;
        T* out = static_cast<T*>(s.out) + row * s.out_stride;
        double kept[CHAINS] = {}, drawn[CHAINS] = {};
        auto keep = [&](int64_t j, int k) FP_INLINE_LAMBDA {
            const T value = d[s.index[j]];
            out[j] = value;
            kept[k] += load(&value);
        };
        int64_t j = 0;
        for (; j + CHAINS <= s.kept; j += CHAINS) {
            FP_PREFETCH(d + s.stride + s.index[j]);  // the next row's
            FP_PREFETCH(d + s.stride + s.index[j + CHAINS / 2]);
            for (int k = 0; k < CHAINS; ++k) keep(j + k, k);
        }
        for (int k = 0; j < s.kept; ++j, ++k) keep(j, k);
        const float r = float(s.row_sums[row] - chains_sum(kept));
        auto draw = [&](int64_t j, int k) FP_INLINE_LAMBDA {
            const float value = (load(d + s.index[j]) - r * s.mean[j]) * s.factor[j];
            store(out + j, value);
            drawn[k] += value;
        };
        for (; j + CHAINS <= s.count; j += CHAINS)
            for (int k = 0; k < CHAINS; ++k) draw(j + k, k);
        for (int k = 0; j < s.count; ++j, ++k) draw(j, k);
        store(out + s.count, float(r - chains_sum(drawn)));
        s.rest[row] = r;
    }
}

template <class T> struct SumColumns {
    FP_INLINE void run(const ColumnSums& s, int64_t first, int64_t last, double* part, int64_t parts) {
        sum_columns<T>(s, first, last, part, parts);
    }
};

// out [count, cols]: a row of the weight is in the first cache while it is added to each of the sums.
template <class T> FP_INLINE void add_rows(const WeightedRows& s, int64_t first, int64_t last, float* out) {
    for (int64_t j = 0; j < s.count * s.cols; ++j) out[j] = 0;
    for (int64_t row = first; row < last; ++row) {
        const T* w = static_cast<const T*>(s.weight) + row * s.stride;
        for (int64_t i = 0; i < s.count; ++i) {
            const float q = s.q[i * s.rows + row];
            if (q == 0) continue;
            float* to = out + i * s.cols;
            FP_IVDEP
            for (int64_t j = 0; j < s.cols; ++j) to[j] += q * load(w + j);
        }
    }
}

template <class T> struct AddRows {
    FP_INLINE void run(const WeightedRows& s, int64_t first, int64_t last, float* out) {
        add_rows<T>(s, first, last, out);
    }
};

}  // namespace

void column_sums(const ColumnSums& s, int threads) {
    const int64_t parts = (s.cols + WIDTH - 1) / WIDTH;
    std::vector<double> part(size_t(s.rows * parts));
    auto f = s.dtype == Dtype::bf16  ? clone_of<SumColumns<bf16>>()
             : s.dtype == Dtype::f16 ? clone_of<SumColumns<f16>>()
                                     : clone_of<SumColumns<float>>();
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
            case Dtype::bf16: return gather_block<bf16>(s, first, last);
            case Dtype::f16: return gather_block<f16>(s, first, last);
            default: return gather_block<float>(s, first, last);
        }
    });
}

void weighted_rows(const WeightedRows& s, int threads) {
    const int64_t size = s.count * s.cols;
    std::vector<float> part(size_t(PARTS * size));
    auto f = s.dtype == Dtype::bf16  ? clone_of<AddRows<bf16>>()
             : s.dtype == Dtype::f16 ? clone_of<AddRows<f16>>()
                                     : clone_of<AddRows<float>>();
    parallel_ranges(PARTS, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            f(s, s.rows * i / PARTS, s.rows * (i + 1) / PARTS, part.data() + i * size);
    });
    for (int64_t j = 0; j < size; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < PARTS; ++i) sum += part[size_t(i * size + j)];
        s.out[j] = float(sum);
    }
}

}  // namespace fastpref
