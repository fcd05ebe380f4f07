// Which columns of a block of D are kept and which are drawn: fastpref/backends/column_choice.py in one
// thread, bit for bit where all squares are finite; otherwise all columns are needed.
#pragma once
#include <cstdint>

namespace fastpref {

struct ColumnChoice {
    const float* squares;   // [cols]
    const float* distance;  // [cols]
    int64_t cols;
    const int64_t* labels;  // [rows]
    int64_t rows;
    // Of u and of dW: the size whose square the error is relative to, and the tolerance, NaN for none. With t
    // drawn columns the variance may be tolerance^2 wanted.
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
