// fold and grad: one pass over the rows of a tile of logits. Each row is the work of one thread, in
// one order, so results do not depend on the number of threads.
#include <cmath>
#include <limits>
#include <type_traits>

#include "clones.h"
#include "parallel.h"
#include "row.h"
#include "stream.h"
#include "tile.h"

namespace fastpref {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t PART = 1024;  // entries of a gradient that stay in the first cache

// Sums relative to another maximum.
template <bool EXTRAS> FP_INLINE void move(Sums& s, float from, float to) {
    if (from == to) return;
    const double shift = double(from) - to, moved = std::exp(shift);
    if (EXTRAS) {
        s.weighted = moved * (s.weighted + s.e * shift);
        s.squared *= moved * moved;
    }
    s.e *= moved;
}

struct Folded {
    float max = -INF;
    int64_t block = 0;  // where the block with the first of the maxima begins
    Sums sums;  // relative to max, or to 0 where that is -inf
};

// A row leaves the memory once: the second look at a block finds it in the first cache, and fetches the next.
template <class T, bool CAP, bool EXTRAS>
FP_INLINE Folded fold_row(const Affine& a, const T* x, int64_t cols) {
    Folded f;
    for (int64_t block = 0; block < cols; block += BLOCK) {
        const int64_t size = cols - block < BLOCK ? cols - block : BLOCK;
        const float max = row_max<T, CAP>(a, x + block, size);
        if (max > f.max) {
            if (f.sums.e != 0) move<EXTRAS>(f.sums, f.max, max);
            f.max = max, f.block = block;
        }
        const Sums s = row_sums<T, CAP, EXTRAS>(a, x + block, size, f.max == -INF ? 0.f : f.max);
        f.sums.e += s.e;
        if (EXTRAS) {
            f.sums.weighted += s.weighted, f.sums.squared += s.squared;
            f.sums.total += s.total;
        }
    }
    return f;
}

template <class T, bool CAP, bool EXTRAS>
FP_INLINE void fold_rows(const Tile& t, const Affine& a, const Stats& st, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
        if (t.labels[r] < 0) continue;
        const T* x = static_cast<const T*>(t.data) + r * t.stride;
        const bool first = t.col0 == 0;
        float old = first ? -INF : st.max[r];
        const Folded f = fold_row<T, CAP, EXTRAS>(a, x, t.cols);
        if (st.argmax && (first || f.max > old)) {
            int64_t j = f.block;  // the first of equal maxima, as torch.argmax
            while (j < t.cols && !(logit<CAP>(a, load(x + j)) >= f.max)) ++j;
            st.argmax[r] = t.col0 + (j < t.cols ? j : 0);
        }
        const float m = f.max > old ? f.max : old;
        Sums s = f.sums;
        if (s.e != 0) move<EXTRAS>(s, f.max, m);
        if (!first && st.sum[r] != 0) {  // also where it is NaN
            Sums before;
            before.e = st.sum[r];
            if (EXTRAS) before.weighted = st.weighted[r], before.squared = st.squared[r];
            move<EXTRAS>(before, old, m);
            s.e += before.e, s.weighted += before.weighted, s.squared += before.squared;
        }
        if (EXTRAS) {
            st.weighted[r] = float(s.weighted);
            st.squared[r] = float(s.squared);
            st.total[r] = float(first ? s.total : st.total[r] + s.total);
        }
        st.sum[r] = float(s.e);
        st.max[r] = m;
        int64_t y = t.labels[r] - t.col0;
        if (0 <= y && y < t.cols) st.target[r] = logit<CAP>(a, load(x + y));
        else if (first) st.target[r] = std::numeric_limits<float>::quiet_NaN();
        double log_sum = std::log(s.e);
        // target - max is exact where it matters, at saturated rows; target - lse is not. A positive
        // value can only be the rounding of a zero. NaN stays NaN.
        float logp = float((double(st.target[r]) - m) - log_sum);
        st.lse[r] = float(m + log_sum);
        st.logps[r] = logp > 0 ? 0.f : logp;
    }
}

