// The losses of a pair with a closed form: one function each, from the pair to its value and its two
// slopes. The formulas, papers and names are in fastpref/losses/formulas.py.
//
// CPUs and GPUs share them: csrc/cuda/device.h, which the kernel includes first, defines DEVICE and
// DEVICE_CALL for GPUs.
#pragma once
#include <cmath>

#include "tile.h"

#ifndef DEVICE
#define DEVICE static inline
#define DEVICE_CALL static inline
#endif

namespace fastpref {

// w, l: log-ratios, or log-probs without a reference, of the chosen and the rejected answer, and
// how many tokens these have (1 where the loss does not ask).
struct Pair {
    double w, l, w_tokens, l_tokens, margin;
    double beta, smoothing, option, shape;
};
// In w and l. The rewards are beta times these.
struct PairValue {
    double loss, w_slope, l_slope, w_reward, l_reward;
};
struct Slope {
    double value, slope;
};

constexpr double LARGEST_EXPONENT = 80;  // as in fastpref/losses/pairs.py

DEVICE_CALL double sigmoid(double x) {
    double e = exp(-fabs(x));
    return (x < 0 ? e : 1.0) / (1 + e);
}
DEVICE_CALL double log_sigmoid(double x) { return (x < 0 ? x : 0.0) - log1p(exp(-fabs(x))); }
DEVICE double bump(double x) { return sigmoid(x) * sigmoid(-x); }  // the derivative of sigmoid

// -(1-e) log sigmoid(x) - e log sigmoid(-x)
DEVICE_CALL Slope logistic(double x, double e) {
    return {-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x), e * sigmoid(x) - (1 - e) * sigmoid(-x)};
}

DEVICE PairValue of_advantage(const Pair& p, Slope f) {
    return {f.value, p.beta * f.slope, -p.beta * f.slope, p.w, p.l};
}
DEVICE double advantage(const Pair& p) { return p.beta * (p.w - p.l) - p.margin; }

