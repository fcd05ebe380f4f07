// The logit-free product for Hopper GPUs (sm_90a): x W^T, and each row's maximum and sum of exponentials,
// in one kernel.
//
// Persistent clusters of two thread blocks take the tiles in turn. The two share 128 entries of the
// vocabulary, of which each loads half for both, and have 128 tokens each. In a block one warp copies
// tiles of 64 hidden columns into a ring in shared memory, and two warpgroups take the output tiles by
// turns: while one reduces its tile in registers, the other one multiplies. Nothing but (max, sum) of
// a token and a tile, and the label's logit, goes to memory; `combine` then folds those in the
// vocabulary's order. A token's result depends on no other token, nor on how many there are.
//
// A pass with gradients also needs D, whose entries are -exp(z - lse) but for the label's. The
// exponentials are in the registers; lse is not known before the row's last tile, but it is one number
// per row. So the exponentials are written as d, relative to a base that the row has from the start, in
// bf16, whose precision does not depend on their size. D = row_scale d, and row_scale is multiplied onto
// the vectors of tokens by which the products' other operands are scaled anyway. forward_rows.h has the
// base.
#include <algorithm>

#include "forward_tile.h"
#include "hopper.h"

namespace fastpref::cuda {
namespace {

#ifdef FASTPREF_EMULATE
constexpr int STAGES = 3;
#else
constexpr int STAGES = 6;
#endif
constexpr int ROWS = 128, DEPTH = 64;
constexpr int TILE_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = 2 * TILE_BYTES;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + 1024;  // the tiles start at a multiple of 1024
constexpr int WARPGROUP = 128, THREADS = 3 * WARPGROUP;

struct KernelArgs : TileArgs {
    TensorMap x, weight;
    const float* bias;
    int depths, pairs, group;
};

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
            copy_box(a.weight, ring.weight(turn.stage) + rank * TILE_BYTES / 2, full, depth * DEPTH, column,
                     true);
        }
    }
}

DEVICE void release(const Ring& ring, int stage) {
    if (lane() != 0) return;
    barrier_arrive(ring.empty + stage, 0);  // both blocks write to it
    barrier_arrive(ring.empty + stage, 1);
}

// done: the barrier that starts the other group's turn. It is arrived at once this group has waited for
// its last tiles: a group that waited for a stage earlier could take this group's tiles for its own.
template <class T>
DEVICE void product(const Ring& ring, Turn turn, int depths, uint64_t* done, float (&acc)[2][64]) {
    int before = 0;
    for (int depth = 0; depth < depths; ++depth) {
        barrier_wait(ring.full + turn.stage, turn.parity);
        results(acc[0]);
        results(acc[1]);
        products_begin();
        // clang-format off: it loses the place of a file's first UNROLL
        UNROLL for (int k = 0; k < DEPTH / 16; ++k)
            UNROLL for (int half = 0; half < 2; ++half)
                multiply<T>(acc[half], operand(ring.x(turn.stage) + half * TILE_BYTES / 2, k),
                            operand(ring.weight(turn.stage), k), depth > 0 || k > 0);
        // clang-format on
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

template <class T, bool CAP, bool D, bool EXTRAS>
DEVICE void take_tiles(const KernelArgs& a, const Ring& ring, int cluster, int clusters, int rank, int group) {
    const int warp = thread() % WARPGROUP / 32;
    float acc[2][64];
    int at = group * a.depths;  // the ring holds the tiles of both, by turns
    uint32_t parity = group ^ 1;  // the first turn of group 0 is there from the start
    for (int item = cluster + group * clusters; item < a.pairs * a.tiles; item += 2 * clusters, at += 2 * a.depths) {
        barrier_wait(ring.turns + group, parity);
        parity ^= 1;
        product<T>(ring, Turn(at), a.depths, ring.turns + (group ^ 1), acc);
        const Place p = place(a, item);
        if (a.bias) {
            const float* bias = a.bias + int64_t(p.tile) * COLUMNS + lane() % 4 * 2;
            UNROLL for (int i = 0; i < 64; ++i) {
                const float b = bias[i / 4 * 8 + i % 2];
                acc[0][i] += b;
                acc[1][i] += b;
            }
        }
        const int row = (2 * p.pair + rank) * ROWS + warp * 16 + lane() / 4;
        UNROLL for (int half = 0; half < 2; ++half)
            UNROLL for (int j = 0; j < 4; j += 2) {
                reduce_row<CAP, D, EXTRAS>(a, p.tile, row + half * 64 + j * 4, acc[half], j);
                if (D) write_row(a, p.tile, row + half * 64 + j * 4, acc[half], j);
            }
    }
}
#endif

template <class T, bool CAP, bool D, bool EXTRAS> KERNEL(THREADS, 1) forward_kernel(const BY_ADDRESS KernelArgs a) {
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
        take_tiles<T, CAP, D, EXTRAS>(a, ring, cluster, clusters, rank, group);
    }
    reconverge();
    cluster_arrive();  // nobody leaves while the other block may still write to its shared memory
    cluster_wait();
#endif
}

using ForwardKernel = void (*)(KernelArgs);

template <class T, bool D> ForwardKernel kernel_for(bool cap, bool extras) {
    if (extras) return cap ? forward_kernel<T, true, D, true> : forward_kernel<T, false, D, true>;
    return cap ? forward_kernel<T, true, D, false> : forward_kernel<T, false, D, false>;
}

template <bool D> auto combine_for(bool cap, bool extras) {
    if (extras) return cap ? combine_kernel<true, D, true> : combine_kernel<false, D, true>;
    return cap ? combine_kernel<true, D, false> : combine_kernel<false, D, false>;
}

}  // namespace

