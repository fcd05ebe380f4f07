"""Compiles Triton kernels for GPUs that are not here and counts what is in the machine code.

    built = triton_static.build("name", [triton_static.Job(...), ...])  # one subprocess for all
    assert built["job"]["spill_stores"] == 0

The subprocess is needed because a process that runs kernels in the interpreter cannot compile them.
Skips the module that imports it where triton is not installed. Works with triton 3.4 to 3.9.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

if __name__ != "__main__":
    import outcomes
    import pytest

    pytest.importorskip("triton", reason="triton is not installed")

# What one program can have: the opt-in limit of a thread block, the LDS of a workgroup.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

# name -> pattern of one instruction; "HGMMA" counts every shape, result["hgmma"] each on its own.
SASS = {
    "HGMMA": r"\bHGMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "HMMA": r"\bHMMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDG": r"\bLDG\b",
    "LDG.64": r"\bLDG\.E[.\w]*\.64\b",
    "LDG.128": r"\bLDG\.E[.\w]*\.128\b",
    "STG": r"\bSTG\b",
    "STG.64": r"\bSTG\.E[.\w]*\.64\b",
    "STG.128": r"\bSTG\.E[.\w]*\.128\b",
    "LDS": r"\bLDS\b",
    "STS": r"\bSTS\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "MUFU": r"\bMUFU\b",
    "MUFU.EX2": r"\bMUFU\.EX2\b",
    "MUFU.RCP": r"\bMUFU\.RCP\b",
    "FFMA": r"\bFFMA2?\b",
    "FMUL": r"\bFMUL2?\b",
    "FADD": r"\bFADD2?\b",
    "SHFL": r"\bSHFL\b",
    "BAR": r"\bBAR\b",
    "ATOM": r"\b(?:ATOM|ATOMG|RED|REDG)\b",
    "ATOMS": r"\bATOMS\b",
    "CALL": r"\bCALL\b",
}
AMDGCN = {
    "MFMA": r"^\s*v_mfma",
    "global_load": r"^\s*(?:global|buffer)_load_\w+",
    "global_load_dwordx4": r"^\s*(?:global|buffer)_load_dwordx4\b",
    "global_store": r"^\s*(?:global|buffer)_store_\w+",
    "global_store_dwordx4": r"^\s*(?:global|buffer)_store_dwordx4\b",
    "v_exp": r"^\s*v_exp_f32",
    "s_barrier": r"^\s*s_barrier\b",
    "ATOM": r"^\s*(?:global|buffer|flat|ds)_(?:atomic|add|max|cmpst)\w*",
    "scratch": r"^\s*scratch_(?:load|store)",
}
# Loads and stores, barriers, exchanges between threads: result["order"] has them as they come.
ORDER = (
    r"\b(LDG|STG|BAR|SHFL)\b([.\w]*)[^;]*?(RZ)? ;"
    r"|^\s*((?:global|buffer)_(?:load|store)_dwordx[24]|s_barrier)"
)


@dataclass
class Job:
    """One kernel, specialised and compiled for one GPU.

    kernel: "module:function". signature: argument -> type, such as "*fp32", "i64" or
    "tensordesc<bf16[128,64]>". constexprs: argument -> value; None for an optional tensor that is
    left out, 1 for an integer that is 1, as a launch has it. divisible: the pointers and integers
    that are multiples of 16. arch: "sm_90", "gfx942", ... options: num_warps, num_stages, ...
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    arch: str
    options: dict[str, object] = field(default_factory=dict)
    divisible: list[str] = field(default_factory=list)


class Built(dict):
    """What was found; asking one that did not compile for a number fails with the compiler's words.

    NVIDIA: registers, spill_stores, spill_loads (bytes), stack, hgmma (shape -> count), warnings
    (ptxas's own lines), serialized. AMD: registers (VGPRs), agprs, sgprs, vgpr_spills, sgpr_spills,
    scratch (bytes). Both: arch, shared (bytes), threads, ops (SASS or AMDGCN above), order, triton.
    """

    def __missing__(self, key: str):
        raise AssertionError(f"{self.get('name')}: {self.get('error', f'no {key}')}")


def build(name: str, jobs: list[Job], timeout: float = 900.0) -> dict[str, Built]:
    """Compile every job in one subprocess, once for the same kernels and compiler; the results by
    the jobs' names. name: of the outcome that is kept."""
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names), "two jobs of one name"
    given = json.dumps([dataclasses.asdict(job) for job in jobs])
    root = Path(__file__).resolve().parents[2]
    versions = [importlib.metadata.version(package) for package in ("triton", "torch")]
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("TRITON_"))
    inputs = [given, sys.version, *versions, settings, Path(__file__)]
    inputs += sorted((root / "kernels").glob("*.py"))
    results = outcomes.once(
        name,
        inputs,
        lambda: _build(given, timeout),
        failed=lambda results: any("error" in result for result in results),
    )
    return {r["name"]: Built(r) for r in results}


