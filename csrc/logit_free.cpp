// The head's forward pass without logits in memory: blocks of the product are folded, and turned into D,
// while they are in the cache.
//
// D's entries are exponentials relative to a base of their row, so that they can be written before the
// row's normaliser is known; row_scale brings them to it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "parallel.h"
#include "product.h"
#include "row.h"
#include "stream.h"

namespace fastpref {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity(),
                NO_NUMBER = std::numeric_limits<float>::quiet_NaN();

// A row's base is the label's logit + OFFSET: the exponentials of a row whose label has probability 1 reach
// down to 2^-70 of it before they become 0. A block whose maximum is more than LIMIT above the base (the
// label's probability is then below 2^-120) takes its maximum for base, and the whole row is brought to its
// normaliser afterwards. So D stays below e^LIMIT, 2^64, and row_scale times dlogp is no subnormal number.
constexpr float OFFSET = 38.8f, LIMIT = 44.4f;

struct Block {  // of a row: the sum of exponentials relative to base, without the label's
    float base;
    double sum;
};
struct Extras {  // of a row's block, relative to its maximum
    float max;
    int64_t argmax;
    Sums sums;
};

struct Pass {
    const LogitFree& head;
    Affine affine;
    int64_t blocks;
    void* d;            // of the column `first` on; or null
    int64_t d_stride, first = 0;
    bool past_caches = false;  // how D is written
    std::vector<Block> parts;    // [tokens, blocks]
    std::vector<Extras> extras;  // [tokens, blocks], or empty
    std::vector<float> base, target, sums_base;  // [tokens]: target is the label's logit

    explicit Pass(const LogitFree& h)
        : head(h), affine(h.transform), blocks((h.vocab + COLUMN_BLOCK - 1) / COLUMN_BLOCK), d(h.d),
          d_stride(h.d_stride), parts(size_t(h.tokens * blocks)), base(size_t(h.tokens)),
          target(size_t(h.tokens), NO_NUMBER) {
        if (h.stats.weighted || h.stats.argmax) extras.resize(size_t(h.tokens * blocks));
    }
    bool known(int64_t row) const { return 0 <= head.labels[row] && head.labels[row] < head.vocab; }
};

// The rows' bases. Any number near the label's logit would do, so how this sum is rounded does not matter.
template <class T, bool CAP> FP_INLINE void find_bases(Pass& pass, int64_t first, int64_t last) {
    const LogitFree& h = pass.head;
    for (int64_t row = first; row < last; ++row) {
        pass.base[row] = 0;
        if (!pass.known(row)) continue;
        auto x = static_cast<const T*>(h.x.data) + row * h.x.row;
        auto w = static_cast<const T*>(h.weight.data) + h.labels[row] * h.weight.row;
        float lane[LANES] = {}, raw = h.bias ? h.bias[h.labels[row]] : 0.f;
        int64_t j = 0;
        for (; j + LANES <= h.hidden; j += LANES)
            for (int k = 0; k < LANES; ++k)
                lane[k] += load(x + (j + k) * h.x.k) * load(w + (j + k) * h.weight.k);
        for (; j < h.hidden; ++j) lane[0] += load(x + j * h.x.k) * load(w + j * h.weight.k);
        raw += float(lanes_sum(lane));
        float z = logit<CAP>(pass.affine, raw) + OFFSET;
        // Where the label's logit is not finite, every block takes its maximum for base.
        pass.base[row] = std::fabs(z) < INF ? z : -INF;
    }
}

// A row's exponentials relative to base, which are also its part of D.
struct Exponentials {
    double sum;
    float max;  // of z
};
// No z may be more than 88.7 above base, unless the result is thrown away. In `numbers` none is NaN: D is
// then stored without a test for it.
template <class O, bool CAP, bool NUMBERS>
FP_INLINE Exponentials exponentials(const Pass& pass, int64_t row, int64_t col, int64_t cols,
                                    const float* z, int64_t y, float base) {
    constexpr bool WITH_D = !std::is_void_v<O>;
    using Entry = std::conditional_t<WITH_D, O, float>;
    constexpr uint32_t SIGN = WITH_D ? 0x80000000u : 0;
    const float to_tanh = CAP ? pass.affine.inv_cap / pass.affine.inv_t : 0.f;
    Entry streamed_d[WITH_D ? COLUMN_BLOCK : 1];
    Entry* d = WITH_D ? static_cast<Entry*>(pass.d) + row * pass.d_stride + col - pass.first : nullptr;
    Entry* to = pass.past_caches ? streamed_d : d;
    float lane[LANES] = {}, highest[LANES];
    for (int k = 0; k < LANES; ++k) highest[k] = -INF;
    auto entry = [&](int64_t j, int k) FP_INLINE_LAMBDA {
        const float e = signed_exp(z[j] - base, SIGN), th = CAP ? z[j] * to_tanh : 0.f;
        highest[k] = z[j] > highest[k] ? z[j] : highest[k];
        lane[k] += e;
        if constexpr (WITH_D) {
            const float value = CAP ? e * (1.f - th * th) : e;
            if (NUMBERS) store_number(to + j, value);
            else store(to + j, value);
        }
    };
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES) {
        FP_IVDEP for (int k = 0; k < LANES; ++k) entry(j + k, k);
    }
    for (int k = 0; j < cols; ++j, ++k) entry(j, k);
    if constexpr (WITH_D) {
        if (CAP && 0 <= y && y < cols) store(to + y, 0.f);  // 0 * -inf
        if (pass.past_caches) stream(d, streamed_d, cols);
    }
    const double sum = lanes_sum(lane);
    return {WITH_D ? -sum : sum, lanes_max(highest)};
}

