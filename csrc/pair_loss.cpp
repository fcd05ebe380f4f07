// pair_loss: token log-probs to the loss, the rewards and d loss / d logp. Sums run in double and in
// token order: exact to fp32 and the same on every run.
#include "pair_forms.h"

#include <limits>
#include <vector>

namespace fastpref {

void pair_loss(const PairLoss& in, const PairLossOut& out) {
    const int64_t pairs = in.pairs, sequences = 2 * pairs;
    std::vector<double> sum(size_t(sequences), 0.0);
    std::vector<float> slopes(static_cast<size_t>(sequences));
    auto known = [&](int64_t id) { return 0 <= id && id < sequences; };
    for (int64_t t = 0; t < in.tokens; ++t)
        if (known(in.sequence_ids[t])) sum[size_t(in.sequence_ids[t])] += in.logps[t];
    for (int64_t s = 0; s < sequences; ++s) {
        out.sequence_logps[s] = float(sum[size_t(s)]);
        // The sums as their fp32 values: policy and reference then cancel to exactly 0 at step 0.
        sum[size_t(s)] = double(out.sequence_logps[s]) - (in.ref_logps ? in.ref_logps[s] : 0.f);
    }
    double loss = 0;
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t j = pairs + i;
        Pair pair{sum[size_t(i)], sum[size_t(j)],     1,         1,       in.margin ? in.margin[i] : 0.0,
                  in.beta,        in.label_smoothing, in.option, in.shape};
        if (in.lengths) {
            pair.w_tokens = in.lengths[i] < 1 ? 1.0 : in.lengths[i];
            pair.l_tokens = in.lengths[j] < 1 ? 1.0 : in.lengths[j];
        }
        const PairValue v = pair_value(in.form, pair);
        const double share = (in.weight ? in.weight[i] : 1.0) / double(pairs);
        loss += share * v.loss;
        slopes[size_t(i)] = float(share * v.w_slope);
        slopes[size_t(j)] = float(share * v.l_slope);
        out.rewards[i] = float(in.beta * v.w_reward);
        out.rewards[j] = float(in.beta * v.l_reward);
    }
    *out.loss = float(loss);
    for (int64_t t = 0; t < in.tokens; ++t) {
        const int64_t id = in.sequence_ids[t];
        out.dlogp[t] = known(id) ? slopes[size_t(id)] : std::numeric_limits<float>::quiet_NaN();
    }
}

}  // namespace fastpref
