"""One call of each of fastpref's variants between the profiler's marks, for ncu (make gpu-profile):
what its kernels move and how long they take.

    ncu --profile-from-start off --clock-control none ... python benchmarks/gpu_profile.py
"""

from __future__ import annotations

import sys

import torch

from fastpref import backends
from fastpref.bench.ours import ours
from fastpref.bench.peers import step
from fastpref.bench.problem import make_problem, parse_shape

DTYPE = torch.bfloat16


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    shape = parse_shape(sys.argv[1] if len(sys.argv) > 1 else "b")
    p = make_problem(shape.n, shape.h, shape.v, DTYPE, device, shape.softcap, zipf=True)
    modules = backends._MODULES["cuda"], backends._MODULES["triton"]
    working = [m.NAME for m in modules if m.unavailable_reason(device, DTYPE) is None]
    for mode in ("trainable", "frozen"):
        p.set_trainable(mode == "trainable")
        for entry in ours(mode, working, ["exact", "fast"]):
            run = step(entry.make(), mode)
            for _ in range(2):  # the first call compiles
                p.clear()
                run(p)
            p.clear()
            torch.cuda.synchronize()
            print(f"{mode}, {entry.name}", flush=True)
            torch.cuda.profiler.start()
            run(p)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
