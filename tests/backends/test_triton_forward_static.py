"""What the shipped configurations of the fused forward pass compile to, without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton_static
from fastpref.kernels.forward_config import (
    SHIPPED,
    TESTED,
    Case,
    Config,
    config,
    grad_config,
    launch_tokens,
)

pytestmark = pytest.mark.slow
KERNEL = "fastpref.kernels.forward_kernels:"


def name(case: Case) -> str:
    c = case.config
    words = [case.arch, "descriptors" if c.descriptors else "pointers"]
    words += [f"{c.block_m}x{c.block_n}x{c.block_k}", f"w{c.warps}s{c.stages}"]
    flags = {"flat": c.flatten, "softcap": case.softcap, "additive": case.additive}
    return "-".join(words + [k for k, on in flags.items() if on] + ["unaligned"][case.aligned :])


def job(
    case: Case, arch: str | None = None, dtype: str = "bf16", d: bool = False, **flags
) -> triton_static.Job:
    c = case.config
    signature = {"labels_ptr": "*i64", "partial_ptr": "*fp32", "c": "fp32", "k": "fp32"}
    signature |= dict.fromkeys(("N", "V", "H", "stride_d"), "i32")
    shape = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "GROUP": 16}
    shape |= {"SOFTCAP": case.softcap, "NEGATIVE": False, "HALVES": c.halves}
    divisible = ["labels_ptr", "partial_ptr", "stride_d"]
    if d:
        signature["d_ptr"] = "*bf16"
        divisible += ["d_ptr"]
    else:
        shape["d_ptr"] = None
    if case.additive:
        signature["bias_ptr"] = "*fp32"
        divisible += ["bias_ptr"]
    else:
        shape["bias_ptr"] = None
    if d or not case.additive:  # d is written 16 bytes at a time where the vocabulary allows it
        divisible += ["V"]
    if c.descriptors:
        signature["x_desc"] = f"tensordesc<{dtype}[{c.block_m}, {c.block_k}]>"
        signature["weight_desc"] = f"tensordesc<{dtype}[{c.block_n}, {c.block_k}]>"
        shape["FLATTEN"] = c.flatten
        divisible += ["H"]
    else:
        signature |= {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
        signature |= {"stride_x": "i32", "stride_w": "i32"}
        shape["EVEN_H"] = case.aligned
        if case.aligned:
            divisible += ["x_ptr", "weight_ptr", "stride_x", "stride_w", "H"]
    return triton_static.Job(
        name=name(case) + "".join(f"-{word}" for word in (arch, d and "d", *flags) if word),
        kernel=KERNEL + ("by_descriptor" if c.descriptors else "by_pointer"),
        signature=signature,
        constexprs=shape | flags,
        arch=arch or case.arch,
        options=c.options(),
        divisible=divisible,
    )


def combine(arch: str) -> triton_static.Job:
    return triton_static.Job(
        name=f"combine-{arch}",
        kernel=KERNEL + "combine",
        signature={"partial_ptr": "*fp32", "labels_ptr": "*i64"}
        | {"lse_ptr": "*fp32", "logps_ptr": "*fp32", "c": "fp32", "k": "fp32"}
        | dict.fromkeys(("N", "V", "num_n"), "i32"),
        constexprs={"ROWS": 32, "TILES": 64, "SOFTCAP": True, "KEEP": True},
        arch=arch,
        options={"num_warps": 4},
        divisible=["partial_ptr", "labels_ptr", "lse_ptr", "logps_ptr"],
    )


def row_kernel(kernel: str, arch: str) -> triton_static.Job:
    """What a pass that writes d does to whole rows, before and after."""
    pointers = dict.fromkeys(("partial_ptr", "logps_ptr", "row_scale_ptr"), "*fp32")
    pointers |= {"labels_ptr": "*i64", "d_ptr": "*bf16"}
    signature = pointers | dict.fromkeys(("stride_d", "N", "V", "num_n"), "i32")
    signature |= {"slope": "fp32", "k": "fp32"}
    shape: dict[str, object] = {"BLOCK_N": 128, "BLOCK": 1024, "SOFTCAP": True}
    if kernel == "bases":
        pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "labels_ptr": "*i64"}
        pointers |= {"bias_ptr": "*fp32", "base_ptr": "*fp32"}
        signature = pointers | dict.fromkeys(("N", "V", "H", "stride_x", "stride_w"), "i32")
        signature |= {"c": "fp32", "k": "fp32"}
        shape = {"ROWS": 4, "BLOCK": 256, "SOFTCAP": True}
    return triton_static.Job(
        name=f"{kernel}-{arch}",
        kernel=KERNEL + kernel,
        signature=signature,
        constexprs=shape,
        arch=arch,
        options={"num_warps": 4},
        divisible=list(pointers),
    )


def first(arch: str, **wanted) -> Case:
    """The first shipped case of an architecture with these properties."""
    cases = (c for c in SHIPPED if c.arch == arch)
    return next(c for c in cases if all(getattr(c, k) == v for k, v in wanted.items()))


# The slow kernel for unaligned weights is small: its largest variant stands for all four.
CASES = {name(c): c for c in SHIPPED if c.aligned or (c.softcap and c.additive)}
ALL = [job(case) for case in CASES.values()]
GRADS = [
    job(Case(arch, chosen, softcap, additive, aligned=True), d=True)
    for arch, hidden in (("sm_80", 4096), ("sm_90", 4096), ("sm_90", 576), ("gfx942", 4096))
    for softcap, additive in itertools.product((False, True), repeat=2)
    if (chosen := grad_config(arch, hidden_size=hidden, softcap=softcap)) is not None
]
# A negative scale changes an instruction; sm_120 takes the kernel of sm_80.
MORE = [job(first("sm_90"), NEGATIVE=True)]
MORE += [job(first("sm_80", softcap=True, additive=True), "sm_120")]
COMBINE = [combine(arch) for arch in ("sm_90", "gfx942")]
ROWS = [row_kernel(kernel, arch) for kernel in ("bases", "finish") for arch in ("sm_90", "gfx942")]
JOBS = {j.name: j for j in ALL + MORE + GRADS + COMBINE + ROWS}
nvidia = [n for n, j in JOBS.items() if j.arch.startswith("sm_")]
amd = [n for n, j in JOBS.items() if j.arch.startswith("gfx")]


@pytest.fixture(scope="module")
def built():
    return triton_static.build("triton forward", list(JOBS.values()))


@pytest.mark.parametrize("kernel", nvidia)
def test_nothing_spills(built, kernel):
    found = built[kernel]
    spilled = max(found["spill_stores"], found["spill_loads"], found["stack"])
    old = tuple(int(n) for n in found["triton"].split(".")[:2]) < (3, 6)
    if found["arch"] == "sm_100" and old:  # a dozen registers per tile, on triton 3.4 and 3.5
        assert spilled <= 64
    else:
        assert spilled == found["ops"]["LDL"] == found["ops"]["STL"] == 0


@pytest.mark.parametrize("kernel", amd)
def test_nothing_spills_on_amd(built, kernel):
    found = built[kernel]
    assert (found["vgpr_spills"], found["sgpr_spills"], found["scratch"]) == (0, 0, 0)
    assert found["ops"]["scratch"] == 0


@pytest.mark.parametrize("kernel", JOBS)
def test_fits_its_multiprocessor(built, kernel):
    found = built[kernel]
    per_sm = CASES[kernel].config.per_sm if kernel in CASES else 1
    arch = JOBS[kernel].arch
    limit = triton_static.SHARED_LIMIT[arch]
    # sm_86, sm_89 and sm_120 run what sm_80 runs, with less shared memory.
    limit = min(limit, 99 * 1024) if arch == "sm_80" else limit
    assert found["shared"] <= limit
    if arch.startswith("sm_"):
        assert per_sm * (found["shared"] + 1024) <= limit + 1024
        assert per_sm * found["registers"] * found["threads"] <= 65536


@pytest.mark.parametrize("kernel", nvidia)
def test_no_atomics_and_no_serialized_products(built, kernel):
    found = built[kernel]
    assert found["ops"]["ATOM"] == 0
    assert not found["serialized"], found["warnings"]


@pytest.mark.parametrize("kernel", [j.name for j in ALL + MORE + GRADS])
def test_runs_on_the_tensor_cores(built, kernel):
    found, ops = built[kernel], built[kernel]["ops"]
    if found["arch"] == "sm_90":
        assert ops["HMMA"] == 0
        (shape,) = found["hgmma"]
        assert shape == f"64x{JOBS[kernel].constexprs['BLOCK_N']}x16"
    elif found["arch"] == "sm_100":
        assert ops["UTCMMA"] > 0 and ops["HMMA"] == 0
    elif found["arch"].startswith("sm_"):
        assert ops["HMMA"] > 0
    else:
        assert ops["MFMA"] > 0


@pytest.mark.parametrize("kernel", [n for n, case in CASES.items() if case.aligned])
def test_loads_tiles_the_fast_way(built, kernel):
    ops, case = built[kernel]["ops"], CASES[kernel]
    if case.config.descriptors:
        assert ops["UTMALDG"] >= 2 and ops["LDGSTS"] == 0
    elif case.arch == "sm_80":
        assert ops["LDGSTS"] > 0
    else:
        assert ops["global_load_dwordx4"] > 0


@pytest.mark.parametrize("kernel", CASES)
def test_exponentials_per_logit(built, kernel):
    found, case = built[kernel], CASES[kernel]
    logits = case.config.block_m * case.config.block_n / found["threads"]
    count = found["ops"]["MUFU.EX2" if "MUFU.EX2" in found["ops"] else "v_exp"]
    copies = 2 if case.arch == "sm_100" and case.config.flatten else 1  # the last tile has its own
    assert logits <= count <= 1.2 * logits * copies * (2 if case.softcap else 1) + 2


@pytest.mark.parametrize("kernel", [j.name for j in GRADS])
def test_d_costs_no_exponential_and_leaves_in_wide_stores(built, kernel):
    found, job = built[kernel], JOBS[kernel]
    shape, ops = job.constexprs, found["ops"]
    logits = shape["BLOCK_M"] * shape["BLOCK_N"] / found["threads"]
    count = ops["MUFU.EX2" if "MUFU.EX2" in ops else "v_exp"]
    assert logits <= count <= 1.2 * logits * (2 if shape["SOFTCAP"] else 1) + 4
    if job.arch.startswith("sm_"):
        assert ops["STG.128"] >= logits / 8
    else:
        assert ops["global_store"] <= logits / 2 + 20


def test_config_returns_only_what_is_shipped():
    shipped = {(c.arch, c.config, c.softcap, c.additive, c.aligned) for c in SHIPPED}
    sizes = itertools.product((64, 576, 896, 2304, 4096, 8192), (1000, 49152, 128256, 151936))
    for (hidden, vocab), arch in itertools.product(sizes, TESTED):
        for softcap, bias, aligned in itertools.product((False, True), repeat=3):
            given = {"softcap": softcap, "bias": bias, "aligned": aligned}
            for dtype in (torch.bfloat16, torch.float16):
                chosen = config(arch, hidden, vocab, dtype, **given)
                additive = bias or vocab % chosen.block_n != 0
                assert (arch, chosen, softcap, additive, aligned) in shipped


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120", "sm_110", "gfx90a", "gfx1100"])
def test_config_of_other_gpus(arch):
    chosen = config(arch, 4096, 128256, torch.float16)
    assert isinstance(chosen, Config) and not chosen.descriptors


def test_config_takes_device_properties():
    class Properties:
        major, minor, gcnArchName = 9, 0, "gfx942:sramecc+:xnack-"

    arch = "gfx942" if torch.version.hip else "sm_90"
    want = config(arch, 4096, 128256, torch.bfloat16)
    assert config(Properties(), 4096, 128256, torch.bfloat16) == want


def test_config_rejects_other_dtypes():
    with pytest.raises(ValueError, match="dtype: got torch.float32"):
        config("sm_90", 4096, 128256, torch.float32)


@pytest.mark.parametrize("vocab", [1, 49152, 151936, 2**20])
def test_scratch_memory_is_bounded(vocab):
    for case in SHIPPED:
        chosen = case.config
        most = launch_tokens(chosen, 10**6, vocab)
        tiles = -(-vocab // chosen.block_n)
        assert most == 10**6 or most % chosen.block_m == 0
        assert 8 * most * tiles <= 2**27 and (2 * tiles + 1) * most < 2**31
        assert launch_tokens(chosen, 5, vocab) == 5
