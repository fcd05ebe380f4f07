// Hopper's barriers, copies and products for tests: see csrc/cuda/hopper.h. A copy is done when it is
// asked for, and a product when it is issued.
#pragma once
#include <map>

#include "emulate.h"

#define DYNAMIC_SHARED(name, bytes) SHARED(unsigned char, name, bytes)
#define BY_ADDRESS

namespace fastpref {
namespace emulate {

struct ByteBarrier {
    Barrier phase;
    int count = 0, pending = 0;
    int64_t bytes = 0;
    void settle() {
        if (pending || bytes) return;
        pending = count;
        ++phase.generation;
    }
};
// By place: the shared memory of a cluster's blocks. A new run makes its barriers anew.
inline std::map<const void*, ByteBarrier>& byte_barriers() {
    static std::map<const void*, ByteBarrier> all;
    return all;
}
inline void* in_block(const void* mine, int rank) {
    auto offset = static_cast<const unsigned char*>(mine) - block_now().memory;
    return machine().blocks[rank].memory + offset;
}

}  // namespace emulate

struct TensorMap {
    const uint16_t* data;
    int64_t rows, columns, stride;
    int box_rows;
};
inline TensorMap tensor_map(const void* data, bool, int64_t rows, int64_t columns, int64_t stride,
                            int box_rows) {
    if (reinterpret_cast<uintptr_t>(data) % 16 || stride * 2 % 16)
        throw std::invalid_argument("cuTensorMapEncodeTiled: misaligned");
    return {static_cast<const uint16_t*>(data), rows, columns, stride, box_rows};
}
template <class Args> int most_clusters(void (*)(Args), int, int, int, int) { return 3; }
template <class Args> bool has_own_code(void (*)(Args), int) { return true; }
inline unsigned char* from_multiple_of_1024(unsigned char* memory) { return memory; }
inline void reconverge() {}

inline void barrier_init(uint64_t* barrier, int count) {
    emulate::byte_barriers()[barrier] = {{}, count, count, 0};
}
inline void barriers_are_made() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    emulate::ByteBarrier& b = emulate::byte_barriers().at(barrier);
    b.bytes += bytes;
    --b.pending;
    b.settle();
}
inline void barrier_arrive(uint64_t* barrier, int rank) {
    emulate::ByteBarrier& b = emulate::byte_barriers().at(emulate::in_block(barrier, rank));
    --b.pending;
    b.settle();
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive(barrier, emulate::machine().now->rank); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    const emulate::Barrier& phase = emulate::byte_barriers().at(barrier).phase;
    while ((phase.generation & 1) == int(parity)) emulate::wait(phase, phase.generation);
}

inline void copy_box(const TensorMap& map, void* to, uint64_t* barrier, int column, int row, bool both) {
    using namespace emulate;
    for (int rank = 0; rank < 2; ++rank) {
        if (!both && rank != machine().now->rank) continue;
        auto* out = static_cast<unsigned char*>(in_block(to, rank));
        for (int r = 0; r < map.box_rows; ++r)
            for (int c = 0; c < 64; ++c) {
                bool inside = row + r < map.rows && column + c < map.columns;
                uint16_t value = inside ? map.data[(row + r) * map.stride + column + c] : 0;
                std::memcpy(out + r * 128 + (c * 2 ^ (r % 8) << 4), &value, 2);
            }
        ByteBarrier& b = byte_barriers().at(in_block(barrier, rank));
        b.bytes -= map.box_rows * 128;
        b.settle();
    }
}

struct Operand {
    const unsigned char* tile;
    int k;
    template <class T> float at(int row, int column) const {
        T value;
        std::memcpy(&value, tile + row * 128 + ((16 * k + column) * 2 ^ (row % 8) << 4), 2);
        return load(&value);
    }
};
inline Operand operand(const unsigned char* tile, int k) { return {tile, k}; }

template <class T> void multiply(float (&acc)[64], Operand a, Operand b, bool add) {
    const int first = thread() % 128 / 32 * 16 + lane() / 4;
    float left[2][16];
    for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 16; ++k) left[j][k] = a.at<T>(first + 8 * j, k);
    for (int i = 0; i < 32; ++i) {
        const int column = i / 2 * 8 + lane() % 4 * 2 + i % 2;
        float sums[2] = {0, 0};
        for (int k = 0; k < 16; ++k) {
            const float right = b.at<T>(column, k);
            for (int j = 0; j < 2; ++j) sums[j] += left[j][k] * right;
        }
        for (int j = 0; j < 2; ++j) {
            float& to = acc[i / 2 * 4 + j * 2 + i % 2];
            to = add ? to + sums[j] : sums[j];
        }
    }
}
// As on a GPU, none of a warp's threads goes on before all are there.
inline void warp_sync() {
    emulate::Barrier& b = emulate::block_now().warps[thread() / 32].barrier;
    emulate::wait(b, b.arrive());
}
inline void products_begin() { warp_sync(); }
inline void products_end() {}
template <int groups> void products_wait() { warp_sync(); }
inline void results(float (&)[64]) {}
template <int count> void give_registers() {}
template <int count> void take_registers() {}

}  // namespace fastpref
