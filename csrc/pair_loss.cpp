// pair_loss: token log-probs to the loss, the rewards and d loss / d logp. Sums run in double and in
// token order: exact to fp32 and the same on every run.
#include <cmath>
#include <vector>

#include "tile.h"

namespace fastpref {
namespace {

double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }
double sigmoid(double x) {
    double e = std::exp(-std::fabs(x));
    return x < 0 ? e / (1 + e) : 1 / (1 + e);
}

}  // namespace

void pair_loss(const PairLoss& in, const PairLossOut& out) {
    int64_t pairs = in.pairs;
    std::vector<double> sum(2 * pairs, 0.0), slopes(2 * pairs, 0.0);
    for (int64_t t = 0; t < in.tokens; ++t) sum[in.sequence_ids[t]] += in.logps[t];
    for (int64_t s = 0; s < 2 * pairs; ++s) {
        out.sequence_logps[s] = float(sum[s]);
        // The sums as their fp32 values: policy and reference then cancel to exactly 0 at step 0.
        sum[s] = double(out.sequence_logps[s]) - (in.ref_logps ? in.ref_logps[s] : 0.f);
        out.rewards[s] = float(in.beta * sum[s]);
    }
    double loss = 0;
    for (int64_t p = 0; p < pairs; ++p) {
        double w = (in.weight ? in.weight[p] : 1.0) / double(pairs), value, slope;
        double chosen = 1, rejected = 1;  // d(score) / d(sum), without the sign
        if (in.lengths) {
            chosen = 1.0 / (in.lengths[p] < 1 ? 1.0 : in.lengths[p]);
            rejected = 1.0 / (in.lengths[pairs + p] < 1 ? 1.0 : in.lengths[pairs + p]);
        }
        double d = chosen * sum[p] - rejected * sum[pairs + p];
        if (in.loss == Loss::sigmoid) {
            double x = in.beta * d - (in.margin ? in.margin[p] : 0.0), e = in.label_smoothing;
            value = -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x);
            slope = in.beta * (e * sigmoid(x) - (1 - e) * sigmoid(-x));
        } else {
            double x = d - 1 / (2 * in.beta);
            value = x * x;
            slope = 2 * x;
        }
        loss += w * value;
        slopes[p] = w * slope * chosen;
        slopes[pairs + p] = -w * slope * rejected;
    }
    *out.loss = float(loss);
    for (int64_t t = 0; t < in.tokens; ++t) out.dlogp[t] = float(slopes[in.sequence_ids[t]]);
}

}  // namespace fastpref
