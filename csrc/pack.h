// Packing for micro-kernels in plain C++, and what every packing shares.
#pragma once
#include "product.h"
#include "vec.h"

namespace fastpref {

// Where the elements p of an operand begin, those of its rows 0, 1, 2 and so on.
template <class T> FP_INLINE const T* column_at(const Operand& from, int64_t p) {
    return static_cast<const T*>(from.columns ? from.columns[p] : from.data) + p * from.k;
}

// Word (i, p) of an operand of pairs: zero beyond its last row and its last element.
FP_INLINE uint32_t pair_at(const Packing& pack, int64_t i, int64_t p) {
    if (i >= pack.last) return 0;
    const int64_t at = i * pack.from.row;
    const uint32_t low = column_at<uint16_t>(pack.from, 2 * p)[at];
    if (2 * p + 1 >= pack.size) return low;
    return uint32_t(column_at<uint16_t>(pack.from, 2 * p + 1)[at]) << 16 | low;
}

template <class T>
FP_INLINE void pack_elements(const Packing& pack, int64_t first, int64_t p0, int64_t p1, uint32_t* out) {
    for (int64_t p = p0; p < p1; ++p, out += pack.group) {
        const T* from = column_at<T>(pack.from, p) + first * pack.from.row;
        for (int i = 0; i < pack.group; ++i)
            out[i] = first + i < pack.last ? as_bits(load(from + i * pack.from.row)) : 0;
    }
}

// One group, words [p0, p1).
FP_INLINE void pack_words(const Packing& pack, bool pairs, int64_t first, int64_t p0, int64_t p1,
                          uint32_t* out) {
    if (pairs) {
        for (int64_t p = p0; p < p1; ++p, out += pack.group)
            for (int i = 0; i < pack.group; ++i) out[i] = pair_at(pack, first + i, p);
        return;
    }
    switch (pack.from.dtype) {
        case Dtype::bf16: return pack_elements<bf16>(pack, first, p0, p1, out);
        case Dtype::f16: return pack_elements<f16>(pack, first, p0, p1, out);
        default: return pack_elements<float>(pack, first, p0, p1, out);
    }
}

}  // namespace fastpref
