// The kernels of csrc/ with eight threads each, called from two threads at once: a program that is
// compiled with a sanitizer, and whose results must be those of one thread.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <thread>
#include <vector>

#include "product.h"
#include "tile.h"

using namespace fastpref;

static float drawn(uint32_t& state) {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / (1 << 22) - 2.f;
}

static std::vector<float> numbers(size_t n, uint32_t seed) {
    std::vector<float> out(n);
    for (float& x : out) x = drawn(seed);
    return out;
}

// Every output of a step on `rows` tokens, one after the other.
static std::vector<float> step(int64_t rows, int64_t vocab, int threads, bool softcap) {
    const int64_t split = vocab / 3;
    std::vector<float> logits = numbers(rows * vocab, 1), dlogp = numbers(rows, 2), zeros(rows, 0.f);
    std::vector<int64_t> labels(rows), argmax(rows);
    for (int64_t i = 0; i < rows; ++i) labels[i] = i % 5 == 4 ? -100 : (i * 7) % vocab;
    std::vector<std::vector<float>> s(8, std::vector<float>(rows));
    Stats stats{s[0].data(), s[1].data(), s[2].data(), s[3].data(),  s[4].data(),
                s[5].data(), s[6].data(), s[7].data(), argmax.data()};
    const Transform transform{0.7f, softcap ? 5.f : 0.f, 1.3f};
    // Two slices of the vocabulary, whose rows are a whole tile apart.
    for (int64_t begin : {int64_t(0), split}) {
        const int64_t cols = begin ? vocab - split : split;
        if (!cols) continue;
        fold({logits.data() + begin, Dtype::f32, rows, cols, vocab, begin, labels.data()}, transform, stats,
             threads);
    }
    std::vector<uint16_t> half(rows * vocab);
    GradRows g{s[3].data(), s[4].data(), dlogp.data(), zeros.data(), zeros.data()};
    const Tile tile{logits.data(), Dtype::f32, rows, vocab, vocab, 0, labels.data()};
    grad(tile, transform, g, half.data(), Dtype::bf16, vocab, threads);
    grad(tile, transform, g, logits.data(), Dtype::f32, vocab, threads);  // in place

    std::vector<float> a = numbers(rows * 33, 3), b = numbers(vocab * 33, 4), out;
    const Operand x{a.data(), Dtype::f32, 33, 1}, weight{b.data(), Dtype::f32, 33, 1};
    for (auto* kernel : micro_kernels(Dtype::f32)) {
        std::vector<float> product_(rows * vocab), d(rows * vocab), u(rows * 33), scale(rows);
        product({x, weight, rows, vocab, 33, product_.data(), Dtype::f32, vocab}, *kernel, threads);
        LogitFree head{x,         weight, rows,     vocab, 33,           labels.data(), nullptr,
                       transform, stats,  d.data(), vocab, scale.data(), nullptr,       0};
        logit_free_forward(head, *kernel, threads);
        head.d = nullptr, head.row_scale = nullptr, head.u = u.data(), head.u_stride = 33;
        logit_free_forward(head, *kernel, threads);
        for (const auto* part : {&product_, &d, &u, &scale})
            out.insert(out.end(), part->begin(), part->end());
    }

    for (const auto* part : {&s[0], &s[1], &s[2], &s[3], &s[4], &logits})
        out.insert(out.end(), part->begin(), part->end());
    for (uint16_t x : half) out.push_back(static_cast<float>(x));
    return out;
}

static std::vector<float> loss(int64_t pairs, int64_t length) {
    const int64_t tokens = 2 * pairs * length;
    std::vector<float> logps = numbers(tokens, 5), reference = numbers(2 * pairs, 6);
    std::vector<float> value(1), sums(2 * pairs), rewards(2 * pairs), dlogp(tokens);
    std::vector<int64_t> ids(tokens);
    for (int64_t i = 0; i < tokens; ++i) ids[i] = i / length;
    for (size_t form = 0; form < std::size(PAIR_FORMS); ++form)
        pair_loss({PairForm(form), tokens, pairs, logps.data(), ids.data(), reference.data(), nullptr,
                   nullptr, nullptr, 0.1, 0.0, 1.0, 1.0},
                  {value.data(), sums.data(), rewards.data(), dlogp.data()});
    return dlogp;
}

int main() {
    int wrong = 0;
    for (int64_t rows : {1, 7, 8, 61})
        for (int64_t vocab : {1, 5, 64, 1003})
            for (bool softcap : {false, true}) {
                const auto one = step(rows, vocab, 1, softcap);
                std::vector<std::vector<float>> found(2);
                std::vector<std::thread> callers;
                for (auto& each : found)
                    callers.emplace_back([&, rows, vocab, softcap] {
                        each = step(rows, vocab, 8, softcap);
                        loss(rows, 3);
                    });
                for (auto& caller : callers) caller.join();
                for (const auto& each : found)
                    wrong += each.size() != one.size() ||
                             std::memcmp(each.data(), one.data(), one.size() * sizeof(float)) != 0;
            }
    std::printf("%d results differ from those of one thread\n", wrong);
    return wrong != 0;
}
