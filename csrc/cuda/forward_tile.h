// What a thread of the forward pass does to its part of a tile of logits, in its registers.
//
// Of a row's 128 entries four lanes have 32 each: acc[4 i + j] and the next one, for j 0 or 2, are those
// of columns 8 i + 2 (lane % 4) and the next one.
#pragma once
#include "forward_rows.h"

namespace fastpref::cuda {

constexpr int COLUMNS = FORWARD_TILE;

struct TileArgs : RowArgs {
    bool negative;  // the scale is: the largest logit is that of the least raw one
};

DEVICE float more_extreme(const TileArgs& a, float v, float other) {
    return a.negative ? fminf(v, other) : fmaxf(v, other);
}
template <class V> DEVICE V sum_of_four(V v) {
    UNROLL for (int mask = 1; mask < 4; mask *= 2) v += shuffle_xor(v, mask);
    return v;
}

// What `combine` needs of the row's part in this tile. With D the entries become its part of d.
template <bool CAP, bool D, bool EXTRAS>
DEVICE void reduce_row(const TileArgs& a, int tile, int row, float (&acc)[64], int j) {
    const bool inside = row < a.tokens;
    const int first = lane() % 4 * 2, columns = a.vocab - tile * COLUMNS;
    const int64_t y = (inside ? a.labels[row] : -1) - int64_t(tile) * COLUMNS;
    if (0 <= y && y < COLUMNS)
        UNROLL for (int i = 0; i < 16; ++i)
            UNROLL for (int e = 0; e < 2; ++e)
                if (y == first + 8 * i + e) a.target[row] = acc[4 * i + j + e];
    float extreme = acc[j];
    UNROLL for (int i = 0; i < 16; ++i)
        UNROLL for (int e = 0; e < 2; ++e) extreme = more_extreme(a, extreme, acc[4 * i + j + e]);
    UNROLL for (int mask = 1; mask < 4; mask *= 2)
        extreme = more_extreme(a, extreme, shuffle_xor(extreme, mask));
    const float largest = a.part_of<CAP>(extreme), base = a.finite(largest);
    const float gain = D && inside ? to_base(a.logit(base), a.base[row]) : 0.f;
    float sum = 0.f, weighted = 0.f, squared = 0.f, total = 0.f;
    int argmax = COLUMNS;
    UNROLL for (int i = 15; i >= 0; --i)  // backwards, so that the first of equal maxima is found last
        UNROLL for (int e = 1; e >= 0; --e) {
            float& v = acc[4 * i + j + e];
            const float grown = CAP ? growth(v, a.k) : 0.f, part = CAP ? past_cap(grown) : v;
            const float z = (part - base) * a.unit, p = exp2_(z);
            sum += p;
            if (EXTRAS) {
                weighted = fmaf(p, fmaxf(z, -1e30f), weighted);  // a logit of -inf adds 0, not 0 * -inf
                squared = fmaf(p, p, squared);
                total += 8 * i + e < columns - first ? (CAP ? 0.5f - part : part) : 0.f;
                if (part == largest) argmax = first + 8 * i + e;
            }
            if (D) v = -gain * p * (CAP ? slope_of_cap(grown, part) : 1.f);
        }
    sum = sum_of_four(sum);
    if (EXTRAS) {
        weighted = sum_of_four(weighted);
        squared = sum_of_four(squared);
        total = sum_of_four(total);
        UNROLL for (int mask = 1; mask < 4; mask *= 2) {
            const int other = shuffle_xor(argmax, mask);
            argmax = other < argmax ? other : argmax;
        }
    }
    if (CAP && columns < COLUMNS) {
        // The cap has lifted the padding from -inf to -softcap. No logit is below that, so its share
        // of the whole sum is at most its share of the columns: taking it out again is harmless.
        const float z = (1.f - base) * a.unit, p = exp2_(z), padding = float(COLUMNS - columns);
        sum -= padding * p;
        weighted -= padding * p * z;
        squared -= padding * p * p;
    }
    if (!inside || lane() % 4 != 0) return;
    const float words[6] = {largest, sum, weighted, squared, total, bits_to_float(uint32_t(argmax))};
    UNROLL for (int i = 0; i < (EXTRAS ? 6 : 2); ++i) *a.at(i, tile, row) = words[i];
}

// The row's 128 entries of d. Of each 8 a lane has 2 and its neighbours have the others: the four
// exchange theirs, so that each has 8 entries of its own, 16 bytes.
DEVICE void write_row(const TileArgs& a, int tile, int row, const float (&acc)[64], int j) {
    const int quarter = lane() % 4;
    UNROLL for (int i = 0; i < 16; i += 4) {
        uint32_t w[4];
        UNROLL for (int k = 0; k < 4; ++k) w[k] = pack_bf16(acc[4 * (i + k) + j], acc[4 * (i + k) + j + 1]);
        UNROLL for (int bit = 1; bit < 4; bit *= 2)
            UNROLL for (int k = 0; k < 4; ++k) {
                if (k & bit) continue;
                const bool upper = quarter & bit;  // it keeps the later half and gives the earlier one
                const uint32_t got = shuffle_xor(upper ? w[k] : w[k | bit], bit);
                if (upper) w[k] = got;
                else w[k | bit] = got;
            }
        const int column = tile * COLUMNS + 8 * (i + quarter);
        if (row >= a.tokens || column >= a.vocab) continue;
        bf16* to = a.d + row * a.d_stride + column;
        if (column + 8 <= a.vocab) store_vector_and_forget(to, {{w[0], w[1], w[2], w[3]}});
        else
            UNROLL for (int k = 0; k < 8; ++k)
                if (column + k < a.vocab) to[k].bits = uint16_t(w[k / 2] >> 16 * (k % 2));
    }
}

}  // namespace fastpref::cuda
