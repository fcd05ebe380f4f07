"""The measurement of a head, mostly on a CPU that pretends to be a GPU: nothing that goes wrong on
the way may cost more than its own figure."""

from __future__ import annotations

import gc
import json
import time
from types import SimpleNamespace

import machine
import pytest
import torch

from fastpref.bench import arguments, cases, parts, peers, report
from fastpref.bench import device as devices
from fastpref.bench import worker as workers
from fastpref.bench.problem import SHAPES, dpo_loss, float64_truth, make_problem, parse_shape
from fastpref.bench.run import BenchResult
from fastpref.bench.targets import compared
from fastpref.bench.targets import targets as targets_of

CPU = torch.device("cpu")
SMALL = "16,8,64"
GPU = ["--device", "cuda"]


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    """A measurement collects garbage before each call, and thaws what was frozen at its end: here
    it would then look at every library that the tests have imported, hundreds of times."""
    gc.freeze()
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


# ---- the inputs --------------------------------------------------------------------------------


def test_shapes():
    products = {name: 2 * s.n * s.h * s.v / 790e12 * 1e3 for name, s in SHAPES.items()}
    wanted = {"a": 10.90, "b": 2.82, "c": 6.12, "d": 1.17, "e": 5.45}  # ms at 790 TFLOP/s
    assert products == pytest.approx(wanted, abs=0.006)
    assert parse_shape("c/1024").n == 1024 and parse_shape("c/1024").softcap == 30.0
    assert parse_shape("4,5,6,30/8").n == 8
    for bad in ("z", "1,2", "a/b", "1,2,x", "-4,8,64", "4,0,64", "a/-2", "4,8,64,-1"):
        with pytest.raises(ValueError):
            parse_shape(bad)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_zipf_problem_and_its_truth(softcap):
    p = make_problem(256, 64, 4000, torch.bfloat16, CPU, softcap, zipf=True)
    blocks: list[None] = []
    truth = float64_truth(p, lambda: blocks.append(None))
    assert blocks  # the supervisor hears that it goes on
    assert 0.25 < truth.median_probability < 0.75
    x, w = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))
    z = x @ w.t()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logps = z.log_softmax(-1).gather(-1, p.labels[..., None])[..., 0]
    loss = dpo_loss(logps.sum(1), p.ref_logps.double())
    loss.backward()
    assert truth.loss[True] == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(truth.logps, logps.detach().flatten())
    torch.testing.assert_close(truth.dhidden[True], x.grad.flatten(0, 1)[truth.tokens])
    torch.testing.assert_close(truth.dweight[True], w.grad[truth.rows])


# ---- a worker ----------------------------------------------------------------------------------


def _request(**changes):
    tasks = [{"id": mode, "kind": "cell", "shape": SMALL, "mode": mode} for mode in peers.MODES]
    request = {
        "tasks": [
            *tasks,
            {"id": "rows", "kind": "rows", "shape": SMALL + ",30"},
            {"id": "logits", "kind": "logits", "shape": SMALL},
        ],
        "deadline": time.time() + 600,
        "least_seconds": 0.0,
        "modes": list(peers.MODES),
        "precision": ["exact", "fast"],
        "peers": None,
        "repeats": 3,
        "seconds": 1.0,
    }
    return {**request, **changes}


def _work(request, device=None):
    said = []
    worker = workers.Worker(device or devices.PretendGpu(), request, said.append)
    worker.run()
    assert json.loads(json.dumps(said)) == said
    results = [compared(m["result"]) for m in said if "result" in m]
    for result in results:
        assert report.report(result)
    return said, {r["id"]: r for r in results}


def _peers(monkeypatch, *entries):
    eager = next(e for e in peers.PEERS if e.name == peers.EAGER)
    monkeypatch.setattr(peers, "PEERS", (eager, *entries))


def _raising(error):
    def make():
        raise error

    return make