// Fold one row of a block of raw logits, and write its part of D; with O void there is no D.
template <class O, bool CAP, bool EXTRAS>
FP_INLINE void finish_row(Pass& pass, int64_t row, int64_t col, int64_t cols, float* z) {
    const LogitFree& h = pass.head;
    const Affine& a = pass.affine;
    if (CAP || h.bias || a.scale != 1.f)
        for (int64_t j = 0; j < cols; ++j) z[j] = logit<CAP>(a, h.bias ? z[j] + h.bias[col + j] : z[j]);
    const int64_t at = row * pass.blocks + col / COLUMN_BLOCK;
    const Affine as_is(Transform{1.f, 0.f, 1.f});
    if (EXTRAS) {
        Extras& e = pass.extras[size_t(at)];
        e.max = row_max<float, false>(as_is, z, cols);
        e.argmax = 0;
        while (e.argmax < cols && !(z[e.argmax] >= e.max)) ++e.argmax;
        e.argmax = col + (e.argmax < cols ? e.argmax : 0);
        e.sums = row_sums<float, false, true>(as_is, z, cols, e.max == -INF ? 0.f : e.max);
    }
    const int64_t y = h.labels[row] - col;
    if (0 <= y && y < cols) {
        pass.target[size_t(row)] = z[y];
        z[y] = -INF;  // left out of the sum: next to a confident label's the others would lose their digits
    }
    float base = pass.base[size_t(row)];
    Exponentials e = exponentials<O, CAP, true>(pass, row, col, cols, z, y, base);
    if (!(e.max - base <= LIMIT) || e.sum != e.sum) {  // once more
        if (e.max - base > LIMIT) base = e.max;
        if (base == -INF) base = 0;  // nothing but -inf
        e = exponentials<O, CAP, false>(pass, row, col, cols, z, y, base);
    }
    pass.parts[size_t(at)] = {base, e.sum};
}

struct Row {
    double log_others;  // log of the sum of the other logits' exponentials
    bool moved;  // whether a block has a base of its own
};

FP_INLINE Row join_blocks(const Pass& pass, int64_t row) {
    const Block* part = &pass.parts[size_t(row * pass.blocks)];
    const float base = pass.base[size_t(row)];
    double high = -double(INF), sum = 0;
    bool moved = false;
    for (int64_t i = 0; i < pass.blocks; ++i) {
        moved |= part[i].base != base;
        if (part[i].sum != 0 && part[i].base > high) high = part[i].base;
    }
    if (high == -double(INF)) high = 0;
    for (int64_t i = 0; i < pass.blocks; ++i) {
        if (part[i].sum == 0) continue;  // its base may be any number, and 0 * inf is none
        sum += part[i].base == high ? part[i].sum : part[i].sum * std::exp(part[i].base - high);
    }
    return {std::log(sum) + high, moved};
}

FP_INLINE void join_extras(const Pass& pass, int64_t row) {
    const Extras* e = &pass.extras[size_t(row * pass.blocks)];
    const Stats& s = pass.head.stats;
    float max = -INF;
    int64_t argmax = e[0].argmax;
    for (int64_t i = 0; i < pass.blocks; ++i)
        if (e[i].max > max) max = e[i].max, argmax = e[i].argmax;  // the first of equal maxima
    Sums all;
    for (int64_t i = 0; i < pass.blocks; ++i) {
        const Sums& part = e[i].sums;
        double shift = e[i].max == -INF ? 0 : double(e[i].max) - max, moved = std::exp(shift);
        all.e += part.e * moved;
        all.weighted += moved * (part.weighted + part.e * shift);
        all.squared += part.squared * moved * moved;
        all.total += part.total;
    }
    s.max[row] = max;
    s.sum[row] = float(all.e);
    if (s.argmax) s.argmax[row] = argmax;
    if (s.weighted)
        s.weighted[row] = float(all.weighted), s.squared[row] = float(all.squared),
        s.total[row] = float(all.total);
}

