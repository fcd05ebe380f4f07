// What the forward pass does to whole rows, before and after the kernel that multiplies (forward.cu).
// Logits are in units of log2 throughout.
#pragma once
#include "launch.h"
#include "logits.h"

namespace fastpref::cuda {

constexpr float LN2 = 0.6931471805599453f;

// d has exponentials relative to its row's base, the label's logit and OFFSET. A label of probability 1
// then has 2^-OFFSET, and 2^-70 is the least probability that d knows. A tile whose maximum is more than
// LIMIT above the base, since the label has less than 2^-120, takes that for its base instead, and
// `combine` brings the whole row to its normaliser afterwards. So d stays below 2^LIMIT, its row's sum and
// the products below 2^100, and a factor times a coefficient is no subnormal bf16 number.
constexpr float OFFSET = 56.f, LIMIT = 64.f;

DEVICE bool has_own_base(float max, float base) { return max - base > LIMIT; }
DEVICE float to_base(float max, float base) { return has_own_base(max, base) ? 1.f : exp2_(max - base); }

// 1 / (1 + exp(2 scale raw / softcap)): tanh is 1 - 2 of that, its derivative 4 of that by 1 - that.
DEVICE float past_cap(float raw, float k) { return reciprocal(1.f + exp2_(raw * k)); }
DEVICE float slope_of_cap(float part) { return 4.f * part * (1.f - part); }

// The logit, less base, from raw or past_cap(raw). Monotonic in raw; it falls if c or k is negative.
template <bool CAP> DEVICE float exponent(float part, float c, float base) {
    return CAP ? fmaf(part, -2.f * c, c - base) : fmaf(part, c, -base);
}
DEVICE float finite_base(float max) { return max == -INF ? 0.f : max; }  // -inf - -inf is no number

// partial: of each tile of each row the maximum and the sum of exponentials, and for the extras the sum of
// exponentials times logits, both less the maximum, of their squares, of the raw logits (with a cap 0.5 -
// past_cap of them) and the argmax: two or six times [tiles, tokens]. target [tokens]: the labels' raw logits.
struct RowArgs {
    const int64_t* labels;
    float *partial, *target, *base;
    bf16* d;
    int64_t d_stride;
    int tokens, vocab, tiles;
    float c, k;
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
        UNROLL for (int j = 0; j < 8; ++j) sum = fmaf(left[j], right[j], sum);
    }
    sum = warp_sum(sum);
    if (lane() != 0) return;
    if (a.bias && known) sum += a.bias[label];
    const float z = exponent<CAP>(CAP ? past_cap(sum, a.k) : sum, a.c, -OFFSET);
    a.base[row] = known && fabsf(z) < INF ? z : 0.f;
}

// What is known of a row from some of its tiles.
struct RowPart {
    float high;
    int argmax;
    double sum, weighted, squared, total;  // next to a confident token's 1 the others are tiny
};

// Add what comes from later tiles.
template <bool EXTRAS> DEVICE void join(RowPart& to, const RowPart& from) {
    const float higher = fmaxf(to.high, from.high), base = finite_base(higher);
    const float a = to.high - base, b = from.high - base, left = exp2_(a), right = exp2_(b);
    if (EXTRAS) {
        to.weighted = (left > 0 ? left * (to.weighted + to.sum * a) : 0) +
                      (right > 0 ? right * (from.weighted + from.sum * b) : 0);
        to.squared = to.squared * left * left + from.squared * right * right;
        to.total += from.total;
        if (from.high > to.high) to.argmax = from.argmax;  // the first of equal maxima wins
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
    float *factor, slope;
};
constexpr int COMBINE_ROWS = 32, SLICES = 8;

template <bool CAP> DEVICE void write_extras(const CombineArgs& a, int row, const RowPart& p) {
    const Stats& s = a.stats;
    s.sum[row] = float(p.sum);
    if (s.weighted) {
        s.weighted[row] = float(p.weighted * double(LN2));
        s.squared[row] = float(p.squared);
        s.total[row] = float(p.total * (CAP ? 2 : 1) * a.c * double(LN2));
    }
    if (s.argmax) s.argmax[row] = p.argmax;
}

// Bring row `row` of d, written relative to several bases, to its normaliser. By a warp.
DEVICE void rescale(const CombineArgs& a, int row, float normaliser) {
    const float base = a.base[row];
    for (int column = lane(); column < a.vocab; column += 32) {
        const float max = *a.at(0, column / FORWARD_TILE, row);
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
    RowPart p{-INF, 0, 0, 0, 0, 0};
    const int stop = int(int64_t(a.tiles) * (slice + 1) / SLICES);
    for (int tile = int(int64_t(a.tiles) * slice / SLICES); inside && tile < stop; ++tile)
        join<EXTRAS>(p, tile_part<EXTRAS>(a, tile, row));
    parts[thread()] = p;
    sync();
    const bool writes = slice == 0 && inside;
    int64_t label = -1;
    float at_label = 0.f, moves_to = INF;
    if (writes) {
        p = parts[lane()];
        for (int i = 1; i < SLICES; ++i) join<EXTRAS>(p, parts[32 * i + lane()]);
        const float log_sum = log2f(float(p.sum)), normaliser = p.high + log_sum;
        label = a.labels[row];
        const bool known = 0 <= label && label < a.vocab;
        const float raw = known ? a.target[row] : NAN, part = CAP ? past_cap(raw, a.k) : raw;
        float logp = (exponent<CAP>(part, a.c, finite_base(p.high)) - log_sum) * LN2;
        logp = logp > 0 ? 0.f : logp;
        a.stats.lse[row] = normaliser * LN2;
        a.stats.logps[row] = logp;
        if (EXTRAS) write_extras<CAP>(a, row, p);
        if (D) {
            const bool moves = has_own_base(p.high, a.base[row]);
            const float gap = moves ? 0.f : a.base[row] - normaliser;
            if (moves) moves_to = normaliser;
            // An unknown label spoils its row, as it does the log-prob.
            a.factor[row] = known ? a.slope * exp2_(gap) : NAN;
            // The label's own entry is that of its log-prob, to which a difference of probabilities is not.
            at_label = -expm1f(logp) * (CAP ? slope_of_cap(part) : 1.f) * exp2_(-gap);
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
