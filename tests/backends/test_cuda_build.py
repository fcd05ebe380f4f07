"""Building fastpref._cuda with nvcc, and what is said where it is missing or cannot run."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import cuda_emulated  # noqa: F401  puts csrc/cuda on the path
import machine
import nvcc_build
import pytest
import torch

from fastpref import backends, linear_token_logps
from fastpref.backends import cuda, cuda_module, triton

CUDA = torch.device("cuda")
ARCHS = "compute_80\ncompute_90\ncompute_90a\ncompute_100\n"
STUB = """#!/bin/sh
# Stands in for {name}: writes down how it was called, and an empty output.
echo "$@" >> {log}
case "$*" in
  *--list-gpu-arch*) printf '{archs}'; exit 0;;
  *{fails}*) echo no such thing; exit 2;;
esac
while [ $# -gt 0 ]; do
  case "$1" in -o) : > "$2"; shift;; -MF) echo "out: $0" > "$2"; shift;; esac
  shift
done
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """An nvcc that is none, alone on the PATH with what else a test asks for."""
    tools = tmp_path / "tools"
    tools.mkdir()
    log = tmp_path / "log"

    def make(fails="nothing-fails", archs=ARCHS, also=()):
        path = tools / "nvcc"
        path.write_text(STUB.format(name="nvcc", log=log, archs=archs, fails=fails))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        for name in ("sh", *also):
            (tools / name).symlink_to(shutil.which(name))
        monkeypatch.setenv("PATH", str(tools))
        for name in ("CUDA_HOME", "CUDA_PATH", "FASTPREF_CUDA_ARCH", "FASTPREF_CUDA"):
            monkeypatch.delenv(name, raising=False)
        return lambda: log.read_text().splitlines()

    return make


@pytest.mark.parametrize("ninja", [False, True], ids=["processes", "ninja"])
def test_the_commands(stub, tmp_path, ninja):
    """The same ones with ninja and without; with it a second build has nothing to do."""
    if ninja and shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    calls = stub(also=("ninja",) if ninja else ())
    out = tmp_path / "a folder" / "_cuda.so"
    nvcc_build.build(out, tmp_path / "scratch $1", ["/headers"], 2)
    compiled = [c for c in calls() if " -c " in f" {c}"]
    assert len(compiled) == len(nvcc_build.SOURCES) and out.exists()
    kernels = [c for c in compiled if ".cu " in c and "forward.cu" not in c]
    for arch in ("arch=compute_80,code=sm_80", "code=sm_90", "code=[sm_100,compute_100]"):
        assert all(arch in c for c in kernels), arch
    assert sum("-I/headers" in c and "bind.cpp" in c for c in compiled) == 1
    link = [c for c in calls() if "-shared" in c]
    assert len(link) == 1 and "-cudart=static" in link[0]
    nvcc_build.build(out, tmp_path / "scratch $1", ["/headers"], 2)
    again = [c for c in calls() if " -c " in f" {c}"]
    assert len(again) == len(compiled) * (1 if ninja else 2)


@pytest.mark.parametrize("ninja", [False, True], ids=["processes", "ninja"])
def test_a_compiler_that_fails_is_quoted(stub, tmp_path, ninja):
    if ninja and shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    stub(fails="rows.cu", also=("ninja",) if ninja else ())
    with pytest.raises(RuntimeError, match="no such thing"):
        nvcc_build.build(tmp_path / "_cuda.so", tmp_path / "scratch", [], 2)


