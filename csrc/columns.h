// Columns of a block of D [rows, cols]: see Backend.column_sums and Backend.gather_columns.
#pragma once
#include "tile.h"

namespace fastpref {

// The sums of squares and the sums of the columns of row_scale d, and the sums of d's rows. A column's sum
// is the work of one thread, in the order of the rows.
struct ColumnSums {
    const void* d;
    Dtype dtype;
    int64_t rows, cols, stride;
    const float* row_scale;    // [rows], or null
    float *squares, *totals;   // [cols]
    float* row_sums;           // [rows]
};
void column_sums(const ColumnSums& s, int threads);

// out [rows, count + 1] = columns of d: the first `kept` as they are, the others less rest times mean, times
// factor. The last column is what the others leave of the row's rest.
struct GatherColumns {
    const void* d;
    Dtype dtype;
    int64_t rows, stride;
    const int64_t* index;           // [count]
    int64_t count, kept;
    const float *factor, *mean;     // [count]
    const float* row_sums;          // [rows]
    void* out;                      // in d's dtype
    int64_t out_stride;
    float* rest;                    // [rows], the row's sum without the kept columns
};
void gather_columns(const GatherColumns& s, int threads);

// out [count, cols] = q weight, in one pass over weight. The order of the sums does not depend on the threads.
struct WeightedRows {
    const void* weight;
    Dtype dtype;
    int64_t rows, cols, stride;
    const float* q;  // [count, rows]
    int64_t count;
    float* out;      // [count, cols]
};
void weighted_rows(const WeightedRows& s, int threads);

}  // namespace fastpref
