// Packing for micro-kernels in plain C++, and what every packing shares.
#pragma once
#include "product.h"
#include "vec.h"

namespace fastpref {

// Word (i, p) of an operand: zero beyond its last row and its last element.
FP_INLINE uint32_t word_at(const Packing& pack, bool pairs, int64_t i, int64_t p) {
    if (i >= pack.last) return 0;
    const Operand& from = pack.from;
    auto element = [&](int64_t e) { return i * from.row + e * from.k; };
    if (pairs) {
        auto data = static_cast<const uint16_t*>(from.data);
        uint32_t low = data[element(2 * p)];
        return 2 * p + 1 < pack.size ? uint32_t(data[element(2 * p + 1)]) << 16 | low : low;
    }
    int64_t at = element(p);
    switch (from.dtype) {
        case Dtype::bf16: return as_bits(load(static_cast<const bf16*>(from.data) + at));
        case Dtype::f16: return as_bits(load(static_cast<const f16*>(from.data) + at));
        default: return as_bits(static_cast<const float*>(from.data)[at]);
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
