"""A small run of everything on a GPU, to be watched by compute-sanitizer, or on its own.

    python tests/support/gpu_smoke.py             # all cases
    python tests/support/gpu_smoke.py --few       # one of each kind: a sanitizer takes its time
    python tests/support/gpu_smoke.py --backends triton
    python tests/support/gpu_smoke.py --filters   # compute-sanitizer's options for our kernels
    python tests/support/gpu_smoke.py --emulate   # with Triton's interpreter and CUDA emulated

Every result is compared with float64. Not a test module: pytest does not collect it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
from typing import Any

import torch
from smoke_cases import TOLERANCE, Case, cases, check, logit_free, problem, run, worst

import fastpref
from fastpref import backends


def ready_logits(device: torch.device, backend: str) -> None:
    """token_logps and its backward pass over the logits themselves."""
    for dtype, vocab in ((torch.bfloat16, 1003), (torch.float32, 20011), (torch.float16, 1000)):
        logits = (4 * torch.randn(3, 5, vocab, device=device)).to(dtype)
        labels = torch.randint(vocab, (3, 5), device=device)
        labels[0, :2] = -100
        exact = logits.double().requires_grad_()
        wanted = exact.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        wanted = wanted.masked_fill(labels < 0, 0.0)
        wanted.sum().backward()
        leaf = logits.requires_grad_()
        got = fastpref.token_logps(leaf * 1, labels, backend=backend, inplace_backward=True)
        got.sum().backward()
        assert (got.double() - wanted).abs().max() < 1e-3
        off = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert off < TOLERANCE[dtype], f"{dtype}: the gradient of the logits is off by {off:.2e}"


def rare_labels(device: torch.device, backend: str) -> None:
    """Labels of next to no probability: the rows of D that are brought to another base."""
    weight = torch.zeros(1003, 64, dtype=torch.bfloat16, device=device)
    weight[:200, 0] = 16
    hidden = torch.randn(40, 64, device=device).bfloat16()
    hidden[:, 0] = torch.linspace(-20, 20, 40, device=device)
    labels = torch.arange(180, 220, device=device)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    fused = logit_free(backend, weight, with_d=True)
    logps = fastpref.linear_token_logps(*leaves, labels, backend=backend, fused=fused)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert (logps.double() - wanted).abs().max() < 1e-2
    for got, true in zip(
        torch.autograd.grad(logps.sum(), leaves),
        torch.autograd.grad(wanted.sum(), exact),
        strict=True,
    ):
        assert (got.double() - true).norm() < TOLERANCE[torch.bfloat16] * true.norm()


def _plain(backend: str, mode: str = "trainable") -> Case:
    return Case(backend, torch.bfloat16, 1003, None, mode, ())


def no_synchronisation(device: torch.device, backend: str) -> None:
    for mode in ("trainable", "frozen", "forward-only"):
        case = _plain(backend, mode)
        p = problem(case, device)
        run(case, p)  # compiling may synchronise
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = run(case, p)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(case, p, result)


def other_stream(device: torch.device, backend: str) -> None:
    """The inputs are written late, on the stream that the call is on: others would read NaN."""
    for mode in ("trainable", "forward-only"):
        case = _plain(backend, mode)
        p = problem(case, device)
        run(case, p)
        late = p.hidden.detach().clone()
        stream = torch.cuda.Stream(device)
        with torch.no_grad():
            p.hidden.fill_(float("nan"))
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                p.hidden.copy_(late)
            result = run(case, p)
        torch.cuda.synchronize(device)
        check(case, p, result)


def captured(device: torch.device, backend: str) -> None:
    """Forward and backward in one CUDA graph, replayed on other numbers."""
    for mode in ("trainable", "frozen", "forward-only"):
        case = _plain(backend, mode)
        p = problem(case, device)
        late = p.hidden.detach().clone()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(case, p)
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.no_grad():
            p.hidden.mul_(0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run(case, p)
        with torch.no_grad():
            p.hidden.copy_(late)
        graph.replay()
        torch.cuda.synchronize(device)
        check(case, p, result)


def other_device(device: torch.device, backend: str) -> None:
    """Tensors on a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        print("other device: there is only one GPU")
        return
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    for mode in ("trainable", "frozen", "forward-only"):
        case = _plain(backend, mode)
        p = problem(case, other)
        current = torch.cuda.current_device()
        check(case, p, run(case, p))
        assert torch.cuda.current_device() == current, "another GPU is current now"


