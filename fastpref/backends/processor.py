"""What the CPU can do, as the system lists it, and what follows for training."""

from __future__ import annotations

import functools
import logging
import platform
from pathlib import Path

import torch

logger = logging.getLogger("fastpref")

# What the kernels and torch's GEMMs make use of, as Linux names it on x86 and on Arm.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_X86 = ("avx2", "fma", *_AVX512, "avx512_bf16", "amx_bf16")
FEATURES = (*_X86, "asimd", "sve", "bf16")
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


@functools.cache
def read_processor() -> tuple[str, dict[str, bool] | None]:
    """The CPU's model and which of FEATURES it has; None where the system does not list them."""
    model, flags = platform.processor() or platform.machine(), None
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return model, None if flags is None else {name: name in flags for name in FEATURES}


def lacking(features: dict[str, bool] | None) -> list[str]:
    """The features that this CPU lacks, each with what follows for training, a line each."""
    if features is None:
        return []
    lines = []
    if not features["asimd"]:  # x86
        if not (features["avx2"] and features["fma"]):
            lines.append("AVX2 and FMA: the native kernels run in SSE2, several times slower")
        missing = [name for name in _AVX512 if not features[name]]
        if missing:
            lines.append(
                f"AVX-512 ({', '.join(missing)}): the native products take AVX2, at half the "
                "multiplications a cycle"
            )
        if not (features["avx512_bf16"] or features["amx_bf16"]):
            lines.append(
                "AVX512-BF16 or AMX (avx512_bf16, amx_bf16): the native products widen bf16 to "
                "fp32 while they pack it, and run at fp32's rate"
            )
    if not any(features[name] for name in BF16_UNITS):
        units = "amx_bf16 or avx512_bf16" if not features["asimd"] else "bf16"
        lines.append(
            f"bf16 units ({units}): bf16 is many times slower than fp32 here; training takes fp32 "
            "unless told otherwise"
        )
    return lines


def training_device(use_cpu: bool = False) -> str:
    """The kind of device that training takes: the accelerator, if there is one, or the CPU."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def bf16_is_fast(device: str) -> bool:
    """Whether a kind of device multiplies bf16 matrices in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return True
    features = read_processor()[1] or {}
    return any(features.get(name) for name in BF16_UNITS)


@functools.cache
def say_once(sentence: str) -> None:
    """Log a warning, the first time that this process has it."""
    logger.warning(sentence)
