// Calls kernels of csrc/ one by one under callgrind, which writes the instructions of each to a file of its
// own. The arguments are tokens, vocab and hidden; each line of output is a name and how many units it has.
#include <valgrind/callgrind.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "product.h"
#include "vec.h"

using namespace fastpref;

static int64_t tokens, vocab, hidden;

static void count(const std::string& name, int64_t units, const std::function<void()>& call) {
    CALLGRIND_ZERO_STATS;
    call();
    CALLGRIND_DUMP_STATS_AT(name.c_str());
    std::printf("%s\t%lld\n", name.c_str(), static_cast<long long>(units));
}

// A matrix [rows, cols] of numbers between -2 and 2.
struct Matrix {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    Dtype dtype;
    int64_t cols;

    Matrix(int64_t rows, int64_t cols, Dtype dtype, uint32_t state) : dtype(dtype), cols(cols) {
        wide.resize(size_t(rows * cols)), narrow.resize(wide.size());
        for (size_t i = 0; i < wide.size(); ++i) {
            state = state * 1664525u + 1013904223u;
            wide[i] = float(state >> 8) / (1 << 22) - 2.f;
            store(reinterpret_cast<bf16*>(&narrow[i]), wide[i]);
        }
    }
    void* data() { return dtype == Dtype::f32 ? static_cast<void*>(wide.data()) : narrow.data(); }
    Operand rows() { return {data(), dtype, cols, 1}; }
    Operand transposed() { return {data(), dtype, 1, cols}; }
};

static void count_all(Dtype dtype, const std::string& type) {
    Matrix x(tokens, hidden, dtype, 1), w(vocab, hidden, dtype, 2), d(tokens, vocab, dtype, 3);
    std::vector<float> out(size_t(tokens * vocab + vocab * hidden));
    const int64_t terms = tokens * vocab * hidden, logits = tokens * vocab;
    for (const char* name : {"avx2", "portable"}) {
        const MicroKernel* kernel = micro_kernel(dtype, name);
        if (!kernel) continue;
        auto counted = [&](const char* which, const Operand& a, const Operand& b, int64_t m, int64_t n,
                           int64_t k) {
            count(std::string("product ") + name + "|" + type + "|" + which + "|multiply-add", terms,
                  [&] { product({a, b, m, n, k, out.data(), Dtype::f32, n}, *kernel, 1); });
        };
        counted("X W^T", x.rows(), w.rows(), tokens, vocab, hidden);
        counted("D W", d.rows(), w.transposed(), tokens, hidden, vocab);
        counted("D^T X", d.transposed(), x.transposed(), vocab, hidden, tokens);
    }

    const auto size = static_cast<size_t>(tokens);
    std::vector<int64_t> labels(size);
    for (int64_t i = 0; i < tokens; ++i) labels[size_t(i)] = i * 7 % vocab;
    std::vector<std::vector<float>> s(5, std::vector<float>(size));
    const Stats stats{s[0].data(), s[1].data(), s[2].data(), s[3].data(), s[4].data()};
    const Transform plain{1.f, 0.f, 1.f};
    if (const MicroKernel* kernel = micro_kernel(dtype, "avx2")) {
        Matrix to(tokens, vocab > hidden ? vocab : hidden, dtype, 4);
        std::vector<float> scale(size);
        LogitFree head{x.rows(), w.rows(), tokens,  vocab, hidden,  labels.data(), nullptr,
                       plain,    stats,    nullptr, 0,     nullptr, nullptr,       0};
        auto counted = [&](const char* which) {
            count("logit-free avx2|" + type + "|" + which + "|logit", logits,
                  [&] { logit_free_forward(head, *kernel, 1); });
        };
        counted("forward");
        head.u = to.data(), head.u_stride = hidden;
        counted("forward and u");
        head.u = nullptr, head.d = to.data(), head.d_stride = vocab, head.row_scale = scale.data();
        counted("forward and D");
    }

    const Tile tile{d.data(), dtype, tokens, vocab, vocab, 0, labels.data()};
    count("fold|" + type + "|rows|logit", logits, [&] { fold(tile, plain, stats, 1); });
    const GradRows rows{s[3].data(), s[4].data(), nullptr, nullptr, nullptr};
    count("grad|" + type + "|rows|logit", logits,
          [&] { grad(tile, plain, rows, d.data(), dtype, vocab, 1); });
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    tokens = std::atoll(argv[1]), vocab = std::atoll(argv[2]), hidden = std::atoll(argv[3]);
    count_all(Dtype::f32, "fp32");
    count_all(Dtype::bf16, "bf16");
}
