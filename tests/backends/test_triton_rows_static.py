# ruff: noqa: I001  triton_interpret has to come before anything that imports triton
"""What the compiler makes of the Triton row kernels and of pair_loss, for GPUs not here."""

from __future__ import annotations

import functools

import pytest
import torch
import triton_interpret  # noqa: F401
import triton_static

from fastpref.backends import triton as backend

pytestmark = pytest.mark.slow
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
VOCAB = 128256
FP32, BF16, FP16 = "fp32", "bf16", "fp16"
SIZE = {FP32: 4, BF16: 2, FP16: 2}


def _job(name, kernel, arch, signature, constexprs, lanes, divisible):
    warp = 32 if arch.startswith("sm_") else 64
    return triton_static.Job(
        name=f"{name}/{arch}",
        kernel=f"fastpref.kernels.{kernel}",
        signature=signature,
        constexprs=constexprs,
        arch=arch,
        options={"num_warps": lanes // warp, "enable_fp_fusion": False},
        divisible=divisible,
    )


def _optional(signature, constexprs, given, **types):
    for name, kind in types.items():
        if given:
            signature[name] = kind
        else:
            constexprs[name] = None


def _shape(dtype, aligned, per_lane, vocab):
    shape = backend._shape(vocab, SIZE[dtype], aligned, per_lane, torch.device("cpu"))
    return dict(zip(("REPEAT", "LANES", "VECTOR"), shape, strict=False))


def _fold(arch, dtype, everything=False, aligned=True, start=True, vocab=VOCAB):
    signature = {"tile": f"*{dtype}", "labels": "*i64", "stride": "i32", "columns": "i32"}
    signature |= {"col0": "i32"} | dict.fromkeys(
        ("max_", "sum_", "target", "lse", "logps"), "*fp32"
    )
    constexprs = _shape(dtype, aligned, backend._FOLD_COLUMNS, vocab) | {"START": start}
    pointers = dict.fromkeys(("weighted", "total", "squared"), "*fp32") | {"argmax": "*i64"}
    _optional(signature, constexprs, everything, inner="fp32", outer="fp32", **pointers)
    name = f"fold/{dtype}{'/all' * everything}{'' if aligned else '/unaligned'}"
    name += f"{'' if start else '/continued'}{'' if vocab == VOCAB else f'/{vocab}'}"
    known = ["tile", "columns"] if aligned else []
    return _job(name, "rows:fold", arch, signature, constexprs, constexprs["LANES"], known)


def _grad(arch, dtype, out, everything=False, aligned=True, vocab=VOCAB, dlogp=True):
    signature = {"tile": f"*{dtype}", "labels": "*i64", "lse": "*fp32", "logps": "*fp32"}
    signature |= {"out": f"*{out}", "stride": "i32", "out_stride": "i32", "columns": "i32"}
    signature["col0"] = "i32"
    per_lane = backend._grad_columns(aligned, SIZE[dtype], everything)
    constexprs = _shape(dtype, aligned, per_lane, vocab)
    _optional(signature, constexprs, dlogp or everything, dlogp="*fp32")
    pointers = dict(entropy="*fp32", dentropy="*fp32")
    _optional(signature, constexprs, everything, inner="fp32", outer="fp32", **pointers)
    name = f"grad/{dtype}-{out}{'/all' * everything}{'' if aligned else '/unaligned'}"
    name += "" if vocab == VOCAB else f"/{vocab}"
    known = ["tile", "out", "columns"] if aligned else []
    return _job(name, "rows:grad", arch, signature, constexprs, constexprs["LANES"], known)


def _pair_loss(arch, ipo):
    outputs = ("loss", "sequences", "rewards", "slopes", "dlogp")
    signature = {"logps": "*fp32", "sequence_ids": "*i64", "tokens": "i32", "pairs": "i32"}
    signature |= {"beta": "fp32", "option": "fp32", "ref_logps": "*fp32", "weight": "*fp32"}
    signature |= dict.fromkeys(outputs, "*fp32")
    constexprs = {
        "IPO": ipo,
        "TOKENS": backend._PAIR_TOKENS,
        "SEQUENCES": backend._PAIR_SEQUENCES,
    }
    _optional(signature, constexprs, ipo, lengths="*fp32")
    _optional(signature, constexprs, not ipo, margin="*fp32")
    name = f"pair_loss/{'ipo' if ipo else 'sigmoid'}"
    known = ["logps", "sequence_ids", "dlogp"]
    return _job(name, "pairs:pair_loss", arch, signature, constexprs, backend._PAIR_LANES, known)


def _jobs(arch):
    jobs = [
        _fold(arch, FP32),
        _fold(arch, BF16),
        _fold(arch, FP32, everything=True),
        _fold(arch, BF16, everything=True),
        _fold(arch, FP32, everything=True, start=False),
        _fold(arch, BF16, everything=True, aligned=False),
        _grad(arch, FP32, BF16, dlogp=False),
        _grad(arch, FP32, FP32),
        _grad(arch, BF16, BF16),
        _grad(arch, FP32, BF16, everything=True),
        _grad(arch, FP32, FP32, everything=True),
        _grad(arch, BF16, BF16, everything=True),
        _grad(arch, FP32, BF16, everything=True, aligned=False),
        _grad(arch, BF16, BF16, everything=True, aligned=False),
        _pair_loss(arch, ipo=False),
        _pair_loss(arch, ipo=True),
    ]
    if arch == "sm_90":
        jobs += [_fold(arch, FP16), _grad(arch, FP32, FP16, dlogp=False), _grad(arch, FP16, FP16)]
        for vocab in (8192, 2048, 512):  # the other numbers of lanes
            jobs += [
                _fold(arch, FP32, everything=True, vocab=vocab),
                _grad(arch, FP32, BF16, everything=True, vocab=vocab),
            ]
    return jobs


JOBS = {job.name: job for arch in ARCHS for job in _jobs(arch)}


@functools.cache
def _all_built():
    return triton_static.build("triton rows", list(JOBS.values()))


@pytest.fixture(params=JOBS)
def built(request):
    return _all_built()[request.param]


def _is_nvidia(built) -> bool:
    return built["arch"].startswith("sm_")


def test_nothing_spills(built):
    if _is_nvidia(built):
        assert built["spill_stores"] == built["spill_loads"] == 0
        assert built["ops"]["LDL"] == built["ops"]["STL"] == 0
        assert not built["serialized"] and built["warnings"] == []
    else:
        assert built["vgpr_spills"] == built["sgpr_spills"] == built["scratch"] == 0


def test_it_fits(built):
    """Two programs of 512 lanes and more to a multiprocessor; one of those that do everything."""
    assert built["shared"] <= 4096
    if _is_nvidia(built):
        registers = -(-built["registers"] // 8) * 8
        programs = 1 if "all" in built["name"] else 2
        assert registers * max(built["threads"], 512) * programs <= 65536
    else:
        assert built["registers"] <= 128  # 16 of 64 lanes' waves to a compute unit


def test_it_is_deterministic(built):
    assert built["ops"]["ATOM"] == 0


def _accesses(job) -> tuple[int, int]:
    """The loops and tails that read a block, and the accesses of one lane in each."""
    narrower = job.signature["tile"] == "*fp32" and job.signature.get("out") in ("*bf16", "*fp16")
    return (3 if narrower else 2), job.constexprs["REPEAT"]


@pytest.mark.parametrize("name", [n for n in JOBS if "unaligned" not in n and "pair" not in n])
def test_accesses_are_16_bytes_wide(name):
    """All reads of a block; the writes too, where the gradient has the width of the logits."""
    job, ops = JOBS[name], _all_built()[name]["ops"]
    bodies, repeat = _accesses(job)
    nvidia = job.arch.startswith("sm_")
    assert ops["LDG.128" if nvidia else "global_load_dwordx4"] >= bodies * repeat
    if nvidia and "fold" not in name:
        # Four float32 make four bf16, 8 bytes: a warp still writes whole sectors.
        assert ops["STG.64" if bodies == 3 else "STG.128"] >= 2 * repeat
    if nvidia:  # and none of them in pieces: what is left are the scalars of a row
        assert ops["LDG"] - ops["LDG.128"] <= 12


@pytest.mark.parametrize("name", [n for n in JOBS if "pair" not in n])
def test_one_exponential_per_logit(name):
    """And one more for the softcap, whose division is a root."""
    job, ops = JOBS[name], _all_built()[name]["ops"]
    per_lane = 2 * job.constexprs["REPEAT"] * job.constexprs["VECTOR"]  # the loop and the tail
    exponentials = ops["MUFU.EX2" if job.arch.startswith("sm_") else "v_exp"]
    assert exponentials <= (2 if "all" in name else 1) * (1.1 * per_lane + 2)
    if job.arch.startswith("sm_"):
        others = ops["MUFU"] - ops["MUFU.EX2"]
        assert others <= (per_lane + 2 if "all" in name else 1)


def _order(name):
    """Loads L and stores S of blocks, barriers B, exchanges between threads X, as they come."""
    out = []
    for op in _all_built()[name]["order"]:
        if op.startswith(("BAR", "s_barrier")):
            out.append("B")
        elif op.startswith("SHFL"):
            out.append("X")
        elif "load" in op or (op.startswith("LDG") and ".128" in op):
            out.append("L")
        elif "store" in op or (op.startswith("STG") and (".64" in op or ".128" in op)):
            out.append("" if op.endswith("RZ") else "S")  # RZ: the zeros of an ignored row
    return "".join(out).lstrip("S")  # on AMD's the zeros come first


@pytest.mark.parametrize("name", [n for n in JOBS if "fold" in n and "gfx" not in n])
def test_lanes_meet_at_the_end_of_the_row_only(name):
    order = _order(name)
    assert "L" not in order[min(order.index("X"), order.index("B")) :]


NARROWER = [n for n in JOBS if "grad/fp32-" in n and "-fp32" not in n and "unaligned" not in n]


@pytest.mark.parametrize("name", NARROWER)
def test_a_narrower_gradient_waits_for_all_loads_of_its_block(name):
    """In place its bytes lie over logits that other threads read: a barrier stands between."""
    order = _order(name)
    stores = [i for i, kind in enumerate(order) if kind == "S"]
    assert stores
    for i in stores:
        before = order[:i].rstrip("S")
        assert before.endswith("B"), order
