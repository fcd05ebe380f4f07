"""How the logit-free product is compiled for which GPU, and what its inputs have to be.

Needs no triton: the CUDA backend's product takes the same inputs.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
# Per-tile results of one launch: 2^24 pairs of floats, 128 MiB. More tokens take several launches.
_MAX_PARTIALS = 2**24
TESTED = ("sm_80", "sm_90", "sm_100", "gfx942")  # compiled by the tests; others share theirs


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched.

    descriptors: loads through tensor descriptors (TMA), in a persistent kernel; otherwise through
    pointers (cp.async), one tile per program. flatten: one loop over tiles and hidden blocks, so
    that the next tile's loads run under this tile's epilogue. halves: the epilogue takes half a
    tile at a time, which saves registers where a thread holds several rows; where it holds one
    (sm_100) it would move the tile through shared memory. per_sm: programs that share a
    multiprocessor. registers: a limit per thread, so that they can.
    """

    descriptors: bool
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    flatten: bool = False
    halves: bool = True
    per_sm: int = 1
    registers: int | None = None

    def options(self) -> dict[str, object]:
        """The compiler's options. FP fusion is its default only up to triton 3.9."""
        options: dict[str, object] = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options

    def group(self, hidden_size: int) -> int:
        """Token blocks whose vocabulary tiles are computed together: what the L2 cache holds."""
        cache = 2**24 if self.descriptors else 2**22
        return max(4, min(32, cache // (2 * hidden_size * self.block_m)))


# The choice between them is by what they compile to (test_triton_forward_static.py) and by
# calculation; none has been timed.
_WIDE = Config(True, 128, 256, 64, warps=8, stages=4)
_WIDE_FLAT = Config(True, 128, 256, 64, warps=8, stages=4, flatten=True)
_NARROW = Config(True, 128, 128, 64, warps=8, stages=3, per_sm=2, registers=128)
_NARROW_CAP = Config(True, 128, 128, 64, warps=8, stages=4)
_TMEM = Config(True, 128, 256, 64, warps=8, stages=4, halves=False)
_TMEM_FLAT = Config(True, 128, 256, 64, warps=8, stages=4, flatten=True, halves=False)
_TMEM_BIAS = Config(True, 128, 128, 64, warps=8, stages=4, flatten=True, halves=False)
_POINTERS = Config(False, 128, 128, 32, warps=4, stages=4)
_POINTERS_CAP = Config(False, 128, 64, 32, warps=4, stages=4)
_CDNA = Config(False, 256, 128, 64, warps=8, stages=2, halves=False)
_ANY = Config(False, 64, 64, 32, warps=4, stages=2, halves=False)  # for any GPU and alignment


def has_config(arch: str) -> bool:
    """Whether some kernel is made for this GPU: any of NVIDIA's, and AMD's with CDNA 2 or later."""
    return not arch.startswith("gfx") or arch in ("gfx90a", "gfx942", "gfx950")


def config(
    arch: str | object,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    softcap: bool = False,
    bias: bool = False,
    aligned: bool = True,
) -> Config:
    """The shipped configuration for a GPU and a head; it never depends on the number of tokens.

    arch: "sm_90", "gfx942", ... or what torch.cuda.get_device_properties returns. aligned: the
    weight's rows start at multiples of 16 bytes; without that there are no descriptors and no
    asynchronous copies. ValueError for a dtype other than bfloat16 and float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected one of {DTYPES}")
    arch = arch if isinstance(arch, str) else arch_name(arch)
    if not aligned:
        return _ANY
    if arch.startswith("gfx"):
        return _CDNA if has_config(arch) else _ANY
    if arch == "sm_90":
        if hidden_size < 1024:  # short products: two programs in turn hide each other's epilogue
            return _NARROW
        additive = bias or vocab_size % _WIDE.block_n != 0
        return _WIDE if softcap and additive else _WIDE_FLAT
    if arch in ("sm_100", "sm_103"):
        if bias or vocab_size % _TMEM.block_n != 0:
            return _TMEM_BIAS
        return _TMEM if softcap else _TMEM_FLAT
    return _POINTERS


def grad_config(arch: str, *, hidden_size: int, softcap: bool) -> Config | None:
    """The configuration for a pass that writes D as well; None where none is good.

    On sm_100 the part of a tile that a thread holds does not fit its registers beside D's.
    """
    if arch.startswith("gfx"):
        return _CDNA if has_config(arch) else None
    if arch == "sm_90":
        if hidden_size < 1024 or softcap:  # a softcap takes registers
            return _NARROW_CAP if softcap else _NARROW
        return _WIDE_FLAT
    if arch in ("sm_100", "sm_103"):
        return None
    return _POINTERS_CAP if softcap else _POINTERS


class Case(NamedTuple):
    """One kernel that may run. additive: a bias, or a vocabulary that is no whole tiles."""

    arch: str
    config: Config
    softcap: bool
    additive: bool
    aligned: bool


def _shipped() -> tuple[Case, ...]:
    cases = []
    sizes = itertools.product((True, False), (512, 4096), (2**17, 2**17 + 128))
    for arch, (aligned, hidden, vocab) in itertools.product(TESTED, sizes):
        for softcap, bias in itertools.product((False, True), repeat=2):
            head = {"softcap": softcap, "bias": bias, "aligned": aligned}
            chosen = config(arch, hidden, vocab, torch.bfloat16, **head)
            additive = bias or vocab % chosen.block_n != 0
            cases.append(Case(arch, chosen, softcap, additive, aligned))
    return tuple(dict.fromkeys(cases))


SHIPPED = _shipped()


def arch_name(properties) -> str:
    """ "sm_90", "gfx942", ... from what torch.cuda.get_device_properties returns."""
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch_tokens(chosen: Config, tokens: int, vocab_size: int) -> int:
    """How many of the tokens one launch takes, so that its scratch memory stays within 128 MiB.

    That memory is 8 bytes for each of them and each chosen.block_n entries of the vocabulary; all
    launches use the same.
    """
    most = _MAX_PARTIALS // -(-vocab_size // chosen.block_n)
    return min(tokens, max(most // chosen.block_m, 1) * chosen.block_m)


def rows_are_aligned(matrix: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def with_aligned_rows(x: Tensor) -> Tensor:
    """x [N, H], or a copy, with adjacent columns and rows that start at multiples of 16 bytes.

    Only the weight decides on the kernel: a token's result must not depend on its batch.
    """
    if x.stride(1) == 1 and rows_are_aligned(x):
        return x
    n, hidden = x.shape
    return x.new_empty(n, -(-hidden // 8) * 8)[:, :hidden].copy_(x)


def padded_bias(bias: Tensor | None, weight: Tensor, size: int, scale: float) -> Tensor | None:
    """bias [V] or zeros as float32 [size], with what makes a logit -inf from V on; None where there
    is nothing to add. The scale comes after it."""
    vocab = weight.shape[0]
    if bias is None and size == vocab:
        return None
    added = weight.new_zeros(vocab, dtype=torch.float32) if bias is None else bias.float()
    value = -math.copysign(math.inf, scale)
    return torch.nn.functional.pad(added, (0, size - vocab), value=value)
