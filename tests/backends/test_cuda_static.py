"""What nvcc makes of the CUDA kernels, for GPUs that are not here."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_emulated  # noqa: F401  puts csrc/cuda on the path
import nvcc_build
import outcomes
import pytest

NVCC = nvcc_build.find_nvcc()
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.slow,
]
ARCHS = ("80", "90", "100")
SIZE = {"float32": 4, "bf16": 2, "f16": 2}
REGISTERS = 65536  # of a multiprocessor
# Of the special functions that a thread calls once or twice for its row: rescaling and combining.
ONCE = 24


def _cuobjdump() -> str | None:
    assert NVCC is not None
    found = shutil.which("cuobjdump", path=f"{Path(NVCC).parent}:/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def _name(mangled: str) -> str | None:
    """fold/<type>/<softcap>/<extras>/<logits of a thread>/<threads>/<blocks>, grad/.., pair_loss"""
    types = {"f": "float32", "NS_4bf16E": "bf16", "NS_3f16E": "f16"}
    fold = r"fold_kernelI(f|NS_4bf16E|NS_3f16E)Lb(\d)ELb(\d)ELi(\d+)ELi(\d+)ELi(\d+)E"
    if found := re.search(fold, mangled):
        cap, extras = ("softcap" if found[2] == "1" else "plain"), ("no", "all")[int(found[3])]
        return f"fold/{types[found[1]]}/{cap}/{extras}/{found[4]}/{found[5]}/{found[6]}"
    if found := re.search(r"grad_kernelI(f|NS_4bf16E|NS_3f16E|\w*bf16E|\w*f16E)Lb(\d)E", mangled):
        kind = "float32" if found[1] == "f" else "bf16" if "bf16" in found[1] else "f16"
        return f"grad/{kind}/{'softcap' if found[2] == '1' else 'plain'}"
    return "pair_loss" if "pair_loss_kernel" in mangled else None


def cubin(source: str, arch: str) -> tuple[str, str | None]:
    """Of one source for one GPU: nvcc's and ptxas's words, and the SASS where there is cuobjdump.

    Each is compiled once for the same sources and compiler.
    """
    tool = _cuobjdump()

    def compile_() -> tuple[str, str | None]:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out.cubin"
            command = nvcc_build.compile_command(NVCC, source, out, target)
            command.remove("-c")
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-4000:]
            if tool is None:
                return run.stderr, None
            dump = [tool, "-sass", str(out)]
            done = subprocess.run(dump, capture_output=True, text=True, check=True)
            return run.stderr, re.sub(r" */\* 0x[0-9a-f]+ \*/", "", done.stdout)  # the encodings

    target = [f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v"]
    inputs = [nvcc_build.compile_command(NVCC, source, Path("out"), target), _nvcc_version(), tool]
    csrc = Path(nvcc_build.HERE)
    for folder in (csrc.parent, csrc):
        inputs += sorted(p for p in folder.iterdir() if p.suffix in (".h", ".cu", ".py"))
    log, sass = outcomes.once(f"{source} sm_{arch}", [*inputs, Path(__file__)], compile_)
    return log, sass


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout


def _compile(job: tuple[str, str]) -> dict[str, dict]:
    """Of one source for one GPU: for each kernel its resources and its instructions."""
    source, arch = job
    words, sass = cubin(source, arch)
    code = {}
    for part in re.split(r"^\s*Function : ", sass or "", flags=re.MULTILINE)[1:]:
        mangled, _, body = part.partition("\n")
        code[mangled.strip()] = body
    kernels = {}
    pieces = re.split(r"Compiling entry function '(\w+)'", words)
    for mangled, log in zip(pieces[1::2], pieces[2::2], strict=True):
        name = _name(mangled)
        if name is None:
            continue
        spills = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", log)]
        registers = re.search(r"Used (\d+) registers", log)
        assert registers is not None, log
        kernels[f"{name}/sm_{arch}"] = {
            "spills": sum(spills),
            "registers": int(registers[1]),
            "sass": code.get(mangled),
            "arch": arch,
        }
    return kernels


SOURCES = ("fold_f32.cu", "fold_bf16.cu", "rows.cu", "pair_loss.cu")


@functools.cache
def _all() -> dict[str, dict]:
    jobs = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        return {k: v for part in pool.map(_compile, jobs) for k, v in part.items()}


def _kernels(start: str = "") -> dict[str, dict]:
    found = {k: v for k, v in _all().items() if k.startswith(start)}
    assert found
    return found


def _count(kernel: dict, pattern: str) -> int:
    if kernel["sass"] is None:
        pytest.skip("cuobjdump is not installed")
    return len(re.findall(pattern, kernel["sass"]))


def test_every_kernel_was_found():
    names = [name.rsplit("/", 1)[0] for name in _kernels() if name.endswith("sm_90")]
    assert len([n for n in names if n.startswith("fold/")]) == 2 * 8
    assert len([n for n in names if n.startswith("grad/")]) == 6 and "pair_loss" in names


def test_nothing_spills():
    """But a few words in the largest of all variants: a softcap, every extra and the most logits to
    a thread."""
    for name, kernel in _kernels().items():
        parts = name.split("/")
        largest = parts[2:4] == ["softcap", "all"] and int(parts[4]) > 64
        assert kernel["spills"] <= (120 if largest else 0), (name, kernel["spills"])
        if not largest:
            assert _count(kernel, r"\b(?:LDL|STL)\b") == 0, name


def test_as_many_blocks_fit_as_were_asked_for():
    """Two blocks of 256 threads, or one of 512."""
    for name, kernel in _kernels("fold/").items():
        assert name.split("/")[5:7] == ["512", "1"]
        registers = -(-kernel["registers"] // 8) * 8
        assert registers * 512 <= REGISTERS, (name, registers)
    for name, kernel in _kernels("grad/").items():
        assert kernel["registers"] * 512 * 2 <= REGISTERS, name


def test_it_is_deterministic():
    for name, kernel in _kernels().items():
        assert _count(kernel, r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG)\b") == 0, name


def test_accesses_are_16_bytes_wide():
    """Reads of a row's share, and writes of the gradient: four float32 make four bf16, 8 bytes."""
    for name, kernel in _kernels("fold/").items():
        dtype, logits = name.split("/")[1], int(name.split("/")[4])
        vectors = logits * SIZE[dtype] // 16
        assert _count(kernel, r"\bLDG\.E[.\w]*\.128\b") >= vectors, name
        assert _count(kernel, r"\bSTG\.E[.\w]*\.128\b") >= vectors, name
        if dtype == "float32":
            assert _count(kernel, r"\bSTG\.E[.\w]*\.64\b") >= vectors, name


