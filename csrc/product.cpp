#include "product.h"

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "clones.h"
#include "parallel.h"

namespace fastpref {
namespace {

// Words in one chain: short enough that the chain's rounding stays small, and that a packed chunk of b's
// columns stays in the first cache while rows of a pass over it.
constexpr int64_t CHUNK = 256;
constexpr int64_t WHOLE = 16 << 20;  // bytes up to which an operand is packed whole
constexpr int64_t SUMS = 32 << 20;       // bytes of fp32 sums that wait to be rounded

// 0 where the system does not say.
int64_t second_cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    return sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    return 0;
#endif
}

// Rows of a, CHUNK words of them, that stay in the second cache beside what passes through it. The more
// there are, the longer are the stretches in which a transposed operand is read.
int64_t row_block() {
    static const int64_t rows = second_cache_bytes() >= 512 << 10 ? 288 : 144;
    return rows;
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T> using Buffer = std::unique_ptr<T, Free>;

template <class T> Buffer<T> aligned(int64_t count) {
    size_t bytes = size_t(count * int64_t(sizeof(T)) + 63) / 64 * 64;
    auto* p = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!p) throw std::bad_alloc();
    return Buffer<T>(p);
}

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t parts(int64_t n, int64_t step) { return (n + step - 1) / step; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A packed operand: of the words [p0, p1), chunk by chunk, groups of rows.
struct Packed {
    const MicroKernel& kernel;
    int64_t chunk, p0, p1, rows;  // rows: how many there is room for
    int group;
    uint32_t* data;

    int64_t group_words(int64_t length) const { return up(group * length, 16) + 16; }
    int64_t size() const { return parts(rows, group) * group_words(chunk) * parts(p1 - p0, chunk); }
    // The group that starts at a row, in the chunk that starts at word p.
    uint32_t* at(int64_t row, int64_t p) const {
        return data + ((p - p0) / chunk * parts(rows, group) + row / group) * group_words(chunk);
    }
    // Rows [first, last) of `from`, which become the rows from `to` on.
    void pack(const Operand& from, int64_t size, int64_t first, int64_t last, int64_t to) const {
        for (int64_t p = p0; p < p1; p += chunk) {
            int64_t end = least(p + chunk, p1);
            kernel.pack({from, size, first, last, p, end, group, at(to, p), group_words(chunk)});
        }
    }
};

template <class T> struct RoundRows {
    FP_INLINE void run(const float* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
                       int64_t cols) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) store(to + i * to_stride + j, from[i * from_stride + j]);
    }
};
template <class T>
void round_rows(const float* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
                int64_t cols) {
    clone_of<RoundRows<T>>()(from, from_stride, to, to_stride, rows, cols);
}

class Run {
  public:
    Run(const Product& p, const MicroKernel& kernel, int threads)
        : p(p), kernel(kernel), threads(threads < 1 ? 1 : threads) {
        words = kernel.pairs ? (p.k + 1) / 2 : p.k;
        chunk = up(parts(words ? words : 1, parts(words ? words : 1, CHUNK)), 8);
        width = p.n;
        // All of k is packed at once if enough columns fit; else many columns, part of k at a time.
        const bool whole = words * COLUMN_BLOCK * 4 <= WHOLE;
        depth = std::max<int64_t>(words, 1);
        if (whole) {
            if (words * width * 4 > WHOLE / 2) width = least(width, COLUMN_BLOCK);
        } else {
            width = least(width, WHOLE / 4 / (4 * chunk) / kernel.cols * kernel.cols);
            if (p.out_dtype != Dtype::f32)
                width = least(width, std::max<int64_t>(SUMS / (4 * p.m) / kernel.cols, 1) * kernel.cols);
            depth =
                least(words, chunk * std::max<int64_t>(WHOLE / (4 * chunk * up(width, kernel.cols)), 1));
        }
        if (p.finish) width = COLUMN_BLOCK;
        // Equally many rows for each thread, in blocks that fit the cache.
        int64_t blocks = parts(p.m, row_block());
        if (blocks % this->threads) blocks = up(blocks, this->threads);
        block = std::max<int64_t>(up(parts(p.m, blocks), kernel.rows), kernel.rows);
        blocks = parts(p.m, block);
        // Where the rows are too few for the threads, the columns are shared out as well.
        span = up(width, kernel.cols);
        if (p.finish) width = COLUMN_BLOCK * parts(this->threads, blocks);
        else if (blocks < this->threads) span = up(parts(width, parts(this->threads, blocks)), kernel.cols);
    }

