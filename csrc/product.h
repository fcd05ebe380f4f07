// Matrix products of CPUs: out = A B^T, blocked for the caches, over a micro-kernel that the processor has.
//
// An element of out is a sum over chunks of k, in order, each a chain of multiply-adds, in order, whatever
// tile it falls into: it does not depend on the other rows and columns of the call, nor on the threads.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "tile.h"

namespace fastpref {

// Element (i, p) of an operand stands at data + i * row + p * k elements; one of the strides is 1. With
// `columns` it stands at columns[p] + i: the columns, elements of one p, are scattered, and row is 1, k is 0.
struct Operand {
    const void* data;
    Dtype dtype;
    int64_t row, k;
    const void* const* columns = nullptr;
};

// Takes the sums of rows [row, row + rows) and columns [col, col + cols), which it may overwrite. The blocks
// of columns are those of COLUMN_BLOCK, whatever the threads; several threads call it at a time.
using Finish =
    std::function<void(int64_t row, int64_t rows, int64_t col, int64_t cols, float* sums, int64_t stride)>;
constexpr int64_t COLUMN_BLOCK = 512;

// out [m, n] = a [m, k] b [n, k]^T. a and b have one dtype; out is summed in fp32 and rounded once. With
// finish there is no out.
struct Product {
    Operand a, b;
    int64_t m, n, k;
    void* out;
    Dtype out_dtype;
    int64_t out_stride;
    const Finish* finish = nullptr;
    bool add = false;  // to what an fp32 out holds
};
constexpr int64_t FINISH_WORDS = 8192;  // the longest k with finish

// What a micro-kernel multiplies: words of 32 bits, each a float or, in `pairs`, two bf16 adjacent in k.
struct Packing {
    Operand from;
    int64_t size;  // elements along k
    int64_t first, last;  // rows of the operand: those beyond `last` are zero
    int64_t p0, p1;  // words along k
    int group;  // rows in a group
    uint32_t* out;  // [group number][word][row in group], or a layout of the kernel's own
    int64_t group_stride;  // words from one group to the next; 8 words of slack follow each
};

// What a micro-kernel may prefetch into the second cache: with each word `step` bytes more.
struct Ahead {
    const char* from;
    int64_t step;
};

struct MicroKernel {
    const char* name;
    int rows, cols;  // of a tile of out
    bool pairs;  // multiplies bf16 pairs; otherwise floats, to which 16-bit operands are widened
    bool (*works)();
    // out [rows, cols] = or += a [words][rows] . b [words][cols]. What is added is summed from 0.
    void (*multiply)(int64_t words, const uint32_t* a, const uint32_t* b, float* out, int64_t stride,
                     bool add, Ahead ahead);
    void (*pack)(const Packing&);  // a and b in the layouts that multiply reads: the groups differ in size
    void (*begin)() = nullptr;  // on each thread around its calls of multiply, where the kernel needs it
    void (*end)() = nullptr;
};

extern const MicroKernel portable_kernel, neon_kernel, avx2_kernel, avx512_kernel, avx512_bf16_kernel,
    amx_bf16_kernel;

// The kernels of this processor for operands of this dtype, the fastest first; and the one of a name, or
// null.
std::vector<const MicroKernel*> micro_kernels(Dtype dtype);
const MicroKernel* micro_kernel(Dtype dtype, const std::string& name);

void product(const Product& p, const MicroKernel& kernel, int threads);

// FLOP/s of the kernel's multiply-adds on packed operands in the first cache: the best part of so many
// seconds.
double peak_rate(const MicroKernel& kernel, int threads, double seconds);

// Columns whose D stands in memory at a time where it is multiplied at once.
constexpr int64_t SLICE = 4 * COLUMN_BLOCK;

// The head's forward pass without logits in memory: see Backend.logit_free_forward, and with u
// Backend.logit_free_project. d and u are in the operands' dtype; one of them is null.
struct LogitFree {
    Operand x, weight;  // [tokens, hidden], [vocab, hidden]
    int64_t tokens, vocab, hidden;
    const int64_t* labels;  // [tokens]
    const float* bias;  // [vocab], or null
    Transform transform;
    Stats stats;  // lse and logps; max, sum and the last four where the extras are there
    void* d;  // [tokens, vocab], or null
    int64_t d_stride;
    float* row_scale;  // [tokens], with d
    void* u;  // [tokens, hidden], or null
    int64_t u_stride;
};
void logit_free_forward(const LogitFree& head, const MicroKernel& kernel, int threads);

}  // namespace fastpref
