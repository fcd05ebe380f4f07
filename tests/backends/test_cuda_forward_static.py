"""What nvcc makes of the forward pass for Hopper: the instructions that it is made of."""

from __future__ import annotations

import re
from collections import Counter

import cuda_emulated  # noqa: F401  puts csrc/cuda on the path
import nvcc_build
import pytest
from test_cuda_static import NVCC, REGISTERS, cubin

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.slow,
]
THREADS = 384
LOGITS = 128  # of a tile in one thread


@pytest.fixture(scope="module")
def compiled():
    """ptxas's words, and the SASS of each kernel by its (mangled) name."""
    assert nvcc_build.architectures_of("forward.cu", ["80", "90", "120+PTX"]) == ["90a"]
    log, sass = cubin("forward.cu", "90a")
    if sass is None:
        pytest.skip("cuobjdump is not installed")
    parts = re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]
    return log, {p.split("\n", 1)[0].strip(): p for p in parts}


def _opcodes(sass: str) -> Counter[str]:
    return Counter(re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9._a-z]+)", sass, re.M))


def _name(dtype: str, cap: int, d: int, extras: int) -> str:
    return f"forward_kernelINS_{len(dtype)}{dtype}ELb{cap}ELb{d}ELb{extras}E"


def test_registers_and_products(compiled):
    """No product waits for the one before (ptxas would say that it serialises), and no spills but
    for a word or two of what stays the same in the loop over the tiles, where all comes together.
    """
    log, sass = compiled
    assert not re.search(r"serializ|serialis", log), log
    spills = re.findall(r"Function properties for (\w+)\n.*?(\d+) bytes spill stores", log)
    spilling = {name: int(size) for name, size in spills if size != "0"}
    assert len(spills) == len(sass) == 22
    assert all(_name("bf16", 1, 1, 1) in name and n <= 8 for name, n in spilling.items()), spilling
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", log)) * THREADS <= REGISTERS


@pytest.mark.parametrize("extras", [0, 1], ids=["", "extras"])
@pytest.mark.parametrize("dtype, d", [("bf16", 0), ("f16", 0), ("bf16", 1)])
@pytest.mark.parametrize("cap", [0, 1], ids=["plain", "softcap"])
def test_instructions(compiled, cap, dtype, d, extras):
    (sass,) = (s for n, s in compiled[1].items() if _name(dtype, cap, d, extras) in n)
    codes = _opcodes(sass)

    def count(prefix: str) -> int:
        return sum(n for code, n in codes.items() if code.startswith(prefix))

    kind = ".BF16" if dtype == "bf16" else ""  # fp16 goes without saying
    assert codes[f"HGMMA.64x128x16.F32{kind}"] == count("HGMMA") == 2 * 64 // 16
    assert codes["UTMALDG.2D"] == codes["UTMALDG.2D.MULTICAST"] == 1 and count("UTMALDG") == 2
    assert count("USETMAXREG") == 2  # the copying warpgroup gives registers to the others
    assert count("STL") <= (2 if cap and d and extras else 0)  # spills
    for forbidden in ("ATOM", "RED"):  # sums in any order
        assert not count(forbidden), forbidden
    # D leaves 16 bytes at a time, and the cache before what is read again.
    assert codes["STG.E.EF.128"] == d * LOGITS // 8
    # Fences for the whole GPU at the cluster's first and last barrier, and none per tile.
    assert count("MEMBAR.ALL.GPU") <= 2
    # With a softcap three special functions a logit, one without it; some more per row.
    per_row = 4 * 4
    assert codes["MUFU.EX2"] <= LOGITS * (1 + cap) + per_row
    assert count("MUFU.RCP") <= LOGITS * cap + per_row


def test_elsewhere_it_is_empty():
    """Other GPUs lack its instructions: there the kernels have no body, and are never launched."""
    log, _ = cubin("forward.cu", "80")
    assert "warning" not in log, log