def test_every_mode(monkeypatch):
    def late():  # fails when it has been warm for a while
        calls = []

        def logps(p):
            calls.append(1)
            if len(calls) > 4:
                raise torch.OutOfMemoryError("tried to allocate 8 GiB")
            return peers._full(p.hidden, p.weight, p.labels, p.softcap)

        return peers._from_logps(logps)

    def wrong():
        return peers._from_logps(lambda p: 2 * (p.hidden @ p.weight.t()).mean(-1))

    _peers(
        monkeypatch,
        peers.Entry("absent", _raising(ModuleNotFoundError("No module named 'absent'"))),
        peers.Entry("large", _raising(torch.OutOfMemoryError("no room"))),
        peers.Entry("late", late, products=4),
        peers.Entry("wrong", wrong, products=4),
        peers.Entry("capless", _raising(RuntimeError), softcap=False),
    )
    sides = {
        "eager": lambda: parts._plain,
        "absent": _raising(ModuleNotFoundError("No module named 'absent'")),
        "large": _raising(torch.OutOfMemoryError("no room")),
    }
    monkeypatch.setattr(parts, "LOGITS_PEERS", sides)
    _, results = _work(_request())
    for mode in peers.MODES:
        rows = {r["variant"]: r for r in results[mode]["variants"]}
        assert rows["absent"]["missing"] == "ModuleNotFoundError: No module named 'absent'"
        assert rows["large"]["missing"].startswith("out of memory: ")
        assert rows["late"]["missing"].startswith("out of memory: ")
        assert rows["wrong"]["wrong"] and "speed_over_eager" not in rows["wrong"]
        assert rows["eager"]["speed_over_eager"] == 1.0
        ours = [r for r in rows.values() if r["ours"] and "missing" not in r]
        assert ours and all(0 < r["roofline_fraction"] and r["same_bits_twice"] for r in ours)
        assert all(r["errors"]["sum_max"] < 1e-3 for r in ours if r["precision"] == "exact")
        assert len(results[mode]["products"]) == (3 if mode == "trainable" else 0)
    kernels = results["rows"]["kernels"]
    assert {k["kernel"] for k in kernels} == {"fold", "grad"}
    assert all(0 < k["of_copy"] for k in kernels) and results["rows"]["copy"]["gb_per_s"] > 0
    sides = {k["backend"]: k for k in results["logits"]["kernels"]}
    assert set(sides) == {"fastpref native", "fastpref eager", "eager", "absent", "large"}
    assert sides["absent"]["missing"].startswith("ModuleNotFoundError")
    assert sides["large"]["missing"].startswith("out of memory") and sides["large"]["peer"]
    assert all("gb_per_s" in sides[name] for name in ("fastpref native", "eager"))
    for result in results.values():
        result["targets"] = targets_of(result)
    targets = [t for r in results.values() for t in r["targets"]]
    assert [t for t in targets if t["target"].startswith("logits, fastpref native")]
    assert not [t for t in targets if t["target"].startswith(("logits, eager", "logits, absent"))]
    assert any(t["measured"] is not None for t in targets)
    closing = report.closing(BenchResult(results=[*results.values()], dropped=["x"], stops=["y"]))
    assert "left out: x" in closing and "stopped: y" in closing


def test_the_backends_that_are_asked_for(monkeypatch):
    """CUDA's, emulated: it has fold and grad in one."""
    reason = machine.why_not("cuda")
    if reason is not None or machine.HAS_GPU:
        pytest.skip(reason or "this is for CPUs")
    monkeypatch.setattr(parts, "LOGITS_PEERS", {})
    tasks = _request()["tasks"][-2:]
    _, results = _work(_request(tasks=tasks, backends=["cuda"], repeats=1))
    kernels = results["rows"]["kernels"]
    assert {k["kernel"] for k in kernels} == {"fold", "grad", "fold_grad"}
    assert all(k["backend"] == "cuda" and "of_copy" in k for k in kernels)
    moved = {k["kernel"]: k["bytes"] for k in kernels if k["precision"] == "exact"}
    assert moved["grad"] == moved["fold_grad"] == 1.5 * moved["fold"]
    assert [k["backend"] for k in results["logits"]["kernels"]] == ["fastpref cuda"]