bool forward_works(int device) { return has_own_code(forward_kernel<bf16, false, false, false>, device); }

void forward(const ForwardCall& f, const Where& where) {
    if (f.tokens == 0) return;
    const bool cap = f.transform.softcap > 0;
    const float per_log2 = LOG2E * f.transform.inv_temperature;
    const float c = (cap ? f.transform.softcap : f.transform.scale) * per_log2;
    const float k = cap ? 2.f * LOG2E * f.transform.scale / f.transform.softcap : 0.f;
    const int tiles = int((f.vocab + COLUMNS - 1) / COLUMNS),
              pairs = int((f.tokens + 2 * ROWS - 1) / (2 * ROWS));
    // 16 MiB of hidden states stay in the cache while the weight streams by.
    const int64_t fits = (int64_t(1) << 24) / (f.hidden * 2 * 2 * ROWS);
    const int group = int(std::clamp<int64_t>(fits, 2, 16));
    const bool is_bf16 = f.dtype == Dtype::bf16, extras = f.stats.sum != nullptr;
    float* target = f.partial + int64_t(extras ? 6 : 2) * tiles * f.tokens;
    RowArgs rows{
        f.labels,      f.partial,    target, target + f.tokens,  static_cast<bf16*>(f.d), f.d_stride,
        int(f.tokens), int(f.vocab), tiles,  cap ? -2.f * c : c, cap ? c : 0.f,           k};
    if (f.d) {
        BaseArgs b{rows,
                   static_cast<const bf16*>(f.x),
                   static_cast<const bf16*>(f.weight),
                   f.x_stride,
                   f.weight_stride,
                   f.bias,
                   int(f.hidden)};
        launch("forward", cap ? base_kernel<true> : base_kernel<false>, b,
               (f.tokens + BASE_ROWS - 1) / BASE_ROWS, 32 * BASE_ROWS, 1, where.device, where.stream);
    }
    KernelArgs a{{rows, f.transform.scale < 0},
                 tensor_map(f.x, is_bf16, f.tokens, f.hidden, f.x_stride, ROWS),
                 tensor_map(f.weight, is_bf16, f.vocab, f.hidden, f.weight_stride, COLUMNS / 2),
                 f.bias,
                 int((f.hidden + DEPTH - 1) / DEPTH),
                 pairs,
                 group};
    ForwardKernel kernel = f.d       ? kernel_for<bf16, true>(cap, extras)
                           : is_bf16 ? kernel_for<bf16, false>(cap, extras)
                                     : kernel_for<f16, false>(cap, extras);
    const int clusters = std::min<int64_t>(int64_t(pairs) * tiles,
                                           most_clusters(kernel, 2, THREADS, SHARED_BYTES, where.device));
    launch("forward", kernel, a, 2 * clusters, THREADS, 2, where.device, where.stream, SHARED_BYTES);
    CombineArgs b{rows, f.stats, f.row_scale, f.transform.scale * f.transform.inv_temperature};
    launch("forward", f.d ? combine_for<true>(cap, extras) : combine_for<false>(cap, extras), b,
           (f.tokens + COMBINE_ROWS - 1) / COMBINE_ROWS, COMBINE_ROWS * SLICES, 1, where.device,
           where.stream);
}

}  // namespace fastpref::cuda