def _build(jobs: str, timeout: float) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as scratch:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = scratch  # a cached kernel would have no ptxas log
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            input=jobs,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=env,
            cwd=scratch,
        )
    if done.returncode:
        raise RuntimeError(
            f"offline compilation failed:\n{done.stdout[-999:]}{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _count(patterns: dict[str, str], text: str) -> dict[str, int]:
    return {name: len(re.findall(p, text, re.MULTILINE)) for name, p in patterns.items()}


def _order(text: str) -> list[str]:
    return ["".join(found) for found in re.findall(ORDER, text, re.MULTILINE)]


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return max(int(n) for n in found) if found else 0


class _PtxasLog:
    """Keeps what ptxas says: Triton runs it with -v and throws the log away."""

    def __init__(self):
        self.text = ""
        self.run = subprocess.run

    def __call__(self, command, *args, **kwargs):
        done = self.run(command, *args, **kwargs)
        log = kwargs.get("stderr")
        if "-v" in command and hasattr(log, "name"):
            self.text += Path(log.name).read_text()
        return done


def _without_encodings(sass: str) -> str:
    """Without the numbers of the instructions, which are most of the text and match no pattern."""
    return re.sub(r" */\* 0x[0-9a-f]+ \*/", "", sass)


def _converged(sass: str) -> str:
    """Without the copies of code for warps whose threads have diverged, which here never run.

    BRA.DIV jumps to them before a shuffle; they end with a jump back.
    """
    copies = set(re.findall(r"BRA\.DIV[^;]*?0x([0-9a-f]+)", sass))
    kept, skipping = [], False
    for line in sass.splitlines():
        at = re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)
        skipping |= at is not None and at[1].lstrip("0") in copies
        if not skipping:
            kept.append(line)
        elif re.search(r"\*/\s+BRA 0x", line):
            skipping = False
    return "\n".join(kept)


def _nvidia(kernel, log: str) -> dict[str, object]:
    import triton

    if "bytes spill stores" not in log:
        raise RuntimeError(f"no resource usage in ptxas's log: {log[-500:]!r}")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    sass = _converged(_without_encodings(sass))
    shapes = re.findall(r"\bHGMMA\.(\d+x\d+x\d+)", sass)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_stores": _number(r"(\d+) bytes spill stores", log),
        "spill_loads": _number(r"(\d+) bytes spill loads", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "warnings": [line for line in log.splitlines() if re.search("warning|C75", line)],
        "serialized": "serialized" in log or "serialization" in log,
        "hgmma": {shape: shapes.count(shape) for shape in sorted(set(shapes))},
        "ops": _count(SASS, sass),
        "order": _order(sass),
    }


def _amd(kernel) -> dict[str, object]:
    text = kernel.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "agprs": _number(r"\.agpr_count:\s+(\d+)", text),
        "sgprs": _number(r"\.sgpr_count:\s+(\d+)", text),
        "vgpr_spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "sgpr_spills": _number(r"\.sgpr_spill_count:\s+(\d+)", text),
        "scratch": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "ops": _count(AMDGCN, text),
        "order": _order(text),
    }


def _without_linker() -> None:
    """Triton 3.4 links AMD's code with ROCm's own linker; the assembly is all that is needed."""
    from triton.backends.amd import compiler

    if hasattr(compiler.HIPBackend, "path_to_rocm_lld"):
        compiler.HIPBackend.make_hsaco = staticmethod(lambda src, *_: src.encode())
        compiler.HIPBackend.hash = lambda self: "not linked"


def _compile(job: Job, log: _PtxasLog) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    nvidia = job.arch.startswith("sm_")
    target = GPUTarget("cuda", int(job.arch[3:]), 32) if nvidia else GPUTarget("hip", job.arch, 64)
    given = job.signature | dict.fromkeys(job.constexprs, "constexpr")
    unknown = set(given) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"arguments that are not the kernel's, or are missing: {sorted(unknown)}")
    source = ASTSource(
        fn=kernel,
        signature={arg: given[arg] for arg in kernel.arg_names},
        constexprs={(kernel.arg_names.index(arg),): v for arg, v in job.constexprs.items()},
        attrs={(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in job.divisible},
    )
    log.text = ""
    compiled = triton.compile(source, target=target, options=dict(job.options))
    result = {
        "arch": job.arch,
        "shared": compiled.metadata.shared,
        "threads": compiled.metadata.num_warps * target.warp_size,
        "triton": triton.__version__,
    }
    return result | (_nvidia(compiled, log.text) if nvidia else _amd(compiled))


def _main() -> None:
    log = _PtxasLog()
    subprocess.run = log
    _without_linker()
    results = []
    for job in json.load(sys.stdin):
        try:
            found = _compile(Job(**job), log)
        except Exception:
            found = {"error": traceback.format_exc()[-4000:]}
        results.append({"name": job["name"], **found})
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    _main()