def test_architectures(stub, monkeypatch):
    stub()
    nvcc = nvcc_build.find_nvcc()
    assert nvcc_build.architectures(nvcc) == ["80", "90", "100+PTX"]
    monkeypatch.setenv("FASTPREF_CUDA_ARCH", "90a;sm_80, 120+PTX")
    assert nvcc_build.architectures(nvcc) == ["90a", "80", "120+PTX"]
    assert nvcc_build.gencode(["90a", "80+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    ]
    monkeypatch.setenv("FASTPREF_CUDA_ARCH", "hopper")
    with pytest.raises(ValueError, match="FASTPREF_CUDA_ARCH: got 'hopper', expected"):
        nvcc_build.architectures(nvcc)


def test_whether_it_is_wanted(stub, monkeypatch):
    stub()
    assert nvcc_build.wanted() == (sys.platform == "linux")
    for value, wanted in (("0", False), ("1", True)):
        monkeypatch.setenv("FASTPREF_CUDA", value)
        assert nvcc_build.wanted() == wanted
    monkeypatch.setenv("FASTPREF_CUDA", "yes")
    with pytest.raises(ValueError, match="FASTPREF_CUDA: got 'yes', expected 0, 1 or auto"):
        nvcc_build.wanted()
    monkeypatch.delenv("FASTPREF_CUDA")
    monkeypatch.setattr(nvcc_build, "find_nvcc", lambda: None)
    assert not nvcc_build.wanted()


# ---- the module that was built -----------------------------------------------------------------

IMPORT = """
import sys
module = sys.argv[1]
sys.path.insert(0, module)
import _cuda
print(_cuda.emulated, len(_cuda.pair_forms), _cuda.ready(0)[:2])
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The module that the installation has built, if it is of these sources; otherwise it is built
    for one architecture, as all of them take the compiler minutes."""
    if nvcc_build.find_nvcc() is None or not sys.platform.startswith("linux"):
        pytest.skip("nvcc is not installed")
    pybind11 = pytest.importorskip("pybind11")
    import sysconfig

    folder = tmp_path_factory.mktemp("cuda")
    sources = [p for end in ("h", "cu", "cpp") for p in nvcc_build.HERE.parent.rglob(f"*.{end}")]
    newest = max(path.stat().st_mtime for path in sources)
    for installed in (nvcc_build.HERE.parents[1] / "fastpref").glob("_cuda*.so"):
        if installed.stat().st_mtime > newest:
            (folder / "_cuda.so").symlink_to(installed)
            return folder
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTPREF_CUDA_ARCH", "90")
    try:
        include = [pybind11.get_include(), sysconfig.get_path("include")]
        nvcc_build.build(folder / "_cuda.so", folder / "scratch", include, 2)
    finally:
        patch.undo()
    return folder


@pytest.mark.slow
def test_it_imports_where_there_is_no_driver_and_says_why_it_cannot_run(built):
    """cudart is linked statically, and nothing else of CUDA or of torch."""
    needed = subprocess.run(["ldd", built / "_cuda.so"], capture_output=True, text=True).stdout
    assert "libc.so" in needed and not {"cudart", "libcuda", "torch"} & set(needed.split("."))
    assert "libcudart" not in needed and "libtorch" not in needed and "libcuda.so" not in needed
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT, str(built)], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr
    emulated, forms, *error = run.stdout.split(maxsplit=2)
    assert emulated == "False" and int(forms) == len(cuda.CLOSED_FORMS)
    assert "cudaErrorInsufficientDriver" in error[0] or "cudaErrorNoDevice" in error[0]


def test_the_names_of_the_losses():
    if cuda_module.MODULE is None:
        pytest.skip("fastpref._cuda is not built")
    assert cuda.PAIR_FORMS == cuda_module.MODULE.pair_forms


# ---- what is said ------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """A machine with a GPU, and a module that answers as told."""

    class Module:
        emulated = False
        answer = (None, None, 90, 13000, 13000)

        def ready(self, index):
            return self.answer

    class Nowhere:
        def __init__(self, index):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    module = Module()
    monkeypatch.setattr(cuda_module, "MODULE", module)
    monkeypatch.setattr(cuda_module, "PROBLEM", None)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda index=None: (7, 5),
        "get_device_name": lambda index=None: "Some GPU",
        "device": Nowhere,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    _forget()
    yield module
    _forget()


CACHES = (
    cuda_module.ready,
    cuda_module.clusters_of,
    cuda_module.forward_works,
    cuda_module.machine_problem,
)


def _forget():
    for function in CACHES:
        function.cache_clear()


@pytest.mark.parametrize(
    "error, said",
    [
        (
            "cudaErrorInsufficientDriver",
            ["the driver knows CUDA 12.8", "built with 13.0", "update"],
        ),
        ("cudaErrorNoKernelImageForDevice", ["not compiled for Some GPU", "FASTPREF_CUDA_ARCH=75"]),
        ("cudaErrorNoDevice", ["cannot run: no CUDA-capable device", "cudaErrorNoDevice"]),
    ],
)
def test_why_a_gpu_cannot_run_it(pretend, error, said):
    pretend.answer = (error, "no CUDA-capable device is detected", 0, 13000, 12080)
    for reason in (cuda.problem(), cuda.unavailable_reason(CUDA, torch.float32)):
        assert reason is not None and all(words in reason for words in said), reason
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here: "):
        backends.choose(CUDA, torch.float32, "cuda")


def test_a_gpu_that_can(pretend):
    assert cuda.problem() is None and cuda.unavailable_reason(CUDA, torch.bfloat16) is None
    assert "no kernels for cpu tensors" in str(
        cuda.unavailable_reason(torch.device("cpu"), torch.float32)
    )
    assert cuda.describe() == "CUDA 13.0 kernels for sm_90 on Some GPU"
    assert cuda_module.clusters_of(0) == 8


def test_older_architectures_have_no_clusters(pretend):
    pretend.answer = (None, None, 80, 13000, 13000)
    assert cuda_module.clusters_of(0) == 1


def test_the_next_backend_is_taken_and_said_once(pretend, monkeypatch):
    monkeypatch.delenv("FASTPREF_BACKEND", raising=False)
    missing = "triton is not installed, pretend"
    monkeypatch.setattr(triton, "unavailable_reason", lambda device, dtype: missing)
    backends._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="runs on its cuda backend: triton is not installed"):
        assert backends.choose(CUDA, torch.float32) is cuda
    assert backends.choose(CUDA, torch.float32) is cuda  # a second warning would be an error
    pretend.answer = ("cudaErrorNoKernelImageForDevice", "no image", 0, 13000, 13000)
    _forget()
    with pytest.warns(
        RuntimeWarning, match="plain torch.*pretend; fastpref._cuda was not compiled"
    ):
        assert backends.choose(CUDA, torch.float32).NAME == "eager"
    backends._say_once.cache_clear()


