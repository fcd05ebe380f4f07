// Which columns of a block of D are kept and which are drawn: fastpref/backends/column_choice.py in one
// thread, bit for bit.
#pragma once
#include <cstdint>

namespace fastpref {

struct ColumnChoice {
    const float* squares;   // [cols]
    const float* distance;  // [cols]
    int64_t cols;
    const int64_t* labels;  // [rows]
    int64_t rows;
    // Of u and of dW: what t times the variance may be in squares of the tolerance; the tolerance, NaN for
    // none.
    double wanted[2], tolerance[2];
    uint64_t state;
    int64_t* index;  // [cols], of which `count` are written; kept columns first, each part ascending
    float* factor;   // [cols]
};

struct ColumnCounts {
    int64_t count, kept;  // count is 0 where all columns are needed
    double variance[2];
};

ColumnCounts choose_columns(const ColumnChoice& s);

}  // namespace fastpref
