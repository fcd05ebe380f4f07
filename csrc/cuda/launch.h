// The CUDA module: what csrc/cuda/bind.cpp calls. Vectors are float32, labels int64, all on `device`;
// launches are on `stream` and return at once.
#pragma once
#include <cstdint>

#include "tile.h"

namespace fastpref::cuda {

// z = outer tanh(inner raw), or outer raw where inner is 0. slope: dz/draw, without the tanh's derivative.
struct Affine {
    float inner, outer, slope;
};

struct Where {
    int device;
    uintptr_t stream;
    int clusters;  // the most thread blocks that can share a row: 8, or 1 where there are no clusters
};

// Fold and, with `out`, write D as well. exact: the labels' exact logits [rows], which replace the tile's
// in the label's log-prob and in the normaliser (Stats.replace_target); or null.
void fold(const Tile& tile, const Transform& transform, const Stats& stats, const float* exact, void* out,
          Dtype out_dtype, int64_t out_stride, const Where& where);

void grad(const Tile& tile, const Transform& transform, const GradRows& rows, void* out, Dtype out_dtype,
          int64_t out_stride, const Where& where);

struct PairArgs {
    PairForm form;
    int64_t tokens, pairs;
    const float* logps;             // [tokens]
    const int64_t* sequence_ids;    // [tokens]
    const float *ref_logps, *lengths;  // [2 * pairs], or null
    const float *weight, *margin;   // [pairs], or null
    double beta, label_smoothing;
    double option, shape;           // discopop's tau; simpo_gamma and alpha
    float *loss, *sequence_logps, *rewards, *dlogp;  // as PairLossOut
    int64_t* starts;                // scratch [2 * pairs + 1]
    float* slopes;                  // scratch [2 * pairs]
};
void pair_loss(const PairArgs& args, const Where& where);

// The logit-free product, on sm_90. Rows of x, weight and d start at multiples of 16 bytes; tiles is
// vocab / FORWARD_TILE, rounded up.
constexpr int FORWARD_TILE = 128;
struct ForwardCall {
    const void* x;       // [tokens, hidden]
    const void* weight;  // [vocab, hidden]
    Dtype dtype;         // of both: bf16 or f16
    int64_t tokens, vocab, hidden, x_stride, weight_stride;
    Transform transform;
    const int64_t* labels;  // [tokens]
    // [tiles * FORWARD_TILE], or null where vocab is a whole number of tiles. From vocab on it holds -inf,
    // or +inf where the scale is negative.
    const float* bias;
    float* partial;  // scratch [(2 * tiles + 2) * tokens]; with extras (6 * tiles + 2) * tokens
    Stats stats;  // lse and logps; with extras sum, and of the others those that are not null
    void* d;  // [tokens, vocab] bf16, or null; D = row_scale d, row by row
    int64_t d_stride;
    float* row_scale;  // [tokens], with d
};
void forward(const ForwardCall& call, const Where& where);
bool forward_works(int device);

// Whether the kernels can run on a device: null, or the runtime's words; and for which
// architecture they were compiled (90 for sm_90), which says whether they know clusters.
struct Ready {
    const char* error;
    const char* message;
    int architecture, runtime, driver;
};
Ready ready(int device);

}  // namespace fastpref::cuda
