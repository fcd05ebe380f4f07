// A GPU for tests: the kernels of csrc/cuda as plain C++, on one CPU thread. What csrc/cuda/device.h
// gives them on a GPU, this gives them here.
//
// Each GPU thread is a fiber. The fibers of a cluster take turns and switch where they wait for each
// other: at barriers and shuffles. Every other cluster runs its fibers in reverse, so that code which
// lacks a barrier gives other numbers. Shared memory starts as NaN. A barrier that some thread never
// reaches is an error that says so.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "vec.h"

#define KERNEL(threads, blocks) inline void
#define DEVICE inline
#define DEVICE_CALL inline
#define UNROLL
#define SHARED(type, name, size)                                                    \
    static const int name##_slot = fastpref::emulate::new_slot(sizeof(type[size])); \
    type* name = reinterpret_cast<type*>(fastpref::emulate::shared(name##_slot))

namespace fastpref {
namespace emulate {

constexpr int MAX_BLOCKS = 8, MAX_THREADS = 1024, STACK = 64 << 10, SHARED_BYTES = 256 << 10;

struct Barrier {
    int size = 0, count = 0, generation = 0;
    int arrive() {
        int mine = generation;
        if (++count == size) count = 0, ++generation;
        return mine;
    }
};
struct Warp {
    Barrier barrier;
    uint64_t slots[2][32];
};
struct Block {
    alignas(16) unsigned char memory[SHARED_BYTES];
    Barrier barrier;
    std::vector<Warp> warps;
};
struct Fiber {
    jmp_buf at;
    ucontext_t context;
    bool started, done, met;  // met: has waited for the whole cluster
    int thread, rank, parity, ticket;
    const Barrier* barrier;  // waits until its generation is no longer `generation`
    int generation;
};
struct Machine {
    std::mutex busy;
    std::vector<Block> blocks = std::vector<Block>(MAX_BLOCKS);
    std::vector<Fiber> fibers = std::vector<Fiber>(MAX_BLOCKS * MAX_THREADS);
    Barrier cluster;
    Fiber* now = nullptr;
    jmp_buf scheduler;
    ucontext_t start;
    int64_t first_block = 0, grid = 0;
    int threads = 0, shared_used = 0;
    void (*run)(const void*) = nullptr;
    const void* call = nullptr;
    const char* error = nullptr;
    char* stacks = nullptr;
};
inline Machine& machine() {
    static Machine m;
    return m;
}

inline int new_slot(size_t bytes) {
    Machine& m = machine();
    int slot = m.shared_used;
    m.shared_used += int((bytes + 15) / 16 * 16);
    if (m.shared_used > SHARED_BYTES) throw std::runtime_error("emulation: shared memory is full");
    return slot;
}
inline Block& block_now() { return machine().blocks[machine().now->rank]; }
inline void* shared(int slot) { return block_now().memory + slot; }

inline void wait(const Barrier& barrier, int generation) {
    if (barrier.generation != generation) return;
    Machine& m = machine();
    m.now->barrier = &barrier;
    m.now->generation = generation;
    if (!_setjmp(m.now->at)) _longjmp(m.scheduler, 1);
}

inline void enter() {
    Machine& m = machine();
    m.run(m.call);
    m.now->done = true;
    _longjmp(m.scheduler, 1);
}

inline void resume(Fiber& f) {
    Machine& m = machine();
    m.now = &f;
    if (_setjmp(m.scheduler)) return;
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    setcontext(&f.context);
}

inline void run_cluster(int blocks, int threads, bool backwards) {
    Machine& m = machine();
    const int total = blocks * threads;
    m.cluster = {total, 0, 0};
    for (int b = 0; b < blocks; ++b) {
        std::memset(m.blocks[b].memory, 0xff, size_t(m.shared_used));
        m.blocks[b].barrier = {threads, 0, 0};
        m.blocks[b].warps.resize(threads / 32);
        for (Warp& w : m.blocks[b].warps) w.barrier = {32, 0, 0};
    }
    for (int i = 0; i < total; ++i) {
        Fiber& f = m.fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = m.stacks + size_t(i) * STACK;
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
        f.started = f.done = f.met = false;
        f.thread = i % threads;
        f.rank = i / threads;
        f.parity = f.ticket = 0;
        f.barrier = nullptr;
    }
    for (int left = total; left;) {
        bool moved = false;
        for (int k = 0; k < total; ++k) {
            Fiber& f = m.fibers[backwards ? total - 1 - k : k];
            if (f.done || (f.barrier && f.barrier->generation == f.generation)) continue;
            resume(f);
            moved = true;
            left -= f.done;
            if (m.error) throw std::runtime_error(std::string("emulation: ") + m.error);
        }
        if (!moved) throw std::runtime_error("emulation: a barrier that some thread never reaches");
    }
}

}  // namespace emulate

struct alignas(16) Vector {
    uint32_t word[4];
};

inline int thread() { return emulate::machine().now->thread; }
inline int lane() { return thread() % 32; }
inline int threads() { return emulate::machine().threads; }
inline int64_t block() { return emulate::machine().first_block + emulate::machine().now->rank; }
inline int64_t blocks() { return emulate::machine().grid; }

inline void sync() {
    emulate::Barrier& b = emulate::block_now().barrier;
    emulate::wait(b, b.arrive());
}
// Two sets of slots in turn: a lane that runs ahead writes to the one that nobody reads any more.
template <class T> T shuffle_xor(T v, int mask) {
    static_assert(sizeof(T) <= 8);
    emulate::Fiber& f = *emulate::machine().now;
    emulate::Warp& w = emulate::block_now().warps[f.thread / 32];
    uint64_t* slots = w.slots[f.parity ^= 1];
    std::memcpy(&slots[f.thread % 32], &v, sizeof(T));
    emulate::wait(w.barrier, w.barrier.arrive());
    std::memcpy(&v, &slots[f.thread % 32 ^ mask], sizeof(T));
    return v;
}
inline void cluster_arrive() { emulate::machine().now->ticket = emulate::machine().cluster.arrive(); }
inline void cluster_started() { cluster_arrive(); }
inline void cluster_wait() {
    emulate::wait(emulate::machine().cluster, emulate::machine().now->ticket);
    emulate::machine().now->met = true;
}
inline void cluster_store(uint32_t* mine, int rank, uint32_t value) {
    if (!emulate::machine().now->met)
        emulate::machine().error = "a store to a block that may not have started";
    auto* base = emulate::block_now().memory;
    auto offset = reinterpret_cast<unsigned char*>(mine) - base;
    *reinterpret_cast<uint32_t*>(emulate::machine().blocks[rank].memory + offset) = value;
}

inline float exp2_(float x) {
    float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.f : y;  // as ex2.approx.ftz; NaN stays NaN
}
inline float reciprocal(float x) { return 1.f / x; }
inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline void keep(float&) {}
inline float bits_to_float(uint32_t bits) { return as_float(bits); }
inline uint32_t float_to_bits(float x) { return as_bits(x); }
inline float half_to_float(uint32_t bits) {
    f16 h{uint16_t(bits)};
    return load(&h);
}
template <class T> uint32_t pack(float first, float second) {
    T a, b;
    store(&a, first);
    store(&b, second);
    return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}
inline uint32_t pack_bf16(float first, float second) { return pack<bf16>(first, second); }
inline uint32_t pack_f16(float first, float second) { return pack<f16>(first, second); }

inline void must_be_aligned(const void* p, int bytes) {
    // A fiber cannot throw: it is the scheduler that does.
    if (reinterpret_cast<uintptr_t>(p) % bytes) emulate::machine().error = "a misaligned address";
}
inline Vector load_vector(const void* p) {
    must_be_aligned(p, 16);
    Vector v;
    std::memcpy(&v, p, 16);
    return v;
}
inline void store_vector(void* p, const Vector& v) {
    must_be_aligned(p, 16);
    std::memcpy(p, &v, 16);
}
inline void store_vector_and_forget(void* p, const Vector& v) { store_vector(p, v); }
inline void store_pair(void* p, uint32_t a, uint32_t b) {
    must_be_aligned(p, 8);
    std::memcpy(p, &a, 4);
    std::memcpy(static_cast<char*>(p) + 4, &b, 4);
}

template <class Args>
void launch(const char* name, void (*kernel)(Args), const Args& args, int64_t blocks, int threads,
            int cluster, int, uintptr_t, int = 0) {
    using namespace emulate;
    Machine& m = machine();
    std::lock_guard<std::mutex> lock(m.busy);
    if (threads % 32 || threads > MAX_THREADS || cluster > MAX_BLOCKS || blocks % cluster)
        throw std::runtime_error(std::string(name) + ": a launch that no GPU takes");
    if (!m.stacks) {
        void* p = mmap(nullptr, size_t(STACK) * MAX_BLOCKS * MAX_THREADS, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
        m.stacks = static_cast<char*>(p);
    }
    struct Call {
        void (*kernel)(Args);
        Args args;
    } call{kernel, args};
    m.error = nullptr;
    m.run = [](const void* p) {
        auto* c = static_cast<const Call*>(p);
        c->kernel(c->args);
    };
    m.call = &call;
    m.threads = threads;
    m.grid = blocks;
    for (int64_t b = 0; b < blocks; b += cluster) {
        m.first_block = b;
        run_cluster(cluster, threads, b / cluster % 2);
    }
}

}  // namespace fastpref
