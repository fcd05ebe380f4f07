// What the forward pass does to whole rows, before and after the kernel that multiplies (forward.cu).
//
// A logit in units of log2 is unit part + offset: of a raw logit, or with a cap of past_cap. Differences
// are taken between parts, which are the same numbers where logits are: a confident token's is exactly 0.
#pragma once
#include "launch.h"
#include "logits.h"

namespace fastpref::cuda {

constexpr float LN2 = 0.6931471805599453f;

// d holds exponentials relative to its row's base, which is the label's logit + OFFSET. A label of
// probability 1 has 2^-OFFSET, and 2^-70 is the least probability that d represents. A tile whose maximum is
// more than LIMIT above the base (the label's probability is below 2^-120) takes its maximum for base, and
// `combine` brings the whole row to its normaliser afterwards. So d stays below 2^LIMIT, its row's sum and
// the products below 2^100, and row_scale times dlogp is no subnormal bf16 number.
constexpr float OFFSET = 56.f, LIMIT = 64.f;

DEVICE bool has_own_base(float max, float base) { return max - base > LIMIT; }
DEVICE float to_base(float max, float base) { return has_own_base(max, base) ? 1.f : exp2_(max - base); }

// With growth = exp(2 scale raw / softcap) and part = 1 / (1 + growth), tanh = 1 - 2 part. Its derivative
// 4 part (1 - part) is formed as 4 part (growth part), which is exact however small.
DEVICE float growth(float raw, float k) { return exp2_(raw * k); }
DEVICE float past_cap(float growth) { return reciprocal(1.f + growth); }
DEVICE float slope_of_cap(float growth, float part) {
    return 4.f * part * (fminf(growth, 0x1p100f) * part);
}

// partial: of each tile of each row the maximum and the sum of exponentials, and for the extras the sum of
// exponentials times logits, both less the maximum, of their squares, of the parts (with a cap of 0.5 less
// the part) and the argmax: two or six times [tiles, tokens]. target [tokens]: the labels' raw logits.
struct RowArgs {
    const int64_t* labels;
    float *partial, *target, *base;
    bf16* d;
    int64_t d_stride;
    int tokens, vocab, tiles;
    float unit, offset, k;  // growth's k
    template <bool CAP> DEVICE float part_of(float raw) const {
        return CAP ? past_cap(growth(raw, k)) : raw;
    }
    DEVICE float logit(float part) const { return fmaf(part, unit, offset); }
    DEVICE bool is_above(float part, float other) const { return (part - other) * unit > 0; }
    // -inf - -inf is no number.
    DEVICE float finite(float part) const { return part * unit == -INF ? 0.f : part; }
    DEVICE float* at(int number, int tile, int row) const {
        return partial + (int64_t(number) * tiles + tile) * tokens + row;
    }
};

struct BaseArgs : RowArgs {
    const bf16 *x, *weight;
    int64_t x_stride, weight_stride;
    const float* bias;
    int hidden;
};
constexpr int BASE_ROWS = 8;

// The rows' bases; a warp takes a row. Any number would do, so how this sum is rounded does not matter.
template <bool CAP> KERNEL(32 * BASE_ROWS, 1) base_kernel(const BaseArgs a) {
    const int row = int(block()) * BASE_ROWS + thread() / 32;
    if (row >= a.tokens) return;
    const int64_t label = a.labels[row];
    const bool known = 0 <= label && label < a.vocab;
    const bf16 *x = a.x + row * a.x_stride, *w = a.weight + (known ? label : 0) * a.weight_stride;
    float sum = 0.f;
    for (int column = 8 * lane(); column < a.hidden; column += 8 * 32) {
        float left[8], right[8];
        read_logits(x, column, 0, a.hidden, true, left);
        read_logits(w, column, 0, a.hidden, true, right);
        // clang-format off: it loses the place of a file's first UNROLL
        UNROLL for (int j = 0; j < 8; ++j) sum = fmaf(left[j], right[j], sum);
        // clang-format on
    }
    sum = warp_sum(sum);
    if (lane() != 0) return;
    if (a.bias && known) sum += a.bias[label];
    const float z = a.logit(a.part_of<CAP>(sum)) + OFFSET;
    // Where the label's logit is not finite, every tile takes its maximum for base.
    a.base[row] = !known ? 0.f : fabsf(z) < INF ? z : -INF;
}

// What is known of a row from some of its tiles. high: the part of its largest logit.
struct RowPart {
    float high;
    int argmax;
    double sum, weighted, squared, total;  // next to a confident token's 1 the others are tiny
};

// Add what comes from later tiles.
template <bool EXTRAS> DEVICE void join(const RowArgs& row, RowPart& to, const RowPart& from) {
    const bool later = row.is_above(from.high, to.high);
    const float higher = later ? from.high : to.high, base = row.finite(higher);
    const float a = (to.high - base) * row.unit, b = (from.high - base) * row.unit;
    const float left = exp2_(a), right = exp2_(b);
    if (EXTRAS) {
        to.weighted = (left > 0 ? left * (to.weighted + to.sum * a) : 0) +
                      (right > 0 ? right * (from.weighted + from.sum * b) : 0);
        to.squared = to.squared * left * left + from.squared * right * right;
        to.total += from.total;
        if (later) to.argmax = from.argmax;  // the first of equal maxima wins
    }
    to.sum = to.sum * left + from.sum * right;
    to.high = higher;
}

template <bool EXTRAS> DEVICE RowPart tile_part(const RowArgs& a, int tile, int row) {
    const float high = *a.at(0, tile, row), sum = *a.at(1, tile, row);
    if (!EXTRAS) return {high, 0, sum, 0, 0, 0};
    const int argmax = tile * FORWARD_TILE + int(float_to_bits(*a.at(5, tile, row)));
    return {high, argmax, sum, *a.at(2, tile, row), *a.at(3, tile, row), *a.at(4, tile, row)};
}

struct CombineArgs : RowArgs {
    Stats stats;  // lse and logps; with the extras sum and what they need
    float* row_scale;  // [tokens], with D
    float slope;
};
constexpr int COMBINE_ROWS = 32, SLICES = 8;

template <bool CAP> DEVICE void write_extras(const CombineArgs& a, int row, const RowPart& p) {
    const Stats& s = a.stats;
    s.sum[row] = float(p.sum);
    if (s.weighted) {
        s.weighted[row] = float(p.weighted * double(LN2));
        s.squared[row] = float(p.squared);
        s.total[row] = float(p.total * double(CAP ? -a.unit : a.unit) * double(LN2));
    }
    if (s.argmax) s.argmax[row] = p.argmax;
}

// Bring row `row` of d, written relative to several bases, to its normaliser. By a warp.
DEVICE void rescale(const CombineArgs& a, int row, float normaliser) {
    const float base = a.base[row];
    for (int column = lane(); column < a.vocab; column += 32) {
        const float max = a.logit(*a.at(0, column / FORWARD_TILE, row));
        bf16* at = a.d + row * a.d_stride + column;
        const float gain = exp2_((has_own_base(max, base) ? max : base) - normaliser);
        at->bits = uint16_t(pack_bf16(read(at) * gain, 0.f));
    }
}

// Fold the tiles of a row, in the vocabulary's order, into its statistics, and finish d. A warp takes 32
// tokens and an eighth of the tiles.
template <bool CAP, bool D, bool EXTRAS> KERNEL(COMBINE_ROWS* SLICES, 1) combine_kernel(const CombineArgs a) {
    SHARED(RowPart, parts, COMBINE_ROWS* SLICES);
    SHARED(float, normalisers, COMBINE_ROWS);  // of the rows that have to be rescaled, else infinity
    const int slice = thread() / 32, first = int(block()) * COMBINE_ROWS, row = first + lane();
    const bool inside = row < a.tokens;
    RowPart p{a.unit > 0 ? -INF : INF, 0, 0, 0, 0, 0};
    const int stop = int(int64_t(a.tiles) * (slice + 1) / SLICES);
    for (int tile = int(int64_t(a.tiles) * slice / SLICES); inside && tile < stop; ++tile)
        join<EXTRAS>(a, p, tile_part<EXTRAS>(a, tile, row));
    parts[thread()] = p;
    sync();
    const bool writes = slice == 0 && inside;
    int64_t label = -1;
    float at_label = 0.f, moves_to = INF;
    if (writes) {
        p = parts[lane()];
        for (int i = 1; i < SLICES; ++i) join<EXTRAS>(a, p, parts[32 * i + lane()]);
        // The sum is at least 1, and a confident token's little more.
        const float log_sum = log1pf(float(p.sum - 1)) * LOG2E, high = a.logit(p.high), normaliser = high + log_sum;
        label = a.labels[row];
        const bool known = 0 <= label && label < a.vocab;
        const float raw = known ? a.target[row] : NAN, part = a.part_of<CAP>(raw);
        float logp = ((part - a.finite(p.high)) * a.unit - log_sum) * LN2;
        logp = logp > 0 ? 0.f : logp;
        a.stats.lse[row] = normaliser * LN2;
        a.stats.logps[row] = logp;
        if (EXTRAS) write_extras<CAP>(a, row, p);
        if (D) {
            const bool moves = has_own_base(high, a.base[row]);
            // Unbounded where logits are so large that two orders of summation differ much.
            float gap = moves ? 0.f : a.base[row] - normaliser;
            gap = gap > 90.f ? 90.f : gap;
            if (moves) moves_to = normaliser;
            // An unknown label spoils its row, as it does the log-prob.
            a.row_scale[row] = known ? a.slope * exp2_(gap) : NAN;
            // The label's entry comes from its log-prob: a difference of probabilities would lose its digits.
            at_label = -expm1f(logp) * (CAP ? slope_of_cap(growth(raw, a.k), part) : 1.f) * exp2_(-gap);
            if (!known) label = -1;
        }
    }
    if (!D) return;
    if (slice == 0) normalisers[lane()] = moves_to;
    sync();
    for (int i = slice; i < COMBINE_ROWS; i += SLICES)
        if (normalisers[i] != INF) rescale(a, first + i, normalisers[i]);
    sync();
    if (label >= 0) a.d[row * a.d_stride + label].bits = uint16_t(pack_bf16(at_label, 0.f));
}

}  // namespace fastpref::cuda