def filters() -> str:
    """Options that make compute-sanitizer look at fastpref's kernels and at no library's."""
    import fastpref.kernels
    import triton

    sources = {}
    for module in pkgutil.iter_modules(fastpref.kernels.__path__):
        members = vars(importlib.import_module(f"fastpref.kernels.{module.name}"))
        kernels = [f for f in members.values() if isinstance(f, triton.JITFunction)]
        sources |= {f.__name__: f.src for f in kernels}
    called = {
        name
        for name in sources
        for other, source in sources.items()
        if other != name and re.search(rf"\b{name}\(", source)
    }
    names = sorted(sources.keys() - called)
    if backends.cuda.problem() is None:
        names += ["fold_kernel", "grad_kernel", "pair_loss_kernel"]
        names += ["base_kernel"]
        names += ["forward_kernel", "combine_kernel"]
    return " ".join(f"--kernel-name kns={name}" for name in names)


def lost(device: torch.device) -> bool:
    """Whether an error has left the GPU beyond use for this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            return True
    return False


def emulate() -> None:
    """Before anything of fastpref.kernels is imported."""
    import cuda_emulated
    import triton_interpret  # noqa: F401  interpreted from here on

    why = cuda_emulated.install()
    if why is not None:
        raise SystemExit(why)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--filters", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu tries this script itself")
    parser.add_argument("--emulate", action="store_true", help="CUDA and Triton on the CPU")
    parser.add_argument("--backends", default=None, help="such as triton,cuda; default: all")
    parser.add_argument("--most", type=int, default=None, help="so many of the cases")
    args = parser.parse_args()
    if args.filters:
        print(filters())
        return
    if args.emulate:
        emulate()
        args.device = "cpu"
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU")
        device = torch.device("cuda", torch.cuda.current_device())
    wanted = None if args.backends is None else args.backends.split(",")
    working = {
        name: module.unavailable_reason(device, torch.bfloat16)
        for name, module in backends._MODULES.items()
        if name != "eager" and (wanted is None or name in wanted)
    }
    names = [name for name, why in working.items() if why is None]
    for name, why in working.items():
        print(f"{name}: {'works' if why is None else why}")
    if not names:
        raise SystemExit(f"no backend works on {device}: {working}")
    todo: list[tuple[str, Any]] = [(str(case), case) for case in cases(names, args.few)]
    more = [ready_logits, rare_labels]
    if device.type == "cuda":
        more += [no_synchronisation, other_stream, other_device]
        # A graph cannot allocate from the driver, to which this variable sends every allocation.
        if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
            more.append(captured)
    todo += [(f"{f.__name__} {name}", (f, name)) for f in more for name in names]
    failed = tried = 0
    stopped = ""
    for name, what in todo[: args.most]:
        tried += 1
        try:
            if isinstance(what, Case):
                p = problem(what, device)
                check(what, p, run(what, p))
            else:
                what[0](device, what[1])
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if lost(device):
                stopped = f"the GPU is beyond use; {len(todo) - tried} cases did not run"
                break
        except KeyboardInterrupt:  # its time was up
            tried -= 1
            stopped = f"interrupted at {name}; {len(todo) - tried} cases did not run"
            break
    for (which, what), error in sorted(worst.items()):
        print(f"largest error of {which} in {what}: {error:.1e}")
    where = torch.cuda.get_device_name(0) if device.type == "cuda" else "the CPU"
    print(f"{tried - failed} passed, {failed} failed: {', '.join(names)} on {where}")
    if stopped:
        raise SystemExit(stopped)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