def test_a_shape_with_a_softcap_leaves_out_who_has_none(monkeypatch):
    _peers(monkeypatch, peers.Entry("capless", _raising(RuntimeError), softcap=False))
    task = {"id": "cell", "kind": "cell", "shape": SMALL + ",30", "mode": "frozen"}
    _, results = _work(_request(tasks=[task]))
    rows = {r["variant"]: r for r in results["cell"]["variants"]}
    assert rows["capless"]["missing"] == "it has no softcap"


def test_what_a_small_call_costs(monkeypatch):
    _peers(monkeypatch)
    task = {"id": "overhead", "kind": "overhead", "shape": SMALL}
    _, results = _work(_request(tasks=[task], precision=["exact"]))
    modes = results["overhead"]["modes"]
    assert list(modes) == list(peers.MODES)
    row = next(r for r in modes["trainable"] if r["variant"] == "eager")
    assert row["wall_us"] >= row["forward_us"] > 0 and row["backward_us"] > 0
    assert "backward_us" not in modes["forward-only"][0]
    assert [t for r in results.values() for t in targets_of(r)]


def test_no_time_left(monkeypatch):
    _peers(monkeypatch, peers.Entry("slow", _raising(RuntimeError("made"))))
    request = _request(deadline=time.time() - 1, least_seconds=0.0)
    said, results = _work(request)
    assert not results and [m["dropped"] for m in said if "dropped" in m] == [
        t["id"] for t in request["tasks"]
    ]
    # With time for the task and not for the peers of it.
    request = _request(deadline=time.time() + 5, tasks=_request()["tasks"][:3] * 2)
    monkeypatch.setattr(workers, "_RESERVE_S", 1e9)
    _, results = _work(request)
    rows = {r["variant"]: r for r in results["trainable"]["variants"]}
    assert rows["slow"]["missing"] == "left out: no time left" and rows["slow"]["dropped"]
    assert "time" in rows["fastpref eager exact, stash"]


def test_a_gpu_that_is_beyond_use_ends_the_worker(monkeypatch):
    class Lost(devices.PretendGpu):
        def check(self, why):
            raise devices.Lost(why)

    _peers(monkeypatch, peers.Entry("bad", _raising(RuntimeError("illegal memory access"))))
    with pytest.raises(devices.Lost, match="illegal memory access"):
        _work(_request(), Lost())
    excluded = {"bad": "it stopped the process: illegal memory access"}
    # Backends without a pass in one kernel would fail in the third mode.
    tasks = [{**t, "excluded": excluded} for t in _request()["tasks"][:2]]
    _, results = _work(_request(tasks=tasks), Lost())
    rows = {r["variant"]: r for r in results["trainable"]["variants"]}
    assert rows["bad"]["missing"] == excluded["bad"]


# ---- the GPU itself, with a torch.cuda of the test's own -----------------------------------------