// The statistics of a row whose blocks are all there. What its blocks hold of D is then to be multiplied by
// exp(base - lse) and the slope of scale and temperature; label_entry is the label's, with neither.
struct Finished {
    double lse, label_entry;
    bool moved;
};
template <bool CAP> FP_INLINE Finished finish_statistics(const Pass& pass, int64_t row) {
    const LogitFree& h = pass.head;
    const Affine& a = pass.affine;
    const Row r = join_blocks(pass, row);
    const double target = pass.target[size_t(row)], odds = r.log_others - target;
    // Of a label at infinity there is no log-prob. One at -infinity has a normaliser: the others'.
    const double rest = std::log1p(std::exp(-std::fabs(odds)));
    const double logp = target == INF ? NO_NUMBER : odds > 0 ? -(odds + rest) : -rest;
    const double lse = target == INF ? NO_NUMBER : (odds > 0 ? r.log_others : target) + rest;
    h.stats.logps[row] = logp == 0 ? 0.f : float(logp);
    h.stats.lse[row] = float(lse);
    if (!pass.extras.empty()) join_extras(pass, row);
    // From the log-prob: a difference of probabilities would lose its digits.
    const double th = CAP ? target * (double(a.inv_cap) / a.inv_t) : 0;
    return {lse, -std::expm1(logp) * (1 - th * th), r.moved};
}

// Bring D of `cols` columns from the bases of their blocks to another one. A block of nothing but -inf has
// no base, and its D is 0.
template <class O> FP_INLINE void move_blocks(O* d, const Block* part, int64_t cols, double base) {
    for (int64_t first = 0; first < cols; first += COLUMN_BLOCK, ++part) {
        if (part->sum == 0) continue;
        const float factor = float(std::exp(part->base - base));
        const int64_t last = std::min(first + COLUMN_BLOCK, cols);
        for (int64_t j = first; j < last; ++j) store(d + j, load(d + j) * factor);
    }
}

// Bring D of a row to its normaliser, but for the row's scale.
template <class O, bool CAP> FP_INLINE void finish_d(const Pass& pass, int64_t row) {
    const LogitFree& h = pass.head;
    const Finished f = finish_statistics<CAP>(pass, row);
    if (!h.d) return;
    double gap = f.moved ? 0 : pass.base[size_t(row)] - f.lse;
    gap = gap > 62 ? 62 : gap;  // where logits are so large that two orders of summation differ much
    h.row_scale[row] = f.lse == f.lse ? float(pass.affine.slope * std::exp(gap)) : NO_NUMBER;
    O* d = static_cast<O*>(h.d) + row * h.d_stride;
    if (f.moved) move_blocks(d, &pass.parts[size_t(row * pass.blocks)], h.vocab, f.lse);
    if (pass.known(row)) store(d + h.labels[row], float(f.label_entry * std::exp(-gap)));
}

// The sums of D W so far have the row's base; where a block of this slice has a higher one, they and the
// slice's D move to it.
template <class O> FP_INLINE void move_to_one_base(Pass& pass, int64_t row, int64_t cols, float* sums) {
    const Block* part = &pass.parts[size_t(row * pass.blocks + pass.first / COLUMN_BLOCK)];
    const int64_t count = (cols + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    float& base = pass.sums_base[size_t(row)];
    float high = base;
    bool same = true;
    for (int64_t i = 0; i < count; ++i) {
        same &= part[i].base == base;
        if (part[i].sum != 0 && part[i].base > high) high = part[i].base;
    }
    if (same) return;
    move_blocks(static_cast<O*>(pass.d) + row * pass.d_stride, part, cols, high);
    const float shift = base == high ? 1.f : float(std::exp(double(base) - high));
    for (int64_t j = 0; j < pass.head.hidden; ++j) sums[j] *= shift;
    base = high;
}

// u = the sums of D W, brought to the row's normaliser, and the label's part.
template <class T, bool CAP> FP_INLINE void finish_u(const Pass& pass, int64_t row, const float* sums) {
    const LogitFree& h = pass.head;
    const Finished f = finish_statistics<CAP>(pass, row);
    const bool known = pass.known(row);
    const double slope = f.lse == f.lse ? double(pass.affine.slope) : double(NO_NUMBER);
    const float scale = float(slope * std::exp(double(pass.sums_base[size_t(row)]) - f.lse));
    const float label = float(slope * f.label_entry);
    auto w = static_cast<const T*>(h.weight.data) + (known ? h.labels[row] : 0) * h.weight.row;
    T* u = static_cast<T*>(h.u) + row * h.u_stride;
    for (int64_t j = 0; j < h.hidden; ++j) store(u + j, scale * sums[j] + label * load(w + j));
}

template <class T, bool CAP> struct FindBases {
    FP_INLINE void run(Pass& pass, int64_t first, int64_t last) { find_bases<T, CAP>(pass, first, last); }
};
template <class O, bool CAP, bool EXTRAS> struct FinishRows {
    FP_INLINE void run(Pass& pass, int64_t row, int64_t rows, int64_t col, int64_t cols, float* sums,
                       int64_t stride) {
        for (int64_t i = 0; i < rows; ++i)
            finish_row<O, CAP, EXTRAS>(pass, row + i, col, cols, sums + i * stride);
        if (pass.past_caches) streamed();
    }
};
template <class O, bool CAP> auto rows_of(const Pass& pass) {
    return pass.extras.empty() ? clone_of<FinishRows<O, CAP, false>>()
                               : clone_of<FinishRows<O, CAP, true>>();
}
template <class O, bool CAP> struct FinishD {
    FP_INLINE void run(const Pass& pass, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) finish_d<O, CAP>(pass, row);
    }
};
template <class T, bool CAP> struct FinishU {
    FP_INLINE void run(const Pass& pass, int64_t first, int64_t last, const float* sums) {
        for (int64_t row = first; row < last; ++row)
            finish_u<T, CAP>(pass, row, sums + row * pass.head.hidden);
    }
};

