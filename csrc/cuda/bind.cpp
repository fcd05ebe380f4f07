// The binding of fastpref._cuda: tensors arrive as addresses, the stream as its handle.
#include <pybind11/pybind11.h>

#include <iterator>
#include <stdexcept>

#include "launch.h"

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

#define TILE                                                                                           \
    Address data, int dtype, int64_t rows, int64_t cols, int64_t stride, int64_t col0, Address labels, \
        float scale, float softcap, float inv_temperature
#define OUT Address out, int out_dtype, int64_t out_stride
#define WHERE int device, Address stream, int clusters

PYBIND11_MODULE(MODULE, m) {
    m.doc() = "fastpref's tile primitives for NVIDIA GPUs; fastpref.backends.cuda is the caller.";
#ifdef FASTPREF_EMULATE
    m.attr("emulated") = true;
#else
    m.attr("emulated") = false;
#endif
    py::list names;
    for (const char* name : PAIR_FORMS) names.append(name);
    m.attr("pair_forms") = py::tuple(names);
    // (error's name or None, its message, the architecture of the kernels, runtime, driver)
    m.def("ready", [](int device) {
        cuda::Ready r = cuda::ready(device);
        py::object name = py::none(), message = py::none();
        if (r.error) name = py::str(r.error), message = py::str(r.message);
        return py::make_tuple(name, message, r.architecture, r.runtime, r.driver);
    });
    m.def("fold",
          [](TILE, Address max, Address sum, Address target, Address lse, Address logps, Address weighted,
             Address total, Address squared, Address argmax, Address exact, OUT, WHERE) {
        Tile tile = tile_of(data, dtype, rows, cols, stride, col0, labels);
        Stats stats{at<float>(max),   at<float>(sum),     at<float>(target),
                    at<float>(lse),   at<float>(logps),   at<float>(weighted),
                    at<float>(total), at<float>(squared), at<int64_t>(argmax)};
        Dtype type = dtype_of(out_dtype);
        py::gil_scoped_release release;
        cuda::fold(tile, {scale, softcap, inv_temperature}, stats, at<float>(exact), at<void>(out), type,
                   out_stride, {device, stream, clusters});
    });
    m.def("grad", [](TILE, Address lse, Address logps, Address dlogp, Address entropy, Address dentropy,
                     OUT, WHERE) {
        Tile tile = tile_of(data, dtype, rows, cols, stride, col0, labels);
        GradRows g{at<float>(lse), at<float>(logps), at<float>(dlogp), at<float>(entropy),
                   at<float>(dentropy)};
        Dtype type = dtype_of(out_dtype);
        py::gil_scoped_release release;
        cuda::grad(tile, {scale, softcap, inv_temperature}, g, at<void>(out), type, out_stride,
                   {device, stream, clusters});
    });
    m.attr("forward_tile") = cuda::FORWARD_TILE;
    m.def("forward_works", &cuda::forward_works);
    m.def("forward", [](Address x, Address weight, int dtype, int64_t tokens, int64_t vocab, int64_t hidden,
                        int64_t x_stride, int64_t weight_stride, Address labels, float scale, float softcap,
                        float inv_temperature, Address bias, Address partial, Address sum, Address lse,
                        Address logps, Address weighted, Address total, Address squared, Address argmax,
                        Address d, int64_t d_stride, Address row_scale, int device, Address stream) {
        cuda::ForwardCall call{at<void>(x),
                               at<void>(weight),
                               dtype_of(dtype),
                               tokens,
                               vocab,
                               hidden,
                               x_stride,
                               weight_stride,
                               {scale, softcap, inv_temperature},
                               at<int64_t>(labels),
                               at<float>(bias),
                               at<float>(partial),
                               {nullptr, at<float>(sum), nullptr, at<float>(lse), at<float>(logps),
                                at<float>(weighted), at<float>(total), at<float>(squared),
                                at<int64_t>(argmax)},
                               at<void>(d),
                               d_stride,
                               at<float>(row_scale)};
        if (call.dtype == Dtype::f32) throw std::invalid_argument("dtype code: expected 1 or 2");
        if (d && !row_scale) throw std::invalid_argument("row_scale: expected it with d");
        if (d && call.dtype != Dtype::bf16) throw std::invalid_argument("dtype code: expected 1 with d");
        py::gil_scoped_release release;
        cuda::forward(call, {device, stream, 1});
    });
    m.def("pair_loss",
          [](int form, int64_t tokens, int64_t pairs, Address logps, Address sequence_ids,
             Address ref_logps, Address lengths, Address weight, Address margin, double beta,
             double label_smoothing, double option, double shape, Address loss, Address sequence_logps,
             Address rewards, Address dlogp, Address starts, Address slopes, int device, Address stream) {
        if (form < 0 || form >= int(std::size(PAIR_FORMS)))
            throw std::invalid_argument("loss code: unknown");
        cuda::PairArgs args{static_cast<PairForm>(form),
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
                            shape,
                            at<float>(loss),
                            at<float>(sequence_logps),
                            at<float>(rewards),
                            at<float>(dlogp),
                            at<int64_t>(starts),
                            at<float>(slopes)};
        py::gil_scoped_release release;
        cuda::pair_loss(args, {device, stream, 1});
    });
}
