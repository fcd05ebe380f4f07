// The choice of columns: see column_choice.h.
#include "column_choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace fastpref {
namespace {

constexpr int DIGIT = 11;  // bits of a pass of the radix sort: 3 passes for 32 bits

// The columns by falling squares, those of labels first; equal ones in the order of the vocabulary. False
// where a square is no finite number.
bool sort_columns(const ColumnChoice& s, std::vector<uint32_t>& order, int64_t& labelled) {
    const size_t cols = size_t(s.cols);
    std::vector<uint32_t> keys(cols), other_keys(cols), other(cols);
    order.resize(cols);
    for (size_t j = 0; j < cols; ++j) {
        if (!(s.squares[j] >= 0) || std::isinf(s.squares[j])) return false;
        const float square = s.squares[j] + 0.f;  // -0 has other bits than 0
        uint32_t bits;
        std::memcpy(&bits, &square, sizeof bits);
        keys[j] = ~bits;  // the larger the square, the smaller the key; labels get 0, which no square has
        order[j] = uint32_t(j);
    }
    labelled = 0;
    for (int64_t i = 0; i < s.rows; ++i) {
        uint32_t& key = keys[size_t(std::clamp<int64_t>(s.labels[i], 0, s.cols - 1))];
        labelled += key != 0;
        key = 0;
    }
    for (int shift = 0; shift < 32; shift += DIGIT) {
        uint32_t starts[(1 << DIGIT) + 1] = {};
        auto digit = [&](uint32_t key) { return key >> shift & ((1u << DIGIT) - 1); };
        for (uint32_t key : keys) ++starts[digit(key) + 1];
        for (int i = 0; i < 1 << DIGIT; ++i) starts[i + 1] += starts[i];
        for (size_t j = 0; j < cols; ++j) {
            const uint32_t to = starts[digit(keys[j])]++;
            other_keys[to] = keys[j];
            other[to] = order[j];
        }
        keys.swap(other_keys);
        order.swap(other);
    }
    return true;
}

// The finaliser of splitmix64.
uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

double uniform(uint64_t state, uint64_t place) {
    return double(mix(state + place * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
}

}  // namespace

ColumnCounts choose_columns(const ColumnChoice& s) {
    const ColumnCounts all{0, 0, {0, 0}};
    const size_t cols = size_t(s.cols);
    std::vector<uint32_t> order;
    int64_t labelled = 0;
    if (!sort_columns(s, order, labelled)) return all;
    // roots[i] of the sorted squares, their sum up to i, and the variances if the i largest are kept.
    std::vector<double> roots(cols), before(cols), tails(cols + 1), spread(cols + 1);
    double sum = 0;
    for (size_t i = 0; i < cols; ++i) {
        roots[i] = std::sqrt(double(s.squares[order[i]]));
        before[i] = sum += roots[i];
    }
    for (size_t i = cols; i-- > 0;) {
        const double distance = s.distance[order[i]];
        tails[i] = tails[i + 1] + roots[i];
        spread[i] = spread[i + 1] + roots[i] * (distance * distance);
    }
    double limits[2];
    for (int w = 0; w < 2; ++w) limits[w] = s.tolerance[w] * s.tolerance[w] * s.wanted[w];
    double least = std::numeric_limits<double>::infinity();
    size_t k = 0;
    for (size_t i = size_t(labelled); i <= cols; ++i) {
        double draws = 0;
        for (int w = 0; w < 2; ++w) {
            if (std::isnan(s.tolerance[w])) continue;
            const double needed = (w ? tails[i] * tails[i] : tails[i] * spread[i]) / limits[w];
            if (std::isnan(needed)) return all;
            draws = std::max(draws, needed);
        }
        const double cost = double(i) + std::ceil(draws);
        if (cost < least) least = cost, k = i;
    }
    if (!(least < double(s.cols))) return all;
    const int64_t count = int64_t(least), kept = int64_t(k), t = std::max<int64_t>(count - kept, 1);
    std::vector<uint32_t> times(cols);  // kept: 1; drawn: how often
    for (size_t i = 0; i < k; ++i) times[order[i]] = 1;
    int64_t to = 0;
    for (size_t j = 0; j < cols; ++j)
        if (times[j]) s.index[to] = int64_t(j), s.factor[to++] = 1.f;
    std::fill(times.begin(), times.end(), 0);
    // One draw from each of t equal parts of the sum over the columns that are not kept.
    const double rest = tails[k], start = before[cols - 1] - rest;
    std::vector<float> factors(cols);
    for (int64_t place = kept; place < count; ++place) {
        const double part = (double(place - kept) + uniform(s.state, uint64_t(place) + 1)) / double(t);
        const double at = start + part * rest;
        const auto found = std::upper_bound(before.begin(), before.end(), at) - before.begin();
        const size_t i = size_t(std::max<int64_t>(std::min<int64_t>(found, s.cols - 1), kept));
        const double weight = roots[i] * double(t);
        factors[order[i]] = weight > 0 ? float(rest / weight) : 0.f;
        ++times[order[i]];
    }
    for (size_t j = 0; j < cols; ++j)
        for (uint32_t i = 0; i < times[j]; ++i) s.index[to] = int64_t(j), s.factor[to++] = factors[j];
    const double tail = tails[k];
    return {count, kept, {tail * spread[k] / double(t), tail * tail / double(t)}};
}

}  // namespace fastpref
