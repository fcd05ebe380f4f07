"""`run_bench`: what is measured, what is wrong, and what has changed since an earlier result."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch

from fastpref.bench import bench, compare_results, load_result, ours, peers, run_bench, tables
from fastpref.bench import device as devices
from fastpref.bench import worker as workers
from fastpref.bench.bench import bench_options, select_peers
from fastpref.bench.cases import Case, make_cases, scaled, tasks
from fastpref.bench.compare import machine_differences
from fastpref.bench.runner import Rounds
from fastpref.bench.targets import compared
from fastpref.bench.verdict import fault

SMALL = "16,8,64"


@pytest.fixture(scope="module")
def result():
    """One real run, in a process of its own."""
    found = run_bench(
        [SMALL], dtypes=["fp32"], modes=["frozen"], peers=[], repeats=2, device="cpu", memory=False
    )
    return json.loads(json.dumps(found.as_dict()))


# ---- what is measured --------------------------------------------------------------------------


def test_a_run(result):
    (cell,) = result["cells"]
    assert [row["variant"] for row in cell["variants"]] == ["fastpref exact", "eager"]
    assert all(row["speed_over_eager"] > 0 and not row["wrong"] for row in cell["variants"])
    assert all(row["errors"]["sum_max"] < 1e-4 for row in cell["variants"])
    (rates,) = [r for r in result["results"] if r["kind"] == "roofline"]
    assert rates["product"]["tflop_per_s"] > 0 and rates["copy"]["gb_per_s"] > 0


def test_sizes_that_make_no_problem():
    for bad in ("-4,8,64", "4,0,64", "1,2", "4,8,x", "5,8,64", "1536,8,64"):
        with pytest.raises(ValueError, match="shape|N:"):
            bench_options([bad], device="cpu")
    with pytest.raises(ValueError, match="GB"):
        bench_options(["512,100000,9000000"], device="cpu")


def test_a_head_that_does_not_fit_what_is_free(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 10**5)
    with pytest.raises(ValueError, match="takes about 0.0 GB with eager logits; 0.0 GB are free"):
        bench_options(["16,64,2048"], device="cpu")
    monkeypatch.setattr(bench, "free_memory", lambda: None)  # a system that does not tell
    bench_options(["16,64,2048"], device="cpu")


def test_backends_that_cannot_run_are_refused_before_anything_is_measured(monkeypatch):
    def choose(device, dtype, name):  # other tests of the process may emulate CUDA on the CPU
        if name == "cuda":
            raise RuntimeError("backend='cuda' needs a GPU")

    monkeypatch.setattr(bench, "choose", choose)
    given = {"device": "cpu", "dtypes": ["fp32"]}
    with pytest.raises(ValueError, match="backends: none of them can run here: backend='cuda'"):
        bench_options([SMALL], backends=["cuda"], **given)
    # One that can run is enough: the other one's row has its reason.
    options = bench_options([SMALL], backends=["cuda", "eager"], **given)
    assert options.backends == ["cuda", "eager"]


def test_a_long_call_is_waited_for():
    assert bench_options([SMALL], device="cpu").patience == 120
    large = Case("8192,4096,128000", dtypes=("fp32",), threads=2)
    assert bench._patience([large], "cpu") > 1000


@pytest.mark.parametrize(
    "options",
    [
        {"peers": ["nobody"]},
        {"modes": ["none"]},
        {"backends": ["x"]},
        {"strategies": ["mixed"]},
        {"precision": []},
        {"repeats": 0},
        {"budget": -1.0},
        {"gradient_tolerance": -0.1},
        {"scale": "heads"},
        {"device": "tpu"},
    ],
)
def test_options_that_are_not_known(options):
    with pytest.raises(ValueError, match=next(iter(options))[:6]):
        bench_options([SMALL], **{"device": "cpu", **options})


def test_a_model_gives_hidden_size_vocabulary_and_dtype(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, vocab_size=100, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    (case,) = make_cases([str(tmp_path)], tokens=64)
    assert case.shape == "64,32,100" and case.dtypes == ("bf16",) and case.model == tmp_path.name
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected N,H,V, or the name or folder of a model"):
        make_cases([str(tmp_path)])


def test_scaling():
    (case,) = make_cases(["512,8,64"], dtypes=["fp32"])
    shapes = [c.shape for c in scaled([case], "tokens", 2)]
    assert shapes == ["128,8,64", "256,8,64", "512,8,64", "1024,8,64"]
    assert [c.shape for c in scaled([case], "vocab", 2)][0] == "512,8,16"
    assert [c.threads for c in scaled([case], "threads", 6)] == [1, 2, 4, 6]
    options = bench_options(["512,8,64"], scale="threads", device="cpu", peers=[])
    names = [task["id"] for task in tasks(options) if task["kind"] == "cell"]
    assert all("threads" in name for name in names) and len(set(names)) == len(names)


def test_equal_heads_are_one_case():
    cases = make_cases(["64,16,256", "64,16,256", "64,16,512"], dtypes=["fp32"])
    assert [case.shape for case in cases] == ["64,16,256", "64,16,512"]
    named = [Case("64,16,256", ("bf16",), name) for name in ("one", "two", "one")]
    named.append(Case("64,16,256", ("fp32",), "one"))
    found = scaled(named, "vocab", 2)
    assert [(c.shape, c.dtypes, c.model) for c in found[::4]] == [
        ("64,16,64", ("bf16",), "one, two"), ("64,16,64", ("fp32",), "one"),
    ]  # fmt: skip
    assert len(found) == 8


def test_a_scaled_result_as_a_table():
    def cell(n, ms):
        row = {"variant": "eager", "ours": False, "other_function": False, "wrong": False}
        row |= {"time": {"median_ms": ms}, "precision": None}
        size = {"n": n, "h": 8, "v": 64}
        return {"size": size, "dtype": "fp32", "mode": "frozen", "variants": [row]}

    header, lines = tables.scaling_table([cell(128, 2.0), cell(256, 5.0)], "tokens")
    assert header[1:] == ["N=128", "N=256"]
    assert lines == [["eager, fp32, frozen", "2.00", "5.00 (2.50x)"]]


def test_peers_that_are_not_installed_are_named(monkeypatch):
    there = {"torch"}
    monkeypatch.setattr(peers, "find_spec", lambda name: name if name in there else None)
    names, missing = select_peers(None, "cpu")
    assert "torch.compile" in names and missing["TRL chunked"] == "trl is not installed"
    assert select_peers(["TRL"], "cpu") == ([], {"TRL chunked": "trl is not installed"})
    assert select_peers([], "cpu") == ([], {})


def test_rounds_end_with_the_time():
    rounds = Rounds(devices.Device(), 50, 10.0, deadline=time.time() - 1)
    rounds.run({"a": lambda: None}, {"a": 1e-6})
    assert len(rounds.device["a"].seconds) == 1 and not rounds.failed


# ---- what is wrong -----------------------------------------------------------------------------


def _cell(monkeypatch, side):
    """A cell with eager torch and with another way in fastpref's place."""
    eager = next(e for e in peers.PEERS if e.name == peers.EAGER)
    monkeypatch.setattr(peers, "PEERS", (eager,))
    monkeypatch.setattr(ours, "_fastpref", lambda backend, options: side)
    task = {"id": "cell", "kind": "cell", "shape": SMALL, "mode": "trainable", "dtype": "fp32"}
    request = {"tasks": [task], "deadline": time.time() + 600, "least_seconds": 0.0}
    request |= {"precision": ["exact"], "strategies": ["stash"], "peers": [], "repeats": 2}
    said = []
    workers.Worker(devices.Device(), request | {"seconds": 1.0}, said.append).run()
    return compared(next(m["result"] for m in said if "result" in m))