    void operator()() {
        const bool packs_a = p.m * words * 4 <= WHOLE && parts(p.n, width) * parts(width, span) > 1;
        Packed a{kernel, chunk, 0, words, up(p.m, kernel.rows), kernel.rows, nullptr};
        Buffer<uint32_t> a_memory;
        if (packs_a) {
            a_memory = aligned<uint32_t>(a.size());
            a.data = a_memory.get();
            int64_t groups = parts(p.m, kernel.rows);
            parallel_ranges(groups, threads, [&](int64_t first, int64_t last) {
                int64_t row = first * kernel.rows;
                a.pack(p.a, p.k, row, least(last * kernel.rows, p.m), row);
            });
        }
        Packed b{kernel, chunk, 0, depth, up(width, kernel.cols), kernel.cols, nullptr};
        Buffer<uint32_t> b_memory = aligned<uint32_t>(b.size());
        b.data = b_memory.get();
        Buffer<float> sums;
        const bool waits = has_buffer() && depth < words;
        if (waits) sums = aligned<float>(p.m * up(width, kernel.cols));
        for (int64_t col = 0; col < p.n; col += width) {
            int64_t cols = least(width, p.n - col);
            for (int64_t p0 = 0; p0 < words || p0 == 0; p0 += depth) {
                b.p0 = p0, b.p1 = least(p0 + depth, words);
                parallel_ranges(parts(cols, kernel.cols), threads, [&](int64_t first, int64_t last) {
                    int64_t at = first * kernel.cols;
                    b.pack(p.b, p.k, col + at, col + least(last * kernel.cols, cols), at);
                });
                const int64_t blocks = parts(p.m, block), spans = parts(cols, span);
                parallel_ranges(blocks * spans, threads, [&](int64_t first, int64_t last) {
                    Task task(*this, b, packs_a ? &a : nullptr, waits ? sums.get() : nullptr);
                    for (int64_t i = first; i < last; ++i)
                        task.run(i % blocks * block, col, i / blocks * span,
                                 least((i / blocks + 1) * span, cols));
                });
            }
        }
    }

  private:
    // Whether sums are made beside out.
    bool has_buffer() const { return p.finish || p.out_dtype != Dtype::f32; }

    const Product& p;
    const MicroKernel& kernel;
    const int threads;
    int64_t words, chunk, depth, width, block, span;

    // What a thread does to blocks of rows, with memory of its own.
    struct Task {
        const Run& run_;
        const Packed& b;
        const Packed* shared_a;
        float* sums;  // of all rows and the columns packed, where they wait for more of k
        Packed a;
        Buffer<uint32_t> a_memory;
        Buffer<float> out_memory;
        Buffer<float> edge;

        Task(const Run& run, const Packed& b, const Packed* shared_a, float* sums)
            : run_(run), b(b), shared_a(shared_a), sums(sums),
              a{run.kernel, run.chunk, 0, run.chunk, run.block, run.kernel.rows, nullptr} {
            if (!shared_a) {
                a_memory = aligned<uint32_t>(a.size());
                a.data = a_memory.get();
            }
            if (run.has_buffer() && !sums)
                out_memory = aligned<float>(run.block * up(run.span, run.kernel.cols));
            edge = aligned<float>(run.kernel.rows * run.kernel.cols);
            if (run.kernel.begin) run.kernel.begin();
        }
        ~Task() {
            if (run_.kernel.end) run_.kernel.end();
        }

