"""Common GPUs and CPUs: memory, and the rates that their vendors list.

A GPU's `flops` are those of dense bf16 GEMMs with fp32 sums. A CPU's are those of fp32: cores times
clock rate times multiply-adds per cycle. The GEMMs of training reach the fraction `REACHED` of
them. The other work of a step has rates of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastpref.backends.host_memory import memory_limit
from fastpref.planning.times import Rates

REACHED = {"gpu": 0.5, "cpu": 0.6}
_CALL = 10e-6  # seconds that the host takes for an operation
_LINK_REACHED = 0.7  # of a link's rate, by collectives of large messages
_PCIE_4, _PCIE_5 = 32e9, 64e9  # bytes a second of 16 lanes, each way


@dataclass(frozen=True)
class Device:
    """A device of the table.

    Attributes:
        name: with its memory.
        kind: "gpu" or "cpu".
        memory: bytes.
        flops, bandwidth: FLOPs and bytes in a second.
        link: bytes that it sends in a second to others in the same machine; 0 for a CPU.
        peers: links of that rate, each to one other device; 1: a link to all of them together.
    """

    name: str
    kind: str
    memory: int
    flops: float
    bandwidth: float
    link: float = 0.0
    peers: int = 1

    def rates(self, bf16: bool, devices: int = 1) -> Rates | None:
        """Its rates in training, one of several devices; None in a dtype that is not listed.

        bf16: whether matrix products are in bf16, as listed for a GPU, and not in fp32, as for a
            CPU.
        """
        if bf16 != (self.kind == "gpu"):
            return None
        reached = REACHED[self.kind]
        flops = reached * self.flops
        moved = 0.8 * self.bandwidth
        link = _LINK_REACHED * self.link * max(min(self.peers, devices - 1), 1)
        return Rates(self.name, flops, flops, moved, moved, _CALL, measured=False, link=link)


MIB = 2**20
# Rates: dense bf16 with fp32 sums and memory bandwidth. They are of NVIDIA's architecture papers of
# GA102 (3090), Ada (4090) and RTX Blackwell (5090), of its data sheets of the L4, A10, L40S, A100
# (40 GB: 1,555 GB/s; SXM 80 GB: 2,039 GB/s), H100 SXM, H200 SXM and HGX B200, whose tables halve
# for products without sparsity, and of AMD's data sheet of the MI300X.
# Links, each way: NVLink of the A100, H100, H200 and B200, Infinity Fabric of the MI300X to each of
# the seven others of a node, and PCIe of the others.
# Memory: what nvidia-smi and rocm-smi show as a device's total. The error correction of the A10, L4
# and L40S takes a part of what their names say.
DEVICES = (
    Device("RTX 3090 24GB", "gpu", 24576 * MIB, 71e12, 936e9, _PCIE_4),
    Device("RTX 4090 24GB", "gpu", 24564 * MIB, 165.2e12, 1008e9, _PCIE_4),
    Device("RTX 5090 32GB", "gpu", 32607 * MIB, 209.5e12, 1792e9, _PCIE_5),
    Device("L4 24GB", "gpu", 23034 * MIB, 121e12, 300e9, _PCIE_4),
    Device("A10 24GB", "gpu", 23028 * MIB, 125e12, 600e9, _PCIE_4),
    Device("L40S 48GB", "gpu", 46068 * MIB, 362e12, 864e9, _PCIE_4),
    Device("A100 40GB", "gpu", 40960 * MIB, 312e12, 1555e9, 300e9),
    Device("A100 80GB", "gpu", 81920 * MIB, 312e12, 2039e9, 300e9),
    Device("H100 80GB", "gpu", 81559 * MIB, 989.4e12, 3350e9, 450e9),
    Device("H200 141GB", "gpu", 143771 * MIB, 989.4e12, 4800e9, 450e9),
    Device("B200 180GB", "gpu", 183359 * MIB, 2250e12, 8000e9, 900e9),
    Device("MI300X 192GB", "gpu", 196592 * MIB, 1307.4e12, 5300e9, 64e9, 7),
    Device("desktop, 8 AVX2 cores, 32GB", "cpu", 32768 * MIB, 0.9e12, 60e9),
    Device("server, 32 AVX-512 cores, 256GB", "cpu", 262144 * MIB, 5e12, 300e9),
)


def find_device(text: str) -> Device:
    """The device of the table whose name has these words, such as "h100" or "A100 40GB".

    Raises:
        ValueError: none or several.
    """
    asked = set(_words(text))
    found = [d for d in DEVICES if asked and asked <= set(_words(d.name))]
    if not found and "-" in text:  # as in "A100-40GB"
        return find_device(text.replace("-", " "))
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"'{d.name}'" for d in (found or DEVICES))
    raise ValueError(f"device: got {text!r}, expected one of {names}")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9-]+", text.lower())


def own_device() -> Device | None:
    """The table's entry of this machine's first GPU; None without a GPU, or if it has none.

    A variant with other rates, such as a card for PCIe, has no entry.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return _matching(properties.name, properties.total_memory)


def _matching(name: str, memory: int) -> Device | None:
    """The table's entry of a GPU by the driver's name for it, and its bytes."""
    words = set(_words(name.replace("-", " ")))
    if words & {"pcie", "nvl", "laptop", "ti", "super", "d"}:
        return None
    for device in DEVICES:
        named = set(_words(device.name)[:-1]) <= words
        if device.kind == "gpu" and named and abs(memory / device.memory - 1) < 0.1:
            return device
    return None


# K, KB: 1000; KI, KIB: 1024; and so on. No unit: bytes.
_UNITS = {"": 1.0}
for _power, _letter in enumerate("KMGTP", 1):
    _UNITS |= dict.fromkeys((_letter, f"{_letter}B"), 1000.0**_power)
    _UNITS |= dict.fromkeys((f"{_letter}I", f"{_letter}IB"), 1024.0**_power)
_LEAST_MEMORY = 10**6  # bytes; less is a unit that was forgotten


def parse_memory(text: str) -> int:
    """Bytes of a text such as 24GB, 24G, 24GiB or 800MB. Raises ValueError."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    unit = "" if found is None else found[2].upper()
    if found is None or unit not in _UNITS or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(
            f"memory: got {text!r}, expected a size such as 24GB, 24GiB, 800MB or 1.5TB"
        )
    exact = float(found[1]) * _UNITS[unit]
    size = int(exact) if exact < 2**62 else 0
    if size < _LEAST_MEMORY:
        expected = "a size from 1 MB to 4 EiB" + ("" if unit else ", with its unit, such as 24GB")
        raise ValueError(f"memory: got {text!r}, expected {expected}")
    return size


def own_memory(kind: str) -> int:
    """The bytes of memory of this machine or container ("cpu"), or of its first GPU ("cuda").

    Raises:
        ValueError: a system that does not tell, or that has no GPU.
    """
    import torch

    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "memory: this machine has no GPU; expected the memory of one, such as 24GB, or its "
                "name as --device"
            )
        return torch.cuda.get_device_properties(0).total_memory
    limit = memory_limit()
    if limit is None:
        raise ValueError("memory: this system does not tell; pass it, such as 24GB")
    return limit
