"""Where Triton kernels run in tests: on the GPU if there is one, and otherwise in the interpreter.

Import it before triton and before anything of fastpref.kernels: triton decides when a kernel is
defined whether it will be interpreted. Skips the importing module where triton is not installed.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"


def _exact_bf16() -> None:
    """The interpreter keeps bf16 as its bit pattern: it multiplies the patterns in tl.dot, and
    truncates where a GPU rounds to nearest. Both are put right here."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(x):
        bits = np.ascontiguousarray(x).view(np.uint32)
        to_even = (bits >> 16) & 1
        nearest = ((bits.astype(np.uint64) + 0x7FFF + to_even) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)

    def create_dot(self, a, b, d, *args, **kwargs):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *args, **kwargs)
        product = np.matmul(widened(a.data), widened(b.data), dtype=d.data.dtype)
        return handle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return handle(widened(src.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return handle(rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _fewer_look_ups() -> None:
    """Whenever a kernel calls a function, the interpreter looks through all of triton.language for
    what it replaces, which the kernel's start has replaced already, and it makes a table of dtypes
    for each operation: more than a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_attr, np_dtype = interpreter._patch_attr, interpreter._get_np_dtype
    builtins: dict[object, list[str]] = {}
    dtypes: dict[str, object] = {}

    def patch_builtin(package, *rest):
        if package not in builtins:
            members = inspect.getmembers(package, tl.core.is_builtin)
            builtins[package] = [name for name, _ in members]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not replaced already
                patch_attr(package, name, member, *rest)

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype(dtype.scalar)
        return dtypes[name]

    def patch_lang(function):
        seen = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()  # nothing to replace, and nothing to restore
        return patch_all(function)

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype
    patch_all = interpreter._patch_lang
    if hasattr(interpreter, "_LangPatchScope"):  # not in the oldest triton
        interpreter._patch_lang = patch_lang


def _fewer_types() -> None:
    """The interpreter makes a type of a block, with its shape and its name, several times for each
    operation, and the shape of a tensor for each tensor: a third of its time. Equal types are one
    object here, which keeps what a tensor of it has."""
    import triton.language as tl

    block_type, tensor = tl.block_type, tl.tensor
    make_type, make_tensor = block_type.__init__, tensor.__init__
    types_equal, tuples_equal = block_type.__eq__, tl.tuple.__eq__
    types: dict[object, object] = {}

    def shared_type(cls, element_ty=None, shape=()):
        if cls is not block_type or type(element_ty) is not tl.dtype:  # a pointer has more parts
            return object.__new__(cls)
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in types:
            made = object.__new__(cls)
            make_type(made, element_ty, shape)
            types[key] = made
        return types[key]

    def type_init(self, element_ty, shape):
        if "name" not in vars(self):
            make_type(self, element_ty, shape)

    def tensor_init(self, handle, type):
        parts = vars(type).get("parts_of_tensors")
        if parts is None:
            make_tensor(self, handle, type)
            type.parts_of_tensors = {k: v for k, v in vars(self).items() if k != "handle"}
        else:
            self.handle = handle
            vars(self).update(parts)

    def type_eq(self, other):
        return self is other or types_equal(self, other)

    def tuple_eq(self, other):
        if type(other) is tl.tuple:  # without a copy whose numbers are no longer constexpr
            return tl.constexpr(self.values == other.values)
        return tuples_equal(self, other)

    block_type.__new__, block_type.__init__, block_type.__eq__ = shared_type, type_init, type_eq
    tensor.__init__ = tensor_init
    tl.tuple.__eq__ = tuple_eq


if INTERPRETED:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before triton_interpret could set TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    _exact_bf16()
    _fewer_look_ups()
    _fewer_types()