DEVICE PairValue sigmoid_loss(const Pair& p) {
    return of_advantage(p, logistic(advantage(p), p.smoothing));
}
DEVICE PairValue of_means(const Pair& p, double margin) {
    Slope f = logistic(p.beta * (p.w / p.w_tokens - p.l / p.l_tokens) - margin, p.smoothing);
    return {f.value, p.beta * f.slope / p.w_tokens, -p.beta * f.slope / p.l_tokens, p.w, p.l};
}
DEVICE PairValue ipo_loss(const Pair& p) {
    double x = p.w / p.w_tokens - p.l / p.l_tokens - 1 / (2 * p.beta);
    return {x * x, 2 * x / p.w_tokens, -2 * x / p.l_tokens, p.w, p.l};
}
DEVICE PairValue hinge_loss(const Pair& p) {
    double gap = 1 - advantage(p);  // NaN stays NaN
    return of_advantage(p, {gap < 0 ? 0.0 : gap, gap > 0 ? -1.0 : gap * 0});
}
DEVICE PairValue exo_pair_loss(const Pair& p) {
    double x = advantage(p), e = p.smoothing, right = log1p(-e), flipped = log(e);
    double value = sigmoid(x) * (log_sigmoid(x) - right) + sigmoid(-x) * (log_sigmoid(-x) - flipped);
    return of_advantage(p, {value, bump(x) * (x - right + flipped)});
}
DEVICE PairValue robust_loss(const Pair& p) {
    double x = advantage(p), e = p.smoothing, scale = 1 / (1 - 2 * e);
    return of_advantage(p, {scale * (e * log_sigmoid(-x) - (1 - e) * log_sigmoid(x)),
                            -scale * ((1 - e) * sigmoid(-x) + e * sigmoid(x))});
}
DEVICE PairValue nca_pair_loss(const Pair& p) {
    double w = p.beta * p.w, l = p.beta * p.l;
    return {-log_sigmoid(w) - (log_sigmoid(-w) + log_sigmoid(-l)) / 2,
            p.beta * (sigmoid(w) / 2 - sigmoid(-w)), p.beta * sigmoid(l) / 2, p.w, p.l};
}
DEVICE PairValue bco_pair_loss(const Pair& p) {
    double w = p.beta * p.w, l = p.beta * p.l;
    return {-log_sigmoid(w) - log_sigmoid(-l), -p.beta * sigmoid(-w), p.beta * sigmoid(l), p.w, p.l};
}
DEVICE PairValue sppo_hard_loss(const Pair& p) {
    double half = 1 / (2 * p.beta), w = p.w - half, l = p.l + half;
    return {w * w + l * l, 2 * w, 2 * l, p.w, p.l};
}
DEVICE PairValue apo_zero_loss(const Pair& p) {
    double w = p.beta * p.w, l = p.beta * p.l;
    return {sigmoid(-w) + sigmoid(l), -p.beta * bump(w), p.beta * bump(l), p.w, p.l};
}
DEVICE PairValue apo_down_loss(const Pair& p) {
    double w = p.beta * p.w, d = p.beta * (p.w - p.l), slope = p.beta * bump(d);
    return {sigmoid(w) + sigmoid(-d), p.beta * bump(w) - slope, slope, p.w, p.l};
}
DEVICE PairValue discopop_loss(const Pair& p) {
    double x = advantage(p), tau = p.option, other = sigmoid(-x / tau);
    double exponent = log_sigmoid(x / tau) - x, log_x = log_sigmoid(x);
    bool capped = exponent > LARGEST_EXPONENT;
    double power = exp(capped ? LARGEST_EXPONENT : exponent);
    double slope = bump(x / tau) / tau * log_x - other * sigmoid(-x);
    return of_advantage(p, {power - other * log_x, slope + (capped ? 0.0 : power * (other / tau - 1))});
}
DEVICE PairValue simpo_loss(const Pair& p) {
    PairValue v = of_means(p, p.option + p.margin);
    v.w_reward = p.w / p.w_tokens;
    v.l_reward = p.l / p.l_tokens;
    return v;
}
// (1 - exp(-alpha a)) / alpha of a mean log-prob a
DEVICE_CALL Slope alpha_reward(double mean, double alpha) {
    double exponent = -alpha * mean;
    bool capped = exponent > LARGEST_EXPONENT;
    exponent = capped ? LARGEST_EXPONENT : exponent;
    return {-expm1(exponent) / alpha, capped ? 0.0 : exp(exponent)};
}
DEVICE PairValue alphapo_loss(const Pair& p) {
    Slope w = alpha_reward(p.w / p.w_tokens, p.shape), l = alpha_reward(p.l / p.l_tokens, p.shape);
    Slope f = logistic(p.beta * (w.value - l.value) - p.option - p.margin, p.smoothing);
    return {f.value, p.beta * f.slope * w.slope / p.w_tokens, -p.beta * f.slope * l.slope / p.l_tokens,
            w.value, l.value};
}
// a - log(1 - exp(a)), finite at 0
DEVICE_CALL Slope log_odds(double mean) {
    const double last = -1.1920928955078125e-07;
    bool capped = mean > last;
    mean = capped ? last : mean;
    return {mean - log(-expm1(mean)), capped ? 0.0 : -1 / expm1(mean)};
}
DEVICE PairValue orpo_loss(const Pair& p) {
    double w_mean = p.w / p.w_tokens, l_mean = p.l / p.l_tokens;
    Slope w = log_odds(w_mean), l = log_odds(l_mean), f = logistic(w.value - l.value, 0);
    return {p.beta * f.value, p.beta * f.slope * w.slope / p.w_tokens,
            -p.beta * f.slope * l.slope / p.l_tokens, w_mean, l_mean};
}

DEVICE PairValue pair_value(PairForm form, const Pair& p) {
    switch (form) {
        case PairForm::sigmoid_norm: return of_means(p, p.margin);
        case PairForm::ipo: return ipo_loss(p);
        case PairForm::hinge: return hinge_loss(p);
        case PairForm::exo_pair: return exo_pair_loss(p);
        case PairForm::robust: return robust_loss(p);
        case PairForm::nca_pair: return nca_pair_loss(p);
        case PairForm::bco_pair: return bco_pair_loss(p);
        case PairForm::sppo_hard: return sppo_hard_loss(p);
        case PairForm::apo_zero: return apo_zero_loss(p);
        case PairForm::apo_down: return apo_down_loss(p);
        case PairForm::discopop: return discopop_loss(p);
        case PairForm::simpo: return simpo_loss(p);
        case PairForm::alphapo: return alphapo_loss(p);
        case PairForm::orpo: return orpo_loss(p);
        default: return sigmoid_loss(p);  // cpo is DPO without a reference
    }
}

}  // namespace fastpref