def _shifted(p):
    """Log-probs that are half a nat off, with the true gradients of their sums."""
    return peers._full(p.hidden, p.weight, p.labels, None) - 0.5


def _scaled_gradient(p):
    logps = peers._full(p.hidden, p.weight, p.labels, None)
    return logps.detach() + 1.1 * (logps - logps.detach())


@pytest.mark.parametrize("logps, why", [(_shifted, "log-prob"), (_scaled_gradient, "gradient")])
def test_a_wrong_backend_has_no_speed(monkeypatch, logps, why):
    cell = _cell(monkeypatch, peers._from_logps(logps))
    mine = next(row for row in cell["variants"] if row["ours"])
    assert mine["wrong"] and why in mine["wrong_because"] and "speed_over_eager" not in mine
    header, lines = tables.cell_table(cell)
    line = next(line for line in lines if line[0].startswith("fastpref"))
    assert line[1:5] == ["WRONG", "-", "-", "-"]
    assert any("is wrong" in note and why in note for note in tables.notes_of(cell))


def test_what_counts_as_wrong():
    good = {"dhidden": 1e-6, "dweight": 1e-6, "logp_rms": 1e-6, "sum_max": 1e-4, "loss": 1e-6}
    assert fault(good, "fp32", tokens=16, loss=0.7) is None
    for name in good:
        for value in (float("nan"), 10.0):
            assert fault(good | {name: value}, "fp32", tokens=16, loss=0.7), name
    rough = good | {"dhidden": 0.02}
    assert fault(rough, "fp32", tokens=16) and not fault(rough, "fp32", tokens=16, tolerance=0.02)