def test_triton_comes_first_until_a_gpu_has_been_seen(pretend, monkeypatch):
    monkeypatch.delenv("FASTPREF_BACKEND", raising=False)
    monkeypatch.setattr(triton, "unavailable_reason", lambda device, dtype: None)
    assert backends.choose(CUDA, torch.float32) is triton


MISSING = """
import sys, warnings
sys.modules["fastpref._cuda"] = None  # what an import finds where it was not built
from fastpref import backends
import torch
status = {s.name: s for s in backends.report()}["cuda"]
assert not status.works and "_cuda is not built" in status.reason and "nvcc" in status.reason
try:
    backends.choose(torch.device("cuda"), torch.float32, "cuda")
except RuntimeError as error:
    assert "_cuda is not built" in str(error), error
else:
    raise AssertionError("cuda was forced and is missing")
print("ok")
"""


def test_without_the_module():
    run = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr


def test_where_its_own_product_cannot_run_tiles_are_taken(monkeypatch):
    """The cuda backend does not borrow Triton's product; fused=True gets the reason."""
    reason = machine.why_not("cuda", [torch.bfloat16])
    if reason is not None:
        pytest.skip(reason)
    device = machine.device_of("cuda")
    taken, linear = [], cuda.linear
    monkeypatch.setattr(cuda, "linear", lambda *a: (taken.append("tile"), linear(*a)))
    monkeypatch.setattr(cuda_module, "forward_works", lambda index: False)
    hidden = torch.randn(6, 16, device=device).bfloat16()
    weight = torch.randn(20, 16, device=device).bfloat16()
    labels = torch.randint(20, (6,), device=device)
    for strategy in ("auto", "forward-only"):
        options = dict(backend="cuda", strategy=strategy)
        linear_token_logps(hidden, weight, labels, **options)
        with pytest.raises(ValueError, match="fused: got True, .*: it is compiled for sm_90a"):
            linear_token_logps(hidden, weight, labels, fused=True, **options)
    assert taken == ["tile"] * 2
