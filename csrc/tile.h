// The tile contract: what a native backend implements. Nothing here knows about torch.
#pragma once
#include <cstdint>

namespace fastpref {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Raw logits [rows, cols], row-major: the vocabulary entries [col0, col0 + cols) of some tokens.
// labels[row] is a vocabulary entry; a negative label marks an ignored row.
struct Tile {
    const void* data;
    Dtype dtype;
    int64_t rows, cols, stride;  // stride: elements from one row to the next
    int64_t col0;
    const int64_t* labels;
};

// z = softcap * tanh(scale * raw / softcap) * inv_temperature; softcap 0 leaves tanh out.
struct Transform {
    float scale, softcap, inv_temperature;
};

// Running statistics of each row; see fastpref/backends/stats.py. The last four are null where not
// asked for. The tile with col0 = 0 starts them, whatever they held; the others continue them.
struct Stats {
    float *max, *sum, *target, *lse, *logps, *weighted, *total, *squared;
    int64_t* argmax;
};

// Per-row inputs of grad, [rows] each. dlogp may be null, and so may entropy and dentropy together.
struct GradRows {
    const float *lse, *logps, *dlogp, *entropy, *dentropy;
};

void fold(const Tile& tile, const Transform& transform, const Stats& stats, int threads);

// out [rows, cols] = dlogp d logp / d raw + dentropy d entropy / d raw. out may lie in the tile's memory,
// with the same row starts in bytes and elements no wider than the tile's.
void grad(const Tile& tile, const Transform& transform, const GradRows& rows, void* out, Dtype out_dtype,
          int64_t out_stride, int threads);

const char* isa();  // which clone the processor runs
bool is_amd();      // whose processors torch's library serves badly

// The losses with a closed form, by their place in the binding's list of names.
// clang-format off
enum class PairForm : int {
    sigmoid, sigmoid_norm, ipo, hinge, exo_pair, robust, nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down, discopop, cpo, simpo, alphapo, orpo
};
constexpr const char* PAIR_FORMS[] = {
    "sigmoid", "sigmoid_norm", "ipo", "hinge", "exo_pair", "robust", "nca_pair", "bco_pair",
    "sppo_hard", "apo_zero", "apo_down", "discopop", "cpo", "simpo", "alphapo", "orpo"};
// clang-format on

// Token log-probs to loss, in one call. Sequences 0..pairs-1 are chosen, pairs..2*pairs-1 rejected.
struct PairLoss {
    PairForm form;
    int64_t tokens, pairs;
    const float* logps;           // [tokens]
    const int64_t* sequence_ids;  // [tokens]; a token with another id counts nowhere, its dlogp is NaN
    const float* ref_logps;       // [2 * pairs], or null: reference-free
    const float* lengths;         // [2 * pairs] for a mean over tokens, or null: sums
    const float *weight, *margin; // [pairs], or null
    double beta, label_smoothing;
    double option, shape;         // discopop's tau; simpo_gamma and alpha
};
struct PairLossOut {
    float* loss;            // [1] mean over the pairs
    float* sequence_logps;  // [2 * pairs] sums
    float* rewards;         // [2 * pairs] of the answers; beta * (logp - ref) for most losses
    float* dlogp;           // [tokens] d loss / d logps
};
void pair_loss(const PairLoss& in, const PairLossOut& out);

}  // namespace fastpref