def test_approximate_gradients_are_measured_beside_the_exact_ones():
    names = [e.name for e in ours.ours("frozen", [None], ["exact"], tolerance=0.1)]
    assert names == ["fastpref exact", "fastpref exact, tolerance 0.1"]


# ---- what has changed --------------------------------------------------------------------------


def _slower(result, factor, side="fastpref exact"):
    new = copy.deepcopy(result)
    for cell in new["cells"]:
        for row in cell["variants"]:
            if row["variant"] == side:
                times = row["time"]
                times["median_ms"] *= factor
                times["quartiles_ms"] = [factor * q for q in times["quartiles_ms"]]
    return new


@pytest.fixture
def quiet(result):
    """The run with quartiles at its medians."""
    new = copy.deepcopy(result)
    for cell in new["cells"]:
        for found in [cell["canary"], *(row["time"] for row in cell["variants"])]:
            found["quartiles_ms"] = [found["median_ms"]] * 2
    return new


def _verdict(old, new):
    return {c.side: (c.verdict, c.regression) for c in compare_results(old, new)}


def test_a_planted_regression_is_found(quiet):
    assert _verdict(quiet, quiet)["fastpref exact"] == ("same", False)
    assert _verdict(quiet, _slower(quiet, 1.3))["fastpref exact"] == ("slower", True)
    assert _verdict(quiet, _slower(quiet, 0.5))["fastpref exact"] == ("faster", False)
    assert _verdict(quiet, _slower(quiet, 1.3, "eager"))["eager"] == ("slower", False)
    (change,) = [c for c in compare_results(quiet, _slower(quiet, 1.3)) if c.side != "eager"]
    assert change.ratio == change.low == change.high == pytest.approx(1.3, abs=1e-3)


def test_what_the_machine_or_its_noise_explains_is_no_regression(quiet):
    slow = _slower(quiet, 1.3)
    slow["cells"][0]["canary"]["median_ms"] *= 1.3
    assert _verdict(quiet, slow)["fastpref exact"] == ("same", False)
    noisy = _slower(quiet, 1.3)
    row = next(r for r in noisy["cells"][0]["variants"] if r["ours"])
    row["time"]["quartiles_ms"][0] = row["time"]["median_ms"] / 2
    assert _verdict(quiet, noisy)["fastpref exact"] == ("same", False)


def test_errors_memory_and_sides_that_are_gone(quiet):
    def changed(**values):
        new = _slower(quiet, 1.0)
        next(r for r in new["cells"][0]["variants"] if r["ours"]).update(values)
        return _verdict(quiet, new)["fastpref exact"]

    assert changed(errors={"sum_max": 0.1}) == ("less exact", True)
    assert changed(missing="RuntimeError: no") == ("gone", True)
    assert changed(wrong=True, wrong_because="no") == ("wrong", True)
    old, new = _slower(quiet, 1.0), _slower(quiet, 1.0)
    for found, size in ((old, 2**24), (new, 2**26)):
        found["cells"][0]["variants"][0]["memory"] = {"extra": size}
    assert _verdict(old, new)["fastpref exact"] == ("more memory", True)


def test_another_machine_and_other_cases(quiet):
    new = copy.deepcopy(quiet)
    new["machine"]["cpu"] = "another"
    with pytest.raises(ValueError, match="another machine .processor"):
        compare_results(quiet, new)
    assert not machine_differences(quiet["machine"], quiet["machine"])
    new = copy.deepcopy(quiet)
    new["cells"][0]["size"]["n"] = 32
    with pytest.raises(ValueError, match="none of these cases"):
        compare_results(quiet, new)
    with pytest.raises(ValueError, match="threshold"):
        compare_results(quiet, quiet, threshold=-1)


@pytest.mark.parametrize("text", [None, "no JSON", "[]", "{}", '{"machine": {}, "cells": [{}]}'])
def test_an_old_result_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="old.json"):
        load_result(path)


def test_a_file_of_the_repository_is_a_result():
    from pathlib import Path

    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "head.json"
    assert len(load_result(path)["cells"]) == 6


def test_threads_are_those_of_the_task(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    case = Case(SMALL, ("fp32",), threads=1)
    options = bench_options([SMALL], device="cpu", peers=[], dtypes=["fp32"])
    options.cases, options.parts = [case], ["head"]
    request = options.request() | {"tasks": tasks(options)[:1]}
    request |= {"deadline": time.time() + 60, "least_seconds": 0.0, "repeats": 1}
    workers.Worker(devices.Device(), request, lambda message: None).run()
    assert seen == [1]
