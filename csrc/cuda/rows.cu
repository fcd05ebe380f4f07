// grad, one pass over the rows of a tile, and the launches of fold and grad.
#include <algorithm>

#include "fold.h"

namespace fastpref::cuda {
namespace {

constexpr int MAX_COLUMNS = 1 << 30;  // of a row, so that its columns are int

struct GradArgs {
    const void* tile;
    const int64_t* labels;
    int64_t stride, col0;
    int columns;
    bool aligned, out_aligned, narrower;
    Affine affine;
    GradRows rows;
    void* out;
    int64_t out_stride;
    Dtype out_dtype;
};

// In place, a thread writes where it has read, unless the gradient is narrower. Then columns [a, b)
// of a float32 row, bytes 4a to 4b, go to bytes 2a to 2b: over earlier columns or over these, which
// other threads read. So a turn's columns are read, then comes a barrier, and then they are written.
// The next turn's may be read ahead of that, for they start at byte 4b.
template <class T, bool CAP>
KERNEL(512, 2) grad_kernel(const GradArgs a) {
    constexpr int E = WIDTH<T>, N = 16;
    // From the last row to the first: the last ones that fold read are those still in the cache.
    const int64_t row = blocks() - 1 - block(), label = a.labels[row];
    void* out = row_of(a.out, a.out_dtype, row, a.out_stride);
    if (label < 0) {
        write_zeros(out, a.out_dtype, a.columns, 0, 1);
        return;
    }
    const T* x = static_cast<const T*>(a.tile) + row * a.stride;
    const int64_t y = label - a.col0;
    const float inner = a.affine.inner, outer = a.affine.outer, slope = a.affine.slope;
    const float lse = a.rows.lse[row];
    const float gain = slope * (a.rows.dlogp ? a.rows.dlogp[row] : 1.f);
    const float entropy = a.rows.entropy ? a.rows.entropy[row] : 0.f;
    const float entropy_gain = a.rows.entropy ? slope * a.rows.dentropy[row] : 0.f;
    // The label's entry comes from its log-prob, which may be more exact than its logit.
    const float logp_label = a.rows.logps[row], lacking = -expm1f(logp_label);
    const float at_label =
        gain * lacking - entropy_gain * (1.f - lacking) * (fmaxf(logp_label, -200.f) + entropy);

    const int step = threads() * E, first = thread() * E;
    for (int start = first; start - first < a.columns; start += N / E * step) {
        float z[N];
        read_logits<N>(x, start, step, a.columns, a.aligned, z);
        if (a.narrower) sync();
        int column = start;
        // clang-format off: it loses the place of a file's first UNROLL
        UNROLL for (int i = 0; i < N / E; ++i, column += step) {
        // clang-format on
            if (column >= a.columns) break;
            float d[E], flat[E];
            UNROLL for (int j = 0; j < E; ++j) {
                float v = z[i * E + j];
                if (CAP) {
                    v = hyperbolic_tangent(v * inner);
                    flat[j] = flatness(v);
                }
                const float logp = v * outer - lse;
                d[j] = -(exponential(logp) * fmaf(fmaxf(logp, -200.f) + entropy, entropy_gain, gain));
            }
            if (column <= y && y < column + E)
                UNROLL for (int j = 0; j < E; ++j) d[j] = column + j == y ? at_label : d[j];
            if (CAP)
                UNROLL for (int j = 0; j < E; ++j) d[j] *= flat[j];
            write_gradients<E>(out, a.out_dtype, column, a.columns - column, a.out_aligned, d);
        }
    }
}

using GradKernel = void (*)(GradArgs);

GradKernel grad_kernel_for(Dtype dtype, bool cap) {
    if (dtype == Dtype::f32) return cap ? grad_kernel<float, true> : grad_kernel<float, false>;
    if (dtype == Dtype::bf16) return cap ? grad_kernel<bf16, true> : grad_kernel<bf16, false>;
    return cap ? grad_kernel<f16, true> : grad_kernel<f16, false>;
}

FoldKernel fold_kernel_for(Dtype dtype, bool cap, bool extras, bool deep) {
    if (dtype == Dtype::f32) return fold_kernel_of<float>(cap, extras, deep);
    if (dtype == Dtype::bf16) return fold_kernel_of<bf16>(cap, extras, deep);
    return fold_kernel_of<f16>(cap, extras, deep);
}

int divide_up(int a, int b) { return (a + b - 1) / b; }
int warps_for(int threads) { return divide_up(threads, 32) * 32; }

// How a row is shared out. It depends on the row's length, its dtype, the softcap and the GPU, for the
// order of its sums must not depend on what else is asked for.
struct Shape {
    bool deep, fits;  // fits: all of the row is in registers at once
    int cluster, threads;
};

Shape shape_of(int columns, int clusters, int deep_logits) {
    int cluster = 1;
    while (cluster < clusters && columns > cluster * PAIRED_THREADS * LOGITS) cluster *= 2;
    const int share = divide_up(columns, cluster);
    for (int most : {PAIRED_THREADS, MOST_THREADS})
        for (bool deep : {false, true}) {
            const int logits = deep ? deep_logits : LOGITS;
            if (share <= most * logits) return {deep, true, cluster, warps_for(divide_up(share, logits))};
        }
    return {false, false, cluster, PAIRED_THREADS};
}

void check_columns(const Tile& t) {
    if (t.cols > MAX_COLUMNS) throw std::invalid_argument("tile: too many columns");
}

}  // namespace

void grad(const Tile& t, const Transform& transform, const GradRows& rows, void* out, Dtype out_dtype,
          int64_t out_stride, const Where& where) {
    check_columns(t);
    if (t.rows == 0 || t.cols == 0) return;
    GradArgs a{t.data, t.labels, t.stride, t.col0, int(t.cols),
               starts_at_vectors(t.data, t.stride, size_of(t.dtype)),
               starts_at_vectors(out, out_stride, size_of(out_dtype)),
               size_of(out_dtype) < size_of(t.dtype),
               affine(transform), rows, out, out_stride, out_dtype};
    int threads = std::min(divide_up(a.columns, 16 * 32) * 32, 512);
    GradKernel kernel = grad_kernel_for(t.dtype, transform.softcap > 0);
    launch("grad", kernel, a, t.rows, threads, 1, where.device, where.stream);
}

void fold(const Tile& t, const Transform& transform, const Stats& stats, const float* exact, void* out,
          Dtype out_dtype, int64_t out_stride, const Where& where) {
    check_columns(t);
    if (t.rows == 0 || t.cols == 0) return;
    const bool cap = transform.softcap > 0, extras = stats.weighted || stats.argmax;
    if (out && t.col0 > 0) throw std::invalid_argument("fold: D needs whole rows");
    Shape shape = shape_of(int(t.cols), where.clusters, deep_logits(size_of(t.dtype), cap));
    FoldArgs a{t.data, t.labels, t.stride, t.col0, int(t.cols), shape.cluster,
               starts_at_vectors(t.data, t.stride, size_of(t.dtype)),
               starts_at_vectors(out, out_stride, size_of(out_dtype)),
               affine(transform), stats, exact, shape.fits ? out : nullptr, out_stride, out_dtype};
    FoldKernel kernel = fold_kernel_for(t.dtype, cap, extras, shape.deep);
    launch("fold", kernel, a, t.rows * shape.cluster, shape.threads, shape.cluster, where.device,
           where.stream);
    if (out && !shape.fits)
        grad(t, transform, {stats.lse, stats.logps, nullptr, nullptr, nullptr}, out, out_dtype,
             out_stride, where);
}

Ready ready([[maybe_unused]] int device) {
#ifdef FASTPREF_EMULATE
    return {nullptr, nullptr, 90, 0, 0};
#else
    Ready r{nullptr, nullptr, 0, 0, 0};
    cudaRuntimeGetVersion(&r.runtime);
    cudaDriverGetVersion(&r.driver);
    cudaFuncAttributes found{};
    auto* kernel = reinterpret_cast<const void*>(static_cast<GradKernel>(grad_kernel<float, false>));
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, kernel);
    cudaGetLastError();  // an answer, not an error that a later call should report
    r.architecture = found.ptxVersion;
    if (error != cudaSuccess) r.error = cudaGetErrorName(error), r.message = cudaGetErrorString(error);
    return r;
#endif
}

}  // namespace fastpref::cuda
