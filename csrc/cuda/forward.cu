// The forward pass without logits for Hopper GPUs (sm_90a): x W^T, and of each row max and sum of
// exponentials, in one kernel.
//
// Persistent clusters of two thread blocks take the tiles in turn. The two share 128 entries of the
// vocabulary, of which each loads half for both, and have 128 tokens each. In a block one warp copies
// tiles of 64 hidden columns into a ring in shared memory, and two warpgroups take the output tiles by
// turns: while one reduces its tile in registers, the other one multiplies. Nothing but (max, sum) of
// a token and a tile, and the label's logit, goes to memory; `combine` then folds those in the
// vocabulary's order. A token's result depends on no other token, nor on how many there are.
#include <algorithm>

#include "hopper.h"
#include "launch.h"

namespace fastpref::cuda {
namespace {

#ifdef FASTPREF_EMULATE
constexpr int STAGES = 3;
#else
constexpr int STAGES = 6;
#endif
constexpr int ROWS = 128, COLUMNS = FORWARD_TILE, DEPTH = 64;
constexpr int TILE_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = 2 * TILE_BYTES;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + 1024;  // the tiles start at a multiple of 1024
constexpr int WARPGROUP = 128, THREADS = 3 * WARPGROUP;
constexpr float LN2 = 0.6931471805599453f;

struct KernelArgs {
    TensorMap x, weight;
    const int64_t* labels;
    const float* bias;
    float* partial;  // max and sum [tiles, tokens] each, in units of log2, then the labels' logits [tokens]
    int tokens, vocab, depths, tiles, pairs, group;
    bool negative;
    float c, k;
};

// The logit in units of log2, less base. Monotonic in raw; it falls if c or k is negative.
template <bool CAP> DEVICE float exponent(float raw, float c, float k, float base) {
    if (CAP) return fmaf(reciprocal(1.f + exp2_(raw * k)), -2.f * c, c - base);
    return fmaf(raw, c, -base);
}
DEVICE float finite_base(float max) { return max == -INF ? 0.f : max; }  // -inf - -inf is no number

#if defined(FASTPREF_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
struct Place {
    int pair, tile;
};
// Groups of token blocks, which stay in the L2 cache while the weight streams by.
DEVICE Place place(const KernelArgs& a, int item) {
    const int width = a.group * a.tiles, first = item / width * a.group, within = item % width;
    const int left = a.pairs - first, size = left < a.group ? left : a.group;
    return {first + within % size, within / size};
}

// Where in the ring the next tiles are.
struct Turn {
    int stage;
    uint32_t parity;
    DEVICE explicit Turn(int at) : stage(at % STAGES), parity(at / STAGES & 1) {}
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

struct Ring {
    unsigned char* tiles;
    uint64_t *full, *empty;
    uint64_t* turns;  // [2] of each warpgroup, to take the next tiles from the ring
    DEVICE unsigned char* x(int stage) const { return tiles + stage * STAGE_BYTES; }
    DEVICE unsigned char* weight(int stage) const { return x(stage) + TILE_BYTES; }
};

DEVICE Ring make_ring() {
    DYNAMIC_SHARED(memory, SHARED_BYTES);
    SHARED(uint64_t, full, STAGES);
    SHARED(uint64_t, empty, STAGES);
    SHARED(uint64_t, turns, 2);
    return {from_multiple_of_1024(memory), full, empty, turns};
}

// By one thread.
DEVICE void copy_tiles(const KernelArgs& a, const Ring& ring, int cluster, int clusters, int rank) {
    Turn turn(0);
    for (int item = cluster; item < a.pairs * a.tiles; item += clusters) {
        const Place p = place(a, item);
        const int row = (2 * p.pair + rank) * ROWS, column = p.tile * COLUMNS + rank * COLUMNS / 2;
        for (int depth = 0; depth < a.depths; ++depth, turn.next()) {
            barrier_wait(ring.empty + turn.stage, turn.parity ^ 1);
            uint64_t* full = ring.full + turn.stage;
            barrier_expect(full, STAGE_BYTES);
            copy_box(a.x, ring.x(turn.stage), full, depth * DEPTH, row, false);
            copy_box(a.weight, ring.weight(turn.stage) + rank * TILE_BYTES / 2, full, depth * DEPTH, column, true);
        }
    }
}

DEVICE void release(const Ring& ring, int stage) {
    if (lane() != 0) return;
    barrier_arrive(ring.empty + stage, 0);  // both blocks write to it
    barrier_arrive(ring.empty + stage, 1);
}

// done: the other group's turn, which comes once this one has waited for its last tiles. Waiting for
// a stage before its last tiles were there, that one could not tell those from its own.
template <class T>
DEVICE void product(const Ring& ring, Turn turn, int depths, uint64_t* done, float (&acc)[2][64]) {
    int before = 0;
    for (int depth = 0; depth < depths; ++depth) {
        barrier_wait(ring.full + turn.stage, turn.parity);
        results(acc[0]);
        results(acc[1]);
        products_begin();
        UNROLL for (int k = 0; k < DEPTH / 16; ++k)
            UNROLL for (int half = 0; half < 2; ++half)
                multiply<T>(acc[half], operand(ring.x(turn.stage) + half * TILE_BYTES / 2, k),
                            operand(ring.weight(turn.stage), k), depth > 0 || k > 0);
        products_end();
        products_wait<1>();  // those of the step before, whose tiles may go
        if (depth > 0) release(ring, before);
        before = turn.stage;
        turn.next();
    }
    if (lane() == 0) barrier_arrive(done);
    products_wait<0>();
    release(ring, before);
    results(acc[0]);
    results(acc[1]);
}

// Max, sum and perhaps the label's logit of one row, of which four lanes hold 32 entries each:
// acc[4 i + j] and the next one, at columns 8 i and 8 i + 1 from `first` on.
template <bool CAP>
DEVICE void reduce_row(const KernelArgs& a, const Place& p, int row, int first, const float (&acc)[64], int j) {
    const bool inside = row < a.tokens;
    const int64_t label = inside ? a.labels[row] : -1;
    const int64_t y = label - int64_t(p.tile) * COLUMNS;
    if (0 <= y && y < COLUMNS) {
        float* to = a.partial + int64_t(2 * a.tiles) * a.tokens + row;
        UNROLL for (int i = 0; i < 16; ++i) {
            if (y == first + 8 * i) *to = acc[4 * i + j];
            if (y == first + 8 * i + 1) *to = acc[4 * i + j + 1];
        }
    }
    float extreme = acc[j];
    UNROLL for (int i = 0; i < 16; ++i)
        UNROLL for (int e = 0; e < 2; ++e) {
            const float v = acc[4 * i + j + e];
            extreme = a.negative ? fminf(extreme, v) : fmaxf(extreme, v);
        }
    UNROLL for (int mask = 1; mask < 4; mask *= 2) {
        const float other = shuffle_xor(extreme, mask);
        extreme = a.negative ? fminf(extreme, other) : fmaxf(extreme, other);
    }
    const float high = exponent<CAP>(extreme, a.c, a.k, 0.f), base = finite_base(high);
    float sum = 0.f;
    UNROLL for (int i = 0; i < 16; ++i)
        UNROLL for (int e = 0; e < 2; ++e) sum += exp2_(exponent<CAP>(acc[4 * i + j + e], a.c, a.k, base));
    UNROLL for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
    if (CAP) {
        // The cap has lifted the padding from -inf to -softcap. No logit is below that, so its share
        // of the whole sum is at most its share of the columns: taking it out again is harmless.
        const int padding = (p.tile + 1) * COLUMNS - a.vocab;
        if (padding > 0) sum -= float(padding) * exp2_(a.c - base - 2.f * a.c);
    }
    if (inside && lane() % 4 == 0) {
        a.partial[int64_t(p.tile) * a.tokens + row] = high;
        a.partial[int64_t(a.tiles + p.tile) * a.tokens + row] = sum;
    }
}

template <class T, bool CAP>
DEVICE void take_tiles(const KernelArgs& a, const Ring& ring, int cluster, int clusters, int rank, int group) {
    const int warp = thread() % WARPGROUP / 32, first = lane() % 4 * 2;
    float acc[2][64];
    int at = group * a.depths;  // the ring holds the tiles of both, by turns
    uint32_t parity = group ^ 1;  // the first turn of group 0 is there from the start
    for (int item = cluster + group * clusters; item < a.pairs * a.tiles; item += 2 * clusters, at += 2 * a.depths) {
        barrier_wait(ring.turns + group, parity);
        parity ^= 1;
        product<T>(ring, Turn(at), a.depths, ring.turns + (group ^ 1), acc);
        const Place p = place(a, item);
        if (a.bias) {
            const float* bias = a.bias + int64_t(p.tile) * COLUMNS + first;
            UNROLL for (int i = 0; i < 64; ++i) {
                const float b = bias[i / 4 * 8 + i % 2];
                acc[0][i] += b;
                acc[1][i] += b;
            }
        }
        const int row = (2 * p.pair + rank) * ROWS + warp * 16 + lane() / 4;
        UNROLL for (int half = 0; half < 2; ++half)
            UNROLL for (int j = 0; j < 4; j += 2)
                reduce_row<CAP>(a, p, row + half * 64 + j * 4, first, acc[half], j);
    }
}
#endif

template <class T, bool CAP> KERNEL(THREADS, 1) forward_kernel(const BY_ADDRESS KernelArgs a) {
#if defined(FASTPREF_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Ring ring = make_ring();
    const int cluster = int(block() / 2), clusters = int(blocks() / 2), rank = int(block() % 2);
    if (thread() == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(ring.full + s, 1);
            barrier_init(ring.empty + s, 2 * WARPGROUP / 32);  // the warps of one group in each block
        }
        for (int group = 0; group < 2; ++group) barrier_init(ring.turns + group, WARPGROUP / 32);
        barriers_are_made();
    }
    sync();
    cluster_arrive();
    cluster_wait();
    const int group = thread() / WARPGROUP;
    if (group == 2) {
        give_registers<40>();
        if (thread() == 2 * WARPGROUP) copy_tiles(a, ring, cluster, clusters, rank);
    } else {
        take_registers<232>();
        take_tiles<T, CAP>(a, ring, cluster, clusters, rank, group);
    }
    reconverge();
    cluster_arrive();  // nobody leaves while the other block may still write to its shared memory
    cluster_wait();
#endif
}

struct CombineArgs {
    const float* partial;
    const int64_t* labels;
    float *lse, *logps;
    int tokens, vocab, tiles;
    float c, k;
};
constexpr int SLICES = 8;

// Fold the tiles' max and sum, in the vocabulary's order, into lse and the label's log-prob. A warp
// takes 32 tokens and an eighth of the tiles.
template <bool CAP> KERNEL(32 * SLICES, 1) combine_kernel(const CombineArgs a) {
    SHARED(float, highs, 32 * SLICES);
    SHARED(double, totals, 32 * SLICES);
    const int slice = thread() / 32, row = int(block()) * 32 + lane();
    const bool inside = row < a.tokens;
    float high = -INF;
    double total = 0;  // next to a confident token's 1 the others are tiny
    const int stop = int(int64_t(a.tiles) * (slice + 1) / SLICES);
    for (int tile = int(int64_t(a.tiles) * slice / SLICES); inside && tile < stop; ++tile) {
        const float h = a.partial[int64_t(tile) * a.tokens + row];
        const float s = a.partial[int64_t(a.tiles + tile) * a.tokens + row];
        const float higher = fmaxf(high, h), base = finite_base(higher);
        total = total * exp2_(high - base) + s * exp2_(h - base);
        high = higher;
    }
    highs[thread()] = high;
    totals[thread()] = total;
    sync();
    if (slice != 0 || !inside) return;
    high = -INF;
    for (int i = 0; i < SLICES; ++i) high = fmaxf(high, highs[32 * i + lane()]);
    const float base = finite_base(high);
    total = 0;
    for (int i = 0; i < SLICES; ++i) total += totals[32 * i + lane()] * exp2_(highs[32 * i + lane()] - base);
    const float log_total = log2f(float(total));
    const int64_t label = a.labels[row];
    const bool known = 0 <= label && label < a.vocab;
    const float target = known ? a.partial[int64_t(2 * a.tiles) * a.tokens + row] : NAN;
    const float logp = (exponent<CAP>(target, a.c, a.k, base) - log_total) * LN2;
    a.lse[row] = (high + log_total) * LN2;
    a.logps[row] = logp > 0 ? 0.f : logp;
}

using ForwardKernel = void (*)(KernelArgs);

ForwardKernel kernel_for(bool is_bf16, bool cap) {
    if (is_bf16) return cap ? forward_kernel<bf16, true> : forward_kernel<bf16, false>;
    return cap ? forward_kernel<f16, true> : forward_kernel<f16, false>;
}

}  // namespace

bool forward_works(int device) {
    return has_own_code(forward_kernel<bf16, false>, device);
}

void forward(const ForwardCall& f, const Where& where) {
    if (f.tokens == 0) return;
    const bool cap = f.transform.softcap > 0;
    const float per_log2 = LOG2E * f.transform.inv_temperature;
    const float c = (cap ? f.transform.softcap : f.transform.scale) * per_log2;
    const float k = cap ? 2.f * LOG2E * f.transform.scale / f.transform.softcap : 0.f;
    const int tiles = int((f.vocab + COLUMNS - 1) / COLUMNS), pairs = int((f.tokens + 2 * ROWS - 1) / (2 * ROWS));
    // 16 MiB of hidden states stay in the cache while the weight streams by.
    const int64_t fits = (int64_t(1) << 24) / (f.hidden * 2 * 2 * ROWS);
    const int group = int(std::clamp<int64_t>(fits, 2, 16));
    const bool is_bf16 = f.dtype == Dtype::bf16;
    KernelArgs a{tensor_map(f.x, is_bf16, f.tokens, f.hidden, f.x_stride, ROWS),
                 tensor_map(f.weight, is_bf16, f.vocab, f.hidden, f.weight_stride, COLUMNS / 2),
                 f.labels, f.bias, f.partial, int(f.tokens), int(f.vocab),
                 int((f.hidden + DEPTH - 1) / DEPTH), tiles, pairs, group, f.transform.scale < 0, c, k};
    ForwardKernel kernel = kernel_for(is_bf16, cap);
    const int clusters = std::min<int64_t>(int64_t(pairs) * tiles,
                                           most_clusters(kernel, 2, THREADS, SHARED_BYTES, where.device));
    launch("forward", kernel, a, 2 * clusters, THREADS, 2, where.device, where.stream, SHARED_BYTES);
    CombineArgs b{f.partial, f.labels, f.lse, f.logps, int(f.tokens), int(f.vocab), tiles, c, k};
    launch("forward", cap ? combine_kernel<true> : combine_kernel<false>, b, (f.tokens + 31) / 32, 32 * SLICES, 1,
           where.device, where.stream);
}

}  // namespace fastpref::cuda
