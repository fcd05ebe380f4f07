// Packing for micro-kernels in plain C++, and what every packing shares.
#pragma once
#include "product.h"
#include "vec.h"

namespace fastpref {

// Where the elements p of an operand begin, those of its rows 0, 1, 2 and so on.
template <class T> FP_INLINE const T* column_at(const Operand& from, int64_t p) {
    return static_cast<const T*>(from.columns ? from.columns[p] : from.data) + p * from.k;
}

// Word (i, p) of an operand: zero beyond its last row and its last element.
FP_INLINE uint32_t word_at(const Packing& pack, bool pairs, int64_t i, int64_t p) {
    if (i >= pack.last) return 0;
    const Operand& from = pack.from;
    const int64_t at = i * from.row;
    if (pairs) {
        uint32_t low = column_at<uint16_t>(from, 2 * p)[at];
        return 2 * p + 1 < pack.size ? uint32_t(column_at<uint16_t>(from, 2 * p + 1)[at]) << 16 | low : low;
    }
    switch (from.dtype) {
        case Dtype::bf16: return as_bits(load(column_at<bf16>(from, p) + at));
        case Dtype::f16: return as_bits(load(column_at<f16>(from, p) + at));
        default: return as_bits(column_at<float>(from, p)[at]);
    }
}

// One group, words [p0, p1).
FP_INLINE void pack_words(const Packing& pack, bool pairs, int64_t first, int64_t p0, int64_t p1,
                          uint32_t* out) {
    for (int64_t p = p0; p < p1; ++p)
        for (int i = 0; i < pack.group; ++i)
            out[(p - p0) * pack.group + i] = word_at(pack, pairs, first + i, p);
}

}  // namespace fastpref