// out may be the tile itself, with entries as wide or narrower: no entry is overwritten before it is read.
template <class T, class O, bool CAP, bool ENTROPY>
FP_INLINE void grad_rows(const Tile& t, const Affine& a, const GradRows& g, void* out, int64_t out_stride,
                         int64_t r0, int64_t r1) {
    const int64_t bytes = t.rows * t.cols * int64_t(sizeof(O));
    const bool past_caches = out != t.data && bytes >= PAST_CACHES;
    for (int64_t r = r0; r < r1; ++r) {
        const T* x = static_cast<const T*>(t.data) + r * t.stride;
        O* o = static_cast<O*>(out) + r * out_stride;
        int64_t y = t.labels[r];
        if (y < 0) {
            for (int64_t j = 0; j < t.cols; ++j) store(o + j, 0.f);
            continue;
        }
        y -= t.col0;
        float lse = g.lse[r], gain = (g.dlogp ? g.dlogp[r] : 1.f) * a.slope;
        float entropy = ENTROPY ? g.entropy[r] : 0.f;
        float entropy_gain = ENTROPY ? g.dentropy[r] * a.slope : 0.f;
        auto entry = [&](float raw, bool label) FP_INLINE_LAMBDA {
            float th = CAP ? tanh_(raw * a.scale * a.inv_cap) : 0.f;
            float z = CAP ? a.cap * th * a.inv_t : raw * a.scale;
            // The label's log-prob is read: its logit in the tile may be the rounded one.
            float logp = label ? g.logps[r] : z - lse, p = exp_(logp);
            float d = gain * (label ? -std::expm1(logp) : -p);
            if (ENTROPY) d -= entropy_gain * p * ((logp < -200.f ? -200.f : logp) + entropy);
            return CAP ? d * (1.f - th * th) : d;
        };
        bool hit = 0 <= y && y < t.cols;
        float at_label = hit ? entry(load(x + y), true) : 0.f;  // before its cell is overwritten
        auto write = [&](O* to, int64_t first, int64_t last) FP_INLINE_LAMBDA {
            int64_t j = first;
            if constexpr (!std::is_same_v<T, float>)  // fewer instructions than to widen as many as fit
                for (; j + LANES <= last; j += LANES) {
                    float raw[LANES];
                    for (int k = 0; k < LANES; ++k) raw[k] = load(x + j + k);
                    for (int k = 0; k < LANES; ++k) raw[k] = entry(raw[k], false);
                    for (int k = 0; k < LANES; ++k) store(to + (j - first) + k, raw[k]);
                }
            FP_IVDEP
            for (; j < last; ++j) store(to + (j - first), entry(load(x + j), false));
        };
        if (past_caches) {
            O part[PART];
            for (int64_t j = 0; j < t.cols; j += PART) {
                const int64_t end = j + PART < t.cols ? j + PART : t.cols;
                write(part, j, end);
                stream(o + j, part, end - j);
            }
            streamed();
        } else {
            write(o, 0, t.cols);
        }
        if (hit) store(o + y, at_label);
    }
}

using FoldRows = void (*)(const Tile&, const Affine&, const Stats&, int64_t, int64_t);
using GradRowsFn = void (*)(const Tile&, const Affine&, const GradRows&, void*, int64_t, int64_t, int64_t);

template <class T, bool CAP, bool EXTRAS> struct Fold {
    FP_INLINE void run(const Tile& t, const Affine& a, const Stats& s, int64_t r0, int64_t r1) {
        fold_rows<T, CAP, EXTRAS>(t, a, s, r0, r1);
    }
};
template <class T, class O, bool CAP, bool ENTROPY> struct Grad {
    FP_INLINE void run(const Tile& t, const Affine& a, const GradRows& g, void* out, int64_t os, int64_t r0,
                       int64_t r1) {
        grad_rows<T, O, CAP, ENTROPY>(t, a, g, out, os, r0, r1);
    }
};

template <class T> FoldRows pick_fold(bool cap, bool extras) {
    if (cap) return extras ? clone_of<Fold<T, true, true>>() : clone_of<Fold<T, true, false>>();
    return extras ? clone_of<Fold<T, false, true>>() : clone_of<Fold<T, false, false>>();
}
template <class T, class O> GradRowsFn pick_grad(bool cap, bool entropy) {
    if (cap) return entropy ? clone_of<Grad<T, O, true, true>>() : clone_of<Grad<T, O, true, false>>();
    return entropy ? clone_of<Grad<T, O, false, true>>() : clone_of<Grad<T, O, false, false>>();
}
template <class T> GradRowsFn pick_grad(Dtype out, bool cap, bool entropy) {
    switch (out) {
        case Dtype::bf16: return pick_grad<T, bf16>(cap, entropy);
        case Dtype::f16: return pick_grad<T, f16>(cap, entropy);
        default: return pick_grad<T, float>(cap, entropy);
    }
}

}  // namespace

void fold(const Tile& t, const Transform& transform, const Stats& stats, int threads) {
    bool cap = transform.softcap > 0, extras = stats.weighted != nullptr;
    FoldRows f = t.dtype == Dtype::bf16  ? pick_fold<bf16>(cap, extras)
                 : t.dtype == Dtype::f16 ? pick_fold<f16>(cap, extras)
                                         : pick_fold<float>(cap, extras);
    Affine a(transform);
    if (t.cols == 0) return;
    parallel_ranges(t.rows, threads, [&](int64_t r0, int64_t r1) { f(t, a, stats, r0, r1); });
}

void grad(const Tile& t, const Transform& transform, const GradRows& rows, void* out, Dtype out_dtype,
          int64_t out_stride, int threads) {
    bool cap = transform.softcap > 0, entropy = rows.dentropy != nullptr;
    // The gradient of a 16-bit tile is in the same dtype or in fp32.
    GradRowsFn f = t.dtype == Dtype::f32 ? pick_grad<float>(out_dtype, cap, entropy)
                   : t.dtype == Dtype::bf16
                       ? (out_dtype == Dtype::bf16 ? pick_grad<bf16, bf16>(cap, entropy)
                                                   : pick_grad<bf16, float>(cap, entropy))
                       : (out_dtype == Dtype::f16 ? pick_grad<f16, f16>(cap, entropy)
                                                  : pick_grad<f16, float>(cap, entropy));
    Affine a(transform);
    parallel_ranges(t.rows, threads,
                    [&](int64_t r0, int64_t r1) { f(t, a, rows, out, out_stride, r0, r1); });
}

const char* isa() {
    switch (processor_isa()) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "baseline";
    }
}

bool is_amd() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

}  // namespace fastpref
