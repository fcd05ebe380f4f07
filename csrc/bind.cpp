// The binding: tensors arrive as addresses with sizes and strides, so no torch is included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>

#include "column_choice.h"
#include "columns.h"
#include "product.h"
#include "tile.h"

namespace py = pybind11;
using namespace fastpref;
using Address = uintptr_t;  // 0 is null

template <class T> static T* at(Address a) { return reinterpret_cast<T*>(a); }

static Dtype dtype_of(int code) {
    if (code < 0 || code > 2) throw std::invalid_argument("dtype code: expected 0, 1 or 2");
    return static_cast<Dtype>(code);
}

static Tile tile_of(Address data, int dtype, int64_t rows, int64_t cols, int64_t stride, int64_t col0,
                    Address labels) {
    if (rows < 0 || cols < 0) throw std::invalid_argument("tile: expected sizes of at least 0");
    return {at<void>(data), dtype_of(dtype), rows, cols, stride, col0, at<int64_t>(labels)};
}

PYBIND11_MODULE(MODULE, m) {
    m.doc() = "fastpref's tile primitives for CPUs; fastpref.backends.native is the caller.";
    m.def("isa", &isa);
    m.def("is_amd", &is_amd);
    m.def("fold", [](Address data, int dtype, int64_t rows, int64_t cols, int64_t stride, int64_t col0,
                     Address labels, float scale, float softcap, float inv_temperature, Address max,
                     Address sum, Address target, Address lse, Address logps, Address weighted,
                     Address total, Address squared, Address argmax, int threads) {
        Tile tile = tile_of(data, dtype, rows, cols, stride, col0, labels);
        Stats stats{at<float>(max),   at<float>(sum),     at<float>(target),
                    at<float>(lse),   at<float>(logps),   at<float>(weighted),
                    at<float>(total), at<float>(squared), at<int64_t>(argmax)};
        py::gil_scoped_release release;
        fold(tile, {scale, softcap, inv_temperature}, stats, threads);
    });
    m.def("grad", [](Address data, int dtype, int64_t rows, int64_t cols, int64_t stride, int64_t col0,
                     Address labels, float scale, float softcap, float inv_temperature, Address lse,
                     Address logps, Address dlogp, Address entropy, Address dentropy, Address out,
                     int out_dtype, int64_t out_stride, int threads) {
        Tile tile = tile_of(data, dtype, rows, cols, stride, col0, labels);
        GradRows g{at<float>(lse), at<float>(logps), at<float>(dlogp), at<float>(entropy),
                   at<float>(dentropy)};
        Dtype out_type = dtype_of(out_dtype);
        py::gil_scoped_release release;
        grad(tile, {scale, softcap, inv_temperature}, g, at<void>(out), out_type, out_stride, threads);
    });
    m.def("product_kernels", [](int dtype) {
        std::vector<std::string> names;  // the fastest first
        for (auto* kernel : micro_kernels(dtype_of(dtype))) names.push_back(kernel->name);
        return names;
    });
    m.def("product",
          [](Address a, int64_t a_row, int64_t a_k, Address b, int64_t b_row, int64_t b_k, int dtype,
             Address out, int out_dtype, int64_t out_stride, int64_t rows, int64_t cols, int64_t k,
             Address index, Address last, const std::string& name, int threads) {
        if ((a_row != 1 && a_k != 1) || (b_row != 1 && b_k != 1) || (index && b_row != 1))
            throw std::invalid_argument("product: expected operands with a stride of 1");
        Dtype type = dtype_of(dtype), out_type = dtype_of(out_dtype);
        const MicroKernel* kernel = micro_kernel(type, name);
        if (!kernel) throw std::invalid_argument("product: this processor has no kernel named " + name);
        // With index, element p of b's rows stands where element index[p] does; the last one at `last`, if given.
        std::vector<const void*> columns(index ? size_t(k) : 0);
        for (size_t p = 0; p < columns.size(); ++p)
            columns[p] = last && p + 1 == columns.size()
                             ? at<void>(last)
                             : at<char>(b) + at<int64_t>(index)[p] * b_k * (type == Dtype::f32 ? 4 : 2);
        Product p{{at<void>(a), type, a_row, a_k},
                  {at<void>(b), type, b_row, index ? 0 : b_k, index ? columns.data() : nullptr},
                  rows,
                  cols,
                  k,
                  at<void>(out),
                  out_type,
                  out_stride};
        py::gil_scoped_release release;
        product(p, *kernel, threads);
    });
    m.def("peak_rate", [](int dtype, const std::string& name, int threads, double seconds) {
        const MicroKernel* kernel = micro_kernel(dtype_of(dtype), name);
        if (!kernel) throw std::invalid_argument("peak_rate: this processor has no kernel named " + name);
        py::gil_scoped_release release;
        return peak_rate(*kernel, threads, seconds);
    });
    m.attr("finish_words") = FINISH_WORDS;
    m.attr("column_block") = COLUMN_BLOCK;
    m.attr("slice") = SLICE;
    m.def("logit_free_forward",
          [](Address x, int64_t x_stride, Address weight, int64_t weight_stride, int dtype, int64_t tokens,
             int64_t vocab, int64_t hidden, Address labels, Address bias, float scale, float softcap,
             float inv_temperature, Address max, Address sum, Address target, Address lse, Address logps,
             Address weighted, Address total, Address squared, Address argmax, Address d, int64_t d_stride,
             Address row_scale, Address u, int64_t u_stride, const std::string& name, int threads) {
        Dtype type = dtype_of(dtype);
        const MicroKernel* kernel = micro_kernel(type, name);
        if (!kernel)
            throw std::invalid_argument("logit_free_forward: this processor has no kernel named " + name);
        Stats stats{at<float>(max),   at<float>(sum),     at<float>(target),
                    at<float>(lse),   at<float>(logps),   at<float>(weighted),
                    at<float>(total), at<float>(squared), at<int64_t>(argmax)};
        LogitFree head{{at<void>(x), type, x_stride, 1},
                       {at<void>(weight), type, weight_stride, 1},
                       tokens,
                       vocab,
                       hidden,
                       at<int64_t>(labels),
                       at<float>(bias),
                       {scale, softcap, inv_temperature},
                       stats,
                       at<void>(d),
                       d_stride,
                       at<float>(row_scale),
                       at<void>(u),
                       u_stride};
        py::gil_scoped_release release;
        logit_free_forward(head, *kernel, threads);
    });
    m.def("column_sums",
          [](Address d, int dtype, int64_t rows, int64_t cols, int64_t stride, Address row_scale,
             Address squares, Address totals, Address row_sums, int threads) {
        ColumnSums s{at<void>(d),
                     dtype_of(dtype),
                     rows,
                     cols,
                     stride,
                     at<float>(row_scale),
                     at<float>(squares),
                     at<float>(totals),
                     at<float>(row_sums)};
        py::gil_scoped_release release;
        column_sums(s, threads);
    });
    m.def("choose_columns", [](Address squares, Address distance, int64_t cols, Address labels,
                               int64_t rows, double wanted, double head_wanted, double tolerance,
                               double head_tolerance, uint64_t state, Address index, Address factor) {
        ColumnChoice s{at<float>(squares),
                       at<float>(distance),
                       cols,
                       at<int64_t>(labels),
                       rows,
                       {wanted, head_wanted},
                       {tolerance, head_tolerance},
                       state,
                       at<int64_t>(index),
                       at<float>(factor)};
        ColumnCounts found;
        {
            py::gil_scoped_release release;
            found = choose_columns(s);
        }
        return py::make_tuple(found.count, found.kept, found.variance[0], found.variance[1]);
    });
    m.def("gather_columns", [](Address d, int dtype, int64_t rows, int64_t stride, Address index,
                               int64_t count, int64_t kept, Address factor, Address mean, Address row_sums,
                               Address out, int64_t out_stride, Address rest, int threads) {
        GatherColumns s{at<void>(d),
                        dtype_of(dtype),
                        rows,
                        stride,
                        at<int64_t>(index),
                        count,
                        kept,
                        at<float>(factor),
                        at<float>(mean),
                        at<float>(row_sums),
                        at<void>(out),
                        out_stride,
                        at<float>(rest)};
        py::gil_scoped_release release;
        gather_columns(s, threads);
    });
    m.def("weighted_rows", [](Address weight, int dtype, int64_t rows, int64_t cols, int64_t stride,
                              Address q, int64_t count, Address out, int threads) {
        WeightedRows s{at<void>(weight), dtype_of(dtype), rows,  cols,
                       stride,           at<float>(q),    count, at<float>(out)};
        py::gil_scoped_release release;
        weighted_rows(s, threads);
    });
    py::list names;
    for (const char* name : PAIR_FORMS) names.append(name);
    m.attr("pair_forms") = py::tuple(names);
    m.def("pair_loss", [](int form, int64_t tokens, int64_t pairs, Address logps, Address sequence_ids,
                          Address ref_logps, Address lengths, Address weight, Address margin, double beta,
                          double label_smoothing, double option, double shape, Address out_loss,
                          Address sequence_logps, Address rewards, Address dlogp) {
        if (form < 0 || form >= int(std::size(PAIR_FORMS)))
            throw std::invalid_argument("loss code: expected a place in pair_forms");
        PairLoss in{static_cast<PairForm>(form),
                    tokens,
                    pairs,
                    at<float>(logps),
                    at<int64_t>(sequence_ids),
                    at<float>(ref_logps),
                    at<float>(lengths),
                    at<float>(weight),
                    at<float>(margin),
                    beta,
                    label_smoothing,
                    option,
                    shape};
        PairLossOut out{at<float>(out_loss), at<float>(sequence_logps), at<float>(rewards),
                        at<float>(dlogp)};
        py::gil_scoped_release release;
        pair_loss(in, out);
    });
}
