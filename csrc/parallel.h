// parallel_ranges(n, threads, f): run f(begin, end) over a partition of [0, n).
//
// Range t is the work of thread t in every call with these n and threads. So fresh memory stands on the NUMA
// node of the thread that writes it first, and the next pass over the same rows finds it there.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastpref {

template <class F> void parallel_ranges(int64_t n, int threads, const F& f) {
    threads = static_cast<int>(std::min<int64_t>(threads, n));
    if (threads <= 1) {
        if (n > 0) f(int64_t(0), n);
        return;
    }
#ifdef _OPENMP
    // torch has loaded libgomp first and ours binds to the same copy: one pool. A foreign pool
    // would fight torch's idle workers, which spin.
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) f(n * t / threads, n * (t + 1) / threads);
#else
    std::vector<std::thread> team;
    for (int t = 1; t < threads; ++t)
        team.emplace_back([&f, n, t, threads] { f(n * t / threads, n * (t + 1) / threads); });
    f(int64_t(0), n / threads);
    for (auto& worker : team) worker.join();
#endif
}

}  // namespace fastpref
