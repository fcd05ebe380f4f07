// The most that a micro-kernel reaches: its multiply-adds on packed operands that stay in the first cache.
#include <algorithm>
#include <chrono>
#include <vector>

#include "parallel.h"
#include "product.h"

namespace fastpref {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// What one thread multiplies: groups of a and b of `words`, of numbers near 1.
class Loop {
  public:
    Loop(const MicroKernel& kernel, int64_t words)
        : kernel_(kernel), words_(words), a_(size_t(kernel.rows * words) + 32, 0x3f803f80u),
          b_(size_t(kernel.cols * words) + 32, 0x3f803f80u), out_(size_t(kernel.rows * kernel.cols)) {}

    void run(int64_t times) {
        if (kernel_.begin) kernel_.begin();
        for (int64_t i = 0; i < times; ++i)
            kernel_.multiply(words_, aligned(a_), aligned(b_), out_.data(), kernel_.cols, false,
                             {reinterpret_cast<const char*>(aligned(b_)), 0});
        if (kernel_.end) kernel_.end();
    }

  private:
    static const uint32_t* aligned(const std::vector<uint32_t>& v) {
        return reinterpret_cast<const uint32_t*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
    }

    const MicroKernel& kernel_;
    int64_t words_;
    std::vector<uint32_t> a_, b_;
    std::vector<float> out_;
};

}  // namespace

double peak_rate(const MicroKernel& kernel, int threads, double seconds) {
    constexpr double SLICE_S = 5e-4;  // short enough to fall between the interruptions of a busy machine
    threads = threads < 1 ? 1 : threads;
    double best = 0;
    // Long sums store less, short ones leave room in the cache: which is faster depends on the kernel.
    for (int64_t words : {64, 128, 256}) {
        const double flops = 2.0 * kernel.rows * kernel.cols * double(words) * (kernel.pairs ? 2 : 1);
        std::vector<Loop> loops(size_t(threads), Loop(kernel, words));
        auto all = [&](int64_t times) {
            const auto start = Clock::now();
            parallel_ranges(threads, threads, [&](int64_t first, int64_t last) {
                for (int64_t t = first; t < last; ++t) loops[size_t(t)].run(times);
            });
            return seconds_since(start);
        };
        int64_t times = 1;
        while (times < (int64_t(1) << 30) && all(times) < SLICE_S) times *= 2;
        const auto start = Clock::now();
        do best = std::max(best, flops * double(times) * threads / all(times));
        while (seconds_since(start) < seconds / 3);
    }
    return best;
}

}  // namespace fastpref
