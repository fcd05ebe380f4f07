// What the kernels need of a GPU, in a few functions, so that the same kernels also compile as plain
// C++: with FASTPREF_EMULATE these come from tests/support/cuda_emulate/emulate.h and run on a CPU.
#pragma once
#include <cmath>
#include <cstdint>

#include "vec.h"  // the storage types bf16 and f16

#ifdef FASTPREF_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__
#define UNROLL _Pragma("unroll")
#define SHARED(type, name, size) __shared__ type name[size]

namespace fastpref {

using Stream = cudaStream_t;

struct alignas(16) Vector {
    uint32_t word[4];
};

DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int thread() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int64_t block() { return blockIdx.x; }
DEVICE int64_t blocks() { return gridDim.x; }
DEVICE void sync() { __syncthreads(); }
template <class T> DEVICE T shuffle_xor(T v, int mask) { return __shfl_xor_sync(~0u, v, mask); }

DEVICE float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float clamp(float x, float low, float high) {  // NaN stays NaN
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
    return x;
}
// Forces x to be computed before this point: the compiler may neither delay nor remove it.
DEVICE void keep(float& x) { asm volatile("" : "+f"(x)); }
DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
DEVICE float half_to_float(uint32_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
    return x;
}
// Two numbers rounded to nearest even, the first in the lower half.
DEVICE uint32_t pack_bf16(float first, float second) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}
DEVICE uint32_t pack_f16(float first, float second) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

// The load bypasses L1, as each logit is read once. It is volatile so that the compiler does not move
// it below the barrier after which the logits are overwritten.
DEVICE Vector load_vector(const void* p) {
    Vector v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p)
                 : "memory");
    return v;
}
DEVICE void store_vector(void* p, const Vector& v) {
    *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
// A streaming store, for data that is not read again soon: the cache evicts it first.
DEVICE void store_vector_and_forget(void* p, const Vector& v) {
    __stcs(static_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}
DEVICE void store_pair(void* p, uint32_t a, uint32_t b) { *static_cast<uint2*>(p) = make_uint2(a, b); }

// A cluster is the thread blocks of a row, which write into each other's shared memory. Before its
// first write a block calls cluster_started and cluster_wait: every block is then running. After its
// last write it calls cluster_arrive and cluster_wait: every block's writes are then visible.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DEVICE void cluster_started() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_store(uint32_t* mine, int rank, uint32_t value) {
    uint32_t address = uint32_t(__cvta_generic_to_shared(mine)), there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
}
#else  // older GPUs have no clusters, and are never asked for one
DEVICE void cluster_started() {}
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
DEVICE void cluster_store(uint32_t* mine, int, uint32_t value) { *mine = value; }
#endif

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// cudart is linked statically, so torch has another copy of it in the same process. Both copies use the
// device's primary context, where pointers and streams are valid in either. Each copy has a current
// device of its own: the caller sets torch's by torch.cuda.device(...), and `launch` sets this one. A
// launch neither waits nor allocates.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const Args& args, int64_t blocks, int threads,
            int cluster, int device, uintptr_t stream, int shared = 0) {
    if (blocks > 0x7fffffff) throw std::invalid_argument(std::string(name) + ": too many rows");
    int current = -1;
    check(cudaGetDevice(&current), name);
    if (current != device) check(cudaSetDevice(device), name);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = reinterpret_cast<Stream>(stream);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    Args copy = args;
    void* list[] = {&copy};
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), list), name);
}

}  // namespace fastpref
#endif

namespace fastpref {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float INF = INFINITY;

DEVICE float exponential(float x) { return exp2_(x * LOG2E); }
DEVICE bool is_nan(float x) { return x != x; }

template <class T> DEVICE T warp_sum(T v) {
    UNROLL for (int mask = 16; mask; mask >>= 1) v += shuffle_xor(v, mask);
    return v;
}
DEVICE float warp_max(float v) {
    UNROLL for (int mask = 16; mask; mask >>= 1) v = fmaxf(v, shuffle_xor(v, mask));
    return v;
}
DEVICE int warp_min(int v) {
    UNROLL for (int mask = 16; mask; mask >>= 1) {
        int other = shuffle_xor(v, mask);
        v = other < v ? other : v;
    }
    return v;
}

}  // namespace fastpref
