// pair_loss: token log-probs to the loss, the rewards and d loss / d logp, in one launch of one thread
// block, as a launch costs more than the work. Sums run in double and in one order.
#include "device.h"
#include "launch.h"
#include "pair_forms.h"

namespace fastpref::cuda {
namespace {

constexpr int THREADS = 512;

// Whether any thread of the block says so.
DEVICE bool any(bool mine, int* of_warps) {
    int found = mine;
    UNROLL for (int mask = 16; mask; mask >>= 1) found |= shuffle_xor(found, mask);
    if (lane() == 0) of_warps[thread() / 32] = found;
    sync();
    found = 0;
    for (int i = 0; i < threads() / 32; ++i) found |= of_warps[i];
    return found != 0;
}

// Where the tokens of each sequence start; whether they are not in order, and there is no such place.
DEVICE bool find_starts(const PairArgs& a) {
    const int64_t sequences = 2 * a.pairs;
    bool unsorted = false;
    for (int64_t t = thread(); t < a.tokens; t += threads()) {
        const int64_t before = t ? a.sequence_ids[t - 1] : -1, id = a.sequence_ids[t];
        if (before < (t ? 0 : -1) || id < before || id >= sequences) {
            unsorted = true;
            continue;
        }
        for (int64_t s = before + 1; s <= id; ++s) a.starts[s] = t;
        if (t == a.tokens - 1)
            for (int64_t s = id + 1; s <= sequences; ++s) a.starts[s] = a.tokens;
    }
    if (a.tokens == 0)
        for (int64_t s = thread(); s <= sequences; s += threads()) a.starts[s] = 0;
    return unsorted;
}

// A token whose id is not in [0, 2P) counts nowhere and has a dlogp of NaN.
KERNEL(THREADS, 1) pair_loss_kernel(const PairArgs a) {
    SHARED(int, flags, THREADS / 32);
    SHARED(double, totals, THREADS / 32);
    const int64_t sequences = 2 * a.pairs;
    const bool unsorted = any(find_starts(a), flags);  // and a barrier: what it wrote is there
    for (int64_t s = thread() / 32; s < sequences; s += threads() / 32) {
        const int64_t from = unsorted ? 0 : a.starts[s], to = unsorted ? a.tokens : a.starts[s + 1];
        double sum = 0;
        for (int64_t t = from + lane(); t < to; t += 32)
            if (!unsorted || a.sequence_ids[t] == s) sum += a.logps[t];
        sum = warp_sum(sum);
        if (lane() == 0) a.sequence_logps[s] = float(sum);
    }
    sync();

    double total = 0;
    const double share = 1.0 / double(a.pairs < 1 ? 1 : a.pairs);
    for (int64_t i = thread(); i < a.pairs; i += threads()) {
        const int64_t j = a.pairs + i;
        // The sums as their float32 values: policy and reference cancel to exactly 0 at step 0.
        Pair p{a.sequence_logps[i], a.sequence_logps[j], 1, 1, a.margin ? a.margin[i] : 0.0,
               a.beta, a.label_smoothing, a.option, a.shape};
        if (a.ref_logps) p.w -= a.ref_logps[i], p.l -= a.ref_logps[j];
        if (a.lengths) {
            p.w_tokens = a.lengths[i] < 1 ? 1.0 : a.lengths[i];
            p.l_tokens = a.lengths[j] < 1 ? 1.0 : a.lengths[j];
        }
        const PairValue v = pair_value(a.form, p);
        const double factor = share * (a.weight ? a.weight[i] : 1.0);
        total += factor * v.loss;
        a.slopes[i] = float(factor * v.w_slope);
        a.slopes[j] = float(factor * v.l_slope);
        a.rewards[i] = float(a.beta * v.w_reward);
        a.rewards[j] = float(a.beta * v.l_reward);
    }
    total = warp_sum(total);
    if (lane() == 0) totals[thread() / 32] = total;
    sync();
    if (thread() == 0) {
        total = 0;
        for (int i = 0; i < threads() / 32; ++i) total += totals[i];
        *a.loss = float(total);
    }
    for (int64_t t = thread(); t < a.tokens; t += threads()) {
        const int64_t id = a.sequence_ids[t];
        a.dlogp[t] = 0 <= id && id < sequences ? a.slopes[id] : NAN;
    }
}

}  // namespace

void pair_loss(const PairArgs& args, const Where& where) {
    launch("pair_loss", pair_loss_kernel, args, 1, THREADS, 1, where.device, where.stream);
}

}  // namespace fastpref::cuda