def test_timing_with_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = len(log)

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 2.0 * (other.at - self.at)  # ms

    properties = SimpleNamespace(
        name="GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**37,
        L2_cache_size=2**20,
    )  # fmt: skip
    fakes = {
        "is_available": lambda: True,
        "set_device": lambda device: None,
        "get_device_properties": lambda device: properties,
        "Event": Event,
        "_sleep": lambda cycles: log.append(f"spin {cycles}"),
        "synchronize": lambda device=None: log.append("synchronize"),
        "empty_cache": lambda: log.append("empty"),
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 1234,
        "reset_peak_memory_stats": lambda device: log.append("reset peak"),
        "device_count": lambda: 1,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    monkeypatch.setattr(devices, "_FLUSH_BYTES", 1024)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    device = devices.Gpu()
    spin = next(line for line in log if line.startswith("spin "))
    del log[:]
    times = device.time(lambda: log.append("call"), lambda: log.append("reset"))
    cycles = int(0.002 * 1_000_000 / 4e-3)  # three log entries between its events: 4 ms
    assert spin == "spin 1000000"
    assert log == ["reset", "synchronize", f"spin {cycles}", "record", "call", "record", "wait"]
    assert times.device == 4e-3 and times.host >= 0
    assert device.peak(lambda: log.append("call"))["peak_beyond"] == 234
    device.free()
    device.check("no reason")
    about = device.describe()
    assert about["gpu"] == "GPU" and about["capability"] == "9.0" and about["l2_mib"] == 1.0


# ---- the command -------------------------------------------------------------------------------


def _tasks(*argv):
    return cases.tasks(arguments.options_of(arguments.arguments(list(argv))))


def test_which_mode_runs(monkeypatch):
    def device(*argv):
        return arguments.arguments(list(argv)).device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == "cpu" and device("--device", "cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == "cuda" and device("--shapes", "a") == "cuda"
    assert device("--device", "cpu") == "cpu"
    assert arguments.arguments(["--device", "cpu", "--repeats", "3"]).repeats == 3


def test_options_and_the_order_of_tasks(capsys):
    for bad in (
        ["--shapes", "q"],
        ["--modes", "none"],
        ["--peers", "x"],
        ["--precision", "y"],
        ["--backends", "z"],
    ):
        with pytest.raises(SystemExit):
            arguments.arguments([*GPU, *bad])
        assert bad[0] in capsys.readouterr().err
    names = [t["id"] for t in _tasks(*GPU)]
    assert names[:4] == ["a trainable", "a frozen", "a forward-only", "row kernels of a"]
    assert names.index("overhead of d/256") < names.index("a/1024 trainable")
    assert names[-1] == "d/1024 forward-only" and len(names) == len(set(names)) == 42
    assert arguments.arguments(["--backends", "triton,cuda"]).backends == ["triton", "cuda"]


def test_both_names_of_an_option_in_one_word():
    """As the help of --precision and --dtype says."""
    args = arguments.arguments(["--precision", "both", "--dtype", "both"])
    assert args.precision == ["exact", "fast"] and args.dtype == ["bf16", "fp32"]
    with pytest.raises(SystemExit):
        arguments.arguments(["--modes", "both"])  # of three


def test_the_whole_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--device", "pretend", "--shapes", SMALL, "--small", "", "--modes", "frozen"]
    options += ["--peers", "", "--repeats", "2", "--output", str(tmp_path / "out")]
    arguments.main(options)
    results = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").stat().st_size > 1000
    wanted = [f"{SMALL} frozen", f"row kernels of {SMALL}", f"ready logits of {SMALL}"]
    assert [r["id"] for r in results["results"]] == wanted
    assert results["machine"]["gpu"].startswith("none") and results["targets"]
    assert "targets: " in capsys.readouterr().out


def test_the_whole_command_on_a_cpu(tmp_path):
    """Memory comes from another process and stands in the rows; --only leaves sides out."""
    options = ["--device", "cpu", "--dtype", "fp32", "--shapes", SMALL, "--modes", "frozen"]
    options += ["--only", "fastpref;eager", "--repeats", "2", "--output", str(tmp_path / "out")]
    arguments.main(options)
    (cell,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert cell["shape"] == {"N": 16, "H": 8, "V": 64} and cell["canary"]["median_ms"] > 0
    assert [r["variant"] for r in cell["variants"]] == ["fastpref exact", "eager"]
    assert all(
        r["memory"]["peak_beyond"] >= 0 and r["time"]["median_ms"] > 0 for r in cell["variants"]
    )
    assert [name for name in cell["head_products"]] == ["X W^T", "D W"]


def test_single_parts_are_asked_for():
    def names(*argv):
        return [t["id"] for t in _tasks(*GPU, *argv)]

    assert names("--shapes", "b", "--parts", "logits") == ["ready logits of b"]
    only = ["--shapes", "c d", "--modes", "forward-only", "--parts", "head"]
    assert names(*only) == ["c forward-only", "d forward-only"]