def test_special_functions():
    """An exponential for each logit and, with a softcap, a reciprocal; in grad as well."""
    for name, kernel in _kernels("fold/").items():
        logits, cap = int(name.split("/")[4]), "softcap" in name
        exponentials, all_of_them = (_count(kernel, p) for p in (r"\bMUFU\.EX2\b", r"\bMUFU\b"))
        assert logits <= exponentials <= logits + ONCE, (name, exponentials)
        assert all_of_them <= (2 if cap else 1) * logits + 2 * ONCE, (name, all_of_them)
    for name, kernel in _kernels("grad/").items():
        assert _count(kernel, r"\bMUFU\b") <= (2 if "softcap" in name else 1) * 16 + 8, name


def test_clusters():
    """Barriers of clusters and stores to another block's shared memory, from sm_90 on."""
    for name, kernel in _kernels("fold/").items():
        barriers, windows = (_count(kernel, p) for p in (r"\bUCGABAR_\w+", r"\bSR_SWINHI\b"))
        if kernel["arch"] == "80":
            assert barriers == windows == 0, name
        else:  # one pair at the start, one at the exchange; the window is where shared memory is
            assert barriers == 4 and windows >= 1, (name, barriers, windows)


def test_the_default_is_compiled_for_every_gpu_that_is_promised():
    names = nvcc_build.architectures(NVCC)
    assert names[-1].endswith("+PTX") and names[0].startswith("8")
