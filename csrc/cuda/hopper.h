// What the forward pass needs of Hopper GPUs (sm_90a): barriers in shared memory that count bytes,
// copies of tiles by the memory unit (TMA), and products of tiles by a warpgroup (wgmma).
//
// Tiles are rows of 64 16-bit numbers, 128 bytes, with the swizzle that the products expect: the
// 16-byte part p of row r lies where part p ^ (r % 8) would.
#pragma once
#include "device.h"

#ifdef FASTPREF_EMULATE
#include "emulate_hopper.h"
#else
#include <cuda.h>

#define DYNAMIC_SHARED(name, bytes) extern __shared__ __align__(1024) unsigned char name[]
#define BY_ADDRESS __grid_constant__

namespace fastpref {

using TensorMap = CUtensorMap;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

DEVICE unsigned char* from_multiple_of_1024(unsigned char* memory) {
    return memory + (-shared_address(memory) & 1023);
}
DEVICE void reconverge() { __syncwarp(); }

// clang-format off: instructions and their operands are laid out by hand
// A barrier's phase is over after `count` arrivals and all the bytes that were announced.
DEVICE void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void barriers_are_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {  // arrives, too
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// At the barrier of that block of the cluster. What it orders is reads by products, which are done,
// before copies, which start after; not memory that threads wrote, so no fence of the cluster's.
DEVICE void barrier_arrive(uint64_t* barrier, int rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}
DEVICE void barrier_arrive(uint64_t* barrier) {  // at this block's own
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over; the first one's is 0. The one before it has to be: a
// barrier that is two phases behind looks as if it were done.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Copy the map's box at (column, row) to `to`; its bytes count for `barrier`. What lies outside of the
// tensor is 0. `both`: to the same place, and for the same barrier, of both blocks of the cluster.
DEVICE void copy_box(const TensorMap& map, void* to, uint64_t* barrier, int column, int row, bool both) {
    auto address = reinterpret_cast<uint64_t>(&map);
    if (both)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)), "l"(address),
            "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(uint16_t(3)) : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)), "l"(address),
            "r"(shared_address(barrier)), "r"(column), "r"(row) : "memory");
}
// clang-format on

// Where a product finds 16 columns of a tile: its address, 1024 bytes from 8 rows to the next, and the
// swizzle. Columns 16k on are 32k bytes on.
using Operand = uint64_t;
DEVICE Operand operand(const unsigned char* tile, int k) {
    uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    return address + 2 * k | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// clang-format off
#define FOUR(n) "+f"(acc[n]), "+f"(acc[n + 1]), "+f"(acc[n + 2]), "+f"(acc[n + 3])
#define SIXTEEN(n) FOUR(n), FOUR(n + 4), FOUR(n + 8), FOUR(n + 12)
#define WGMMA(type)                                                                                   \
    asm volatile(                                                                                     \
        "{\n"                                                                                         \
        ".reg .pred adds;\n"                                                                          \
        "setp.ne.b32 adds, %66, 0;\n"                                                                 \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                              \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "            \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "           \
        "%64, %65, adds, 1, 1, 0, 0;\n"                                                               \
        "}\n"                                                                                         \
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48) : "l"(a), "l"(b), "r"(int(add)))
// clang-format on

// acc [64, 128] = a [64, 16] b [128, 16]^T, plus acc if `add`. Of each 8 columns a thread has those
// at 2 (lane % 4), of rows 16 warp + lane / 4 and 8 below: acc[4 i] to acc[4 i + 3], for 8 i on.
template <class T> DEVICE void multiply(float (&acc)[64], Operand a, Operand b, bool add);
template <> DEVICE void multiply<bf16>(float (&acc)[64], Operand a, Operand b, bool add) { WGMMA("bf16"); }
template <> DEVICE void multiply<f16>(float (&acc)[64], Operand a, Operand b, bool add) { WGMMA("f16"); }
#undef WGMMA
#undef SIXTEEN
#undef FOUR

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last `groups` of them are done.
template <int groups> DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}
// The results are in the registers only from here on, whatever the compiler thinks.
DEVICE void results(float (&acc)[64]) {
    UNROLL for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// How many registers each thread of a warpgroup has.
template <int count> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }
#endif

// A matrix [rows, columns] of 16-bit numbers, `stride` apart from row to row, in boxes of box_rows x 64.
inline TensorMap tensor_map(const void* data, bool is_bf16, int64_t rows, int64_t columns, int64_t stride,
                            int box_rows) {
    static const auto encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
              "cuTensorMapEncodeTiled");
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
              "cuTensorMapEncodeTiled");
#endif
        if (status != cudaDriverEntryPointSuccess || !found)
            throw std::runtime_error("cuTensorMapEncodeTiled: the driver does not have it");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    TensorMap map;
    cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
    cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
    CUresult error = encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                            2, const_cast<void*>(data), sizes, strides, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::invalid_argument("cuTensorMapEncodeTiled: error " + std::to_string(int(error)));
    return map;
}

// How many clusters of so many blocks the GPU holds at once, for a kernel with so much dynamic shared
// memory, more than a kernel has unless it asks.
template <class Args>
int most_clusters(void (*kernel)(Args), int blocks, int threads, int shared, int device) {
    int current = -1, clusters = 0;
    check(cudaGetDevice(&current), "clusters");
    if (current != device) check(cudaSetDevice(device), "clusters");
    auto* address = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&clusters, address, &config), "clusters");
    if (clusters < 1) throw std::runtime_error("forward: the GPU has no room for a cluster");
    return clusters;
}

// Whether the kernel was compiled for this very GPU, and not for an older one of its family.
template <class Args> bool has_own_code(void (*kernel)(Args), int device) {
    int major = 0, minor = 0;
    cudaFuncAttributes found{};
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel));
    cudaGetLastError();  // an answer, not an error that a later call should report
    // Both: code that the driver makes of an older architecture's PTX is for this GPU, and empty.
    return error == cudaSuccess && found.binaryVersion == 90 && found.ptxVersion == 90 && 10 * major + minor == 90;
}

}  // namespace fastpref
#endif