template <class T> Operand part_of(const Operand& weight, int64_t first) {
    return {static_cast<const T*>(weight.data) + first * weight.row, weight.dtype, weight.row, weight.k};
}

// u [tokens, hidden] = D W, a slice of the vocabulary at a time.
template <class T, bool CAP>
void project(Pass& pass, const Finish& finish, const MicroKernel& kernel, int threads) {
    const LogitFree& h = pass.head;
    std::vector<float> sums(size_t(h.tokens * h.hidden));
    pass.d_stride = SLICE + 16;  // rows that do not fall into one set of a cache
    std::vector<T> d(size_t(h.tokens * pass.d_stride));
    pass.d = d.data();
    pass.sums_base = pass.base;
    for (pass.first = 0; pass.first < h.vocab; pass.first += SLICE) {
        const int64_t cols = std::min(SLICE, h.vocab - pass.first);
        const Operand part = part_of<T>(h.weight, pass.first);
        product({h.x, part, h.tokens, cols, h.hidden, nullptr, Dtype::f32, 0, &finish}, kernel, threads);
        parallel_ranges(h.tokens, threads, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                move_to_one_base<T>(pass, row, cols, sums.data() + row * h.hidden);
        });
        const Operand left{d.data(), h.x.dtype, pass.d_stride, 1};
        const Operand right{part.data, part.dtype, part.k, part.row};
        product({left, right, h.tokens, h.hidden, cols, sums.data(), Dtype::f32, h.hidden, nullptr, true},
                kernel, threads);
    }
    auto u_rows = clone_of<FinishU<T, CAP>>();
    parallel_ranges(h.tokens, threads,
                    [&](int64_t first, int64_t last) { u_rows(pass, first, last, sums.data()); });
}

template <class T, bool CAP> void run(const LogitFree& head, const MicroKernel& kernel, int threads) {
    Pass pass(head);
    auto bases = clone_of<FindBases<T, CAP>>();
    parallel_ranges(head.tokens, threads, [&](int64_t first, int64_t last) { bases(pass, first, last); });
    auto block = head.d || head.u ? rows_of<T, CAP>(pass) : rows_of<void, CAP>(pass);
    const Finish finish = [&](int64_t row, int64_t rows, int64_t col, int64_t cols, float* sums,
                              int64_t stride) {
        block(pass, row, rows, pass.first + col, cols, sums, stride);
    };
    if (head.u) return project<T, CAP>(pass, finish, kernel, threads);
    pass.past_caches = head.d && head.tokens * head.vocab * int64_t(sizeof(T)) >= PAST_CACHES;
    product({head.x, head.weight, head.tokens, head.vocab, head.hidden, nullptr, Dtype::f32, 0, &finish},
            kernel, threads);
    auto d_rows = clone_of<FinishD<T, CAP>>();
    parallel_ranges(head.tokens, threads, [&](int64_t first, int64_t last) { d_rows(pass, first, last); });
}

}  // namespace

void logit_free_forward(const LogitFree& head, const MicroKernel& kernel, int threads) {
    const bool cap = head.transform.softcap > 0;
    switch (head.x.dtype) {
        case Dtype::bf16:
            return cap ? run<bf16, true>(head, kernel, threads) : run<bf16, false>(head, kernel, threads);
        case Dtype::f16:
            return cap ? run<f16, true>(head, kernel, threads) : run<f16, false>(head, kernel, threads);
        default:
            return cap ? run<float, true>(head, kernel, threads) : run<float, false>(head, kernel, threads);
    }
}

}  // namespace fastpref