        // Rows from `row` on, columns [from, to) of those packed, which start at column `col` of out.
        void run(int64_t row, int64_t col, int64_t from, int64_t to) {
            const Product& p = run_.p;
            const int64_t rows = least(run_.block, p.m - row);
            float* out;
            int64_t stride;
            if (!run_.has_buffer()) {
                stride = p.out_stride;
                out = static_cast<float*>(p.out) + row * stride + col + from;
            } else if (sums) {
                stride = up(run_.width, run_.kernel.cols);
                out = sums + row * stride + from;
            } else {
                stride = up(run_.span, run_.kernel.cols);
                out = out_memory.get();
            }
            for (int64_t w = b.p0; w < b.p1 || w == 0; w += run_.chunk) {
                if (!shared_a) {  // a chunk at a time: it is read while it is in the second cache
                    a.p0 = w, a.p1 = least(w + run_.chunk, b.p1);
                    a.pack(p.a, p.k, row, row + rows, 0);
                }
                multiply(row, rows, from, to, w, out, stride);
            }
            if (!run_.has_buffer() || b.p1 < run_.words) return;
            if (p.finish) {
                (*p.finish)(row, rows, col + from, to - from, out, stride);
                return;
            }
            int64_t at = row * p.out_stride + col + from;
            if (p.out_dtype == Dtype::bf16)
                round_rows<bf16>(out, stride, static_cast<bf16*>(p.out) + at, p.out_stride, rows,
                                 to - from);
            else round_rows<f16>(out, stride, static_cast<f16*>(p.out) + at, p.out_stride, rows, to - from);
        }

        void multiply(int64_t row, int64_t rows, int64_t from, int64_t to, int64_t w, float* out,
                      int64_t stride) {
            const MicroKernel& kernel = run_.kernel;
            const int64_t length = least(run_.chunk, b.p1 - w);
            const bool adds = w > 0 || run_.p.add;
            for (int64_t j = from; j < to; j += kernel.cols) {
                const uint32_t* right = b.at(j, w);
                // The next columns of b come into the second cache while rows of a pass over these.
                const bool last = j + kernel.cols >= to;
                const int64_t share = parts(4 * kernel.cols * length, parts(rows, kernel.rows));
                Ahead ahead{reinterpret_cast<const char*>(last ? right : b.at(j + kernel.cols, w)),
                            last ? 0 : parts(share, std::max<int64_t>(length, 1))};
                for (int64_t i = 0; i < rows; i += kernel.rows) {
                    const uint32_t* left = shared_a ? shared_a->at(row + i, w) : a.at(i, w);
                    float* tile = out + i * stride + j - from;
                    const int64_t down = rows - i, across = to - j;
                    if (down >= kernel.rows && across >= kernel.cols) {
                        kernel.multiply(length, left, right, tile, stride, adds, ahead);
                        ahead.from += ahead.step * length;
                        continue;
                    }
                    kernel.multiply(length, left, right, edge.get(), kernel.cols, false, ahead);
                    for (int64_t r = 0; r < least(down, kernel.rows); ++r)
                        for (int64_t c = 0; c < least(across, kernel.cols); ++c) {
                            float& cell = tile[r * stride + c];
                            float sum = edge.get()[r * kernel.cols + c];
                            cell = adds ? cell + sum : sum;
                        }
                }
            }
        }
    };
};

}  // namespace

std::vector<const MicroKernel*> micro_kernels(Dtype dtype) {
    std::vector<const MicroKernel*> out;
    for (auto* kernel : {&amx_bf16_kernel, &avx512_bf16_kernel, &avx512_kernel, &avx2_kernel, &neon_kernel,
                         &portable_kernel})
        if (kernel->works && kernel->works() && (!kernel->pairs || dtype == Dtype::bf16))
            out.push_back(kernel);
    return out;
}

const MicroKernel* micro_kernel(Dtype dtype, const std::string& name) {
    for (auto* kernel : micro_kernels(dtype))
        if (name == kernel->name) return kernel;
    return nullptr;
}

void product(const Product& p, const MicroKernel& kernel, int threads) {
    if (p.finish && p.k > FINISH_WORDS) throw std::invalid_argument("product: k is too long to finish");
    if (p.m > 0 && p.n > 0) Run(p, kernel, threads)();
}

}  // namespace fastpref
