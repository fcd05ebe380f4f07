// fold, and fold with grad, as one kernel that reads each logit once.
//
// The thread blocks of a cluster share a row and hold it in registers, N logits to a thread. A warp
// finds its maximum, so that each logit costs one exponential; (maximum, sums) of the warps meet in
// shared memory and those of the blocks in each other's, and then D is written from what the
// registers hold: exp(z - m), times the softcap's derivative. D may overwrite the logits, since by then
// every block of the row has read its share.
//
// A row that has more logits than the cluster has room is folded in several turns, and its D is
// written by `grad`. fold alone is the same kernel without the last step, so that a policy's and a
// reference's log-probs are the same to the last bit. The build turns off the contraction of a product
// and a sum into an fma: z - m has to be exactly 0 at the maximum.
#pragma once
#include "logits.h"

namespace fastpref::cuda {

constexpr int NO_COLUMN = 0x7fffffff;

// Statistics of part of a row: see fastpref/backends/stats.py.
struct Part {
    float max, sum, weighted, squared, total;
    int argmax;
};
constexpr int PART_WORDS = 6;

struct FoldArgs {
    const void* tile;
    const int64_t* labels;
    int64_t stride, col0;
    int columns, cluster;
    bool aligned, out_aligned;
    Affine affine;
    Stats stats;
    const float* exact;
    void* out;
    int64_t out_stride;
    Dtype out_dtype;
};

DEVICE float base_of(float max) { return max == -INF ? 0.f : max; }

// The parts that the lanes hold, as one, in every lane. Lanes without one hold a maximum of -inf.
template <bool EXTRAS> DEVICE Part combined(const Part& mine) {
    Part all = mine;
    all.max = warp_max(mine.max);
    float shift = mine.max - base_of(all.max), factor = exponential(shift);
    all.sum = warp_sum(mine.sum * factor);  // NaN stays NaN
    if (EXTRAS) {
        all.weighted = warp_sum(factor > 0 ? factor * (mine.weighted + mine.sum * shift) : 0.f);
        all.squared = warp_sum(mine.squared * factor * factor);
        all.total = warp_sum(mine.total);
        all.argmax = warp_min(mine.max == all.max ? mine.argmax : NO_COLUMN);
    }
    return all;
}

template <bool EXTRAS> DEVICE Part read_part(const uint32_t* words, bool there) {
    Part part{-INF, 0.f, 0.f, 0.f, 0.f, NO_COLUMN};
    if (there) {
        part.max = bits_to_float(words[0]);
        part.sum = bits_to_float(words[1]);
        if (EXTRAS) {
            part.weighted = bits_to_float(words[2]);
            part.squared = bits_to_float(words[3]);
            part.total = bits_to_float(words[4]);
            part.argmax = int(words[5]);
        }
    }
    return part;
}

// rank: the block whose shared memory is written; -1: this one's own.
template <bool EXTRAS> DEVICE void write_part(uint32_t* words, int rank, const Part& part) {
    const uint32_t values[PART_WORDS] = {float_to_bits(part.max),      float_to_bits(part.sum),
                                         float_to_bits(part.weighted), float_to_bits(part.squared),
                                         float_to_bits(part.total),    uint32_t(part.argmax)};
    UNROLL for (int i = 0; i < (EXTRAS ? PART_WORDS : 2); ++i) {
        if (rank < 0) words[i] = values[i];
        else cluster_store(words + i, rank, values[i]);
    }
}

struct Logs {
    float lse, logp;
};

// lse and the label's log-prob from a row's statistics. The thread with `writer` stores both.
DEVICE Logs finish(const FoldArgs& a, int64_t row, Part p, float target, bool writer) {
    const Stats& s = a.stats;
    int64_t argmax = p.argmax == NO_COLUMN ? 0 : a.col0 + p.argmax;
    if (a.col0 > 0) {
        float old = s.max[row], m = fmaxf(old, p.max), base = base_of(m);
        float shift = p.max - base, factor = exponential(shift);
        float old_shift = old - base, old_factor = exponential(old_shift), old_sum = s.sum[row];
        if (s.weighted) {
            p.weighted = (factor > 0 ? factor * (p.weighted + p.sum * shift) : 0.f) +
                         (old_factor > 0 ? old_factor * (s.weighted[row] + old_sum * old_shift) : 0.f);
            p.squared = p.squared * factor * factor + s.squared[row] * old_factor * old_factor;
            p.total += s.total[row];
        }
        if (s.argmax && !(p.max > old)) argmax = s.argmax[row];  // the first of equal maxima wins
        p.sum = p.sum * factor + old_sum * old_factor;
        p.max = m;
        if (is_nan(target)) target = s.target[row];
    }
    if (a.exact) {  // Stats.replace_target, for this row
        float exact = a.exact[row], base = target == p.max ? exact : p.max;
        float shift = p.max - base, rescale = exponential(shift);
        float before = target - p.max, after = exact - base;
        float old_e = exponential(before), new_e = exponential(after);
        float others = p.sum - old_e;
        others = others < 0 ? 0.f : others;
        if (s.weighted) {
            p.weighted = rescale * (p.weighted - old_e * before + shift * others) + new_e * after;
            float rest = p.squared - old_e * old_e;
            p.squared = rescale * rescale * (rest < 0 ? 0.f : rest) + new_e * new_e;
            p.total += exact - target;
        }
        p.sum = rescale * others + new_e;
        p.max = base;
        target = exact;
    }
    float log_sum = logf(p.sum), lse = p.max + log_sum;
    // target - max is exact where the label is almost certain. A log-prob above 0 is a rounding error.
    float logp = target - p.max - log_sum;
    logp = logp > 0 ? 0.f : logp;
    if (writer) {
        s.max[row] = p.max;
        s.sum[row] = p.sum;
        s.target[row] = target;
        s.lse[row] = lse;
        s.logps[row] = logp;
        if (s.weighted) s.weighted[row] = p.weighted, s.squared[row] = p.squared, s.total[row] = p.total;
        if (s.argmax) s.argmax[row] = argmax;
    }
    return {lse, logp};
}

// The statistics of an ignored row are arbitrary finite numbers; its logits are not read.
DEVICE void ignore(const FoldArgs& a, int64_t row, int rank) {
    const Stats& s = a.stats;
    if (a.out)
        write_zeros(row_of(a.out, a.out_dtype, row, a.out_stride), a.out_dtype, a.columns, rank, a.cluster);
    if (rank != 0 || thread() != 0) return;
    s.max[row] = s.target[row] = s.lse[row] = s.logps[row] = 0.f;
    s.sum[row] = 1.f;
    if (s.weighted) s.weighted[row] = s.total[row] = 0.f, s.squared[row] = 1.f;
    if (s.argmax) s.argmax[row] = 0;
}

template <class T, bool CAP, bool EXTRAS, int N, int THREADS, int BLOCKS>
KERNEL(THREADS, BLOCKS) fold_kernel(const FoldArgs a) {
    constexpr int E = WIDTH<T>;
    SHARED(uint32_t, of_warps, 32 * PART_WORDS);
    SHARED(uint32_t, of_blocks, 8 * PART_WORDS);
    const int row = int(block()) / a.cluster, rank = int(block()) % a.cluster;
    const int64_t label = a.labels[row];
    if (label < 0) {
        ignore(a, row, rank);
        return;
    }
    if (a.cluster > 1) cluster_started();
    const T* x = static_cast<const T*>(a.tile) + int64_t(row) * a.stride;
    const bool hit = a.col0 <= label && label < a.col0 + a.columns;
    const int y = hit ? int(label - a.col0) : -1;
    const float raw_label = hit ? read(x + y) : NAN;
    const float outer = a.affine.outer;

    // A thread holds vectors that are `step` columns apart, so that a warp's accesses are adjacent.
    const int step = a.cluster * threads() * E;
    const int first = (rank * threads() + thread()) * E;
    Part p{-INF, 0.f, 0.f, 0.f, 0.f, NO_COLUMN};
    float z[N];
    for (int start = first; start - first < a.columns; start += N / E * step) {
        read_logits<N>(x, start, step, a.columns, a.aligned, z);
        float high = -INF;
        int left = a.columns - start;
        UNROLL for (int i = 0; i < N / E; ++i, left -= step) {
            UNROLL for (int k = i * E; k < i * E + E; ++k) {
                const bool there = k - i * E < left;
                float v = CAP ? hyperbolic_tangent(z[k] * a.affine.inner) : z[k] * outer;
                if (EXTRAS && there) p.total += v;
                z[k] = there ? v : -INF;
                high = fmaxf(high, z[k]);
            }
        }
        const float top = warp_max(high);
        high = CAP ? top * outer : top;
        if (EXTRAS && high > p.max) {
            p.argmax = NO_COLUMN;
            int column = start + (N / E - 1) * step;
            UNROLL for (int i = N / E - 1; i >= 0; --i, column -= step)
                UNROLL for (int j = E - 1; j >= 0; --j)
                    if (z[i * E + j] == top) p.argmax = column + j;
        }
        const float base = base_of(fmaxf(p.max, high));
        const float shift = p.max - base, rescale = exponential(shift);
        if (EXTRAS) {
            p.weighted = rescale > 0 ? rescale * (p.weighted + p.sum * shift) : 0.f;
            p.squared *= rescale * rescale;
        }
        p.max = fmaxf(p.max, high);
        p.sum *= rescale;
        UNROLL for (int k = 0; k < N; ++k) {
            float d = (CAP ? z[k] * outer : z[k]) - base, e = exponential(d);
            p.sum += e;
            if (EXTRAS) {
                p.weighted += e * fmaxf(d, -200.f);  // a logit of -inf adds 0, not 0 * -inf
                p.squared += e * e;
            }
            z[k] = CAP ? e * flatness(z[k]) : e;
            keep(z[k]);  // a delayed product would keep two factors in registers
        }
    }

    const float mine = p.max;  // the base of the exponentials in z
    p.sum = warp_sum(p.sum);
    if (EXTRAS) {
        p.weighted = warp_sum(p.weighted);
        p.squared = warp_sum(p.squared);
        p.total = warp_sum(CAP ? p.total * outer : p.total);
        p.argmax = warp_min(p.argmax);
    }
    if (lane() == 0) write_part<EXTRAS>(of_warps + thread() / 32 * PART_WORDS, -1, p);
    if (a.cluster > 1) cluster_wait();
    sync();
    if (thread() < 32) {
        p = combined<EXTRAS>(read_part<EXTRAS>(of_warps + lane() * PART_WORDS, lane() < threads() / 32));
        uint32_t* there = of_blocks + rank * PART_WORDS;
        if (a.cluster == 1 && lane() == 0) write_part<EXTRAS>(there, -1, p);
        if (a.cluster > 1 && lane() < a.cluster) write_part<EXTRAS>(there, lane(), p);
    }
    if (a.cluster > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        sync();
    }
    const float tanh_label = CAP ? hyperbolic_tangent(raw_label * a.affine.inner) : raw_label;
    const bool there = lane() < a.cluster;
    p = combined<EXTRAS>(read_part<EXTRAS>(of_blocks + (there ? lane() : 0) * PART_WORDS, there));
    const auto [lse, logp] = finish(a, row, p, tanh_label * outer, rank == 0 && thread() == 0);
    if (!a.out) return;

    // If all logits of a warp are -inf, it has no base, and its exponentials are 0.
    const float gain = mine == -INF ? 0.f : -a.affine.slope * exponential(mine - lse);
    // The label's entry comes from its log-prob: a difference of probabilities would lose its digits.
    float at_label = a.affine.slope * -expm1f(logp);
    if (CAP) at_label *= flatness(tanh_label);
    void* out = row_of(a.out, a.out_dtype, row, a.out_stride);
    int column = first;
    UNROLL for (int i = 0; i < N / E; ++i, column += step) {
        if (column >= a.columns) break;
        float d[E];
        UNROLL for (int j = 0; j < E; ++j) d[j] = z[i * E + j] * gain;
        if (column <= y && y < column + E)
            UNROLL for (int j = 0; j < E; ++j) d[j] = column + j == y ? at_label : d[j];
        write_gradients<E>(out, a.out_dtype, column, a.columns - column, a.out_aligned, d);
    }
}

// The instances for logits of one type. Both leave room for two blocks of 256 threads on each
// multiprocessor, so that one reads while the other one computes, or for one block of 512. `deep` has
// as many logits to a thread as the registers hold: Qwen's vocabularies are just too long for the
// other, and Gemma's for its blocks of 512.
using FoldKernel = void (*)(FoldArgs);
template <class T> FoldKernel fold_kernel_of(bool cap, bool extras, bool deep);

constexpr int PAIRED_THREADS = 256, MOST_THREADS = 512, LOGITS = 64;
constexpr int deep_logits(int size, bool cap) { return size == 4 ? (cap ? 68 : 76) : (cap ? 72 : 80); }

template <class T, bool CAP, bool EXTRAS> FoldKernel pick(bool deep) {
    constexpr int DEEP = deep_logits(sizeof(T), CAP);
    return deep ? fold_kernel<T, CAP, EXTRAS, DEEP, MOST_THREADS, 1>
                : fold_kernel<T, CAP, EXTRAS, LOGITS, MOST_THREADS, 1>;
}

#define FASTPREF_FOLD_KERNELS(T)                                                                     \
    template <> FoldKernel fold_kernel_of<T>(bool cap, bool extras, bool deep) {                     \
        return cap ? (extras ? pick<T, true, true>(deep) : pick<T, true, false>(deep))               \
                   : (extras ? pick<T, false, true>(deep) : pick<T, false, false>(deep));            \
    }

}  // namespace fastpref::cuda
