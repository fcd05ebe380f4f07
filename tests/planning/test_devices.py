"""Plans for devices of the table, and for several that share a training."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("typer")

from support import tiny
from typer.testing import CliRunner

from fastpref import cli
from fastpref.planning import StepOptions, plan_training
from fastpref.planning.counts import count_weights, trained_share
from fastpref.planning.devices import DEVICES, find_device, own_device, parse_memory
from fastpref.planning.estimate import Planner, default_lengths
from fastpref.planning.sharding import exchange_seconds
from fastpref.planning.simulate import step_head
from fastpref.planning.times import Rates, StepTime


@pytest.fixture(scope="module")
def config():
    return tiny.model(vocab_size=4_000).config


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["plan", "--no-probe", *map(str, arguments)])


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("800mb", 8 * 10**8),
        ("24G", 24 * 10**9),
        ("2Gi", 2**31),
        ("1PB", 10**15),
        ("8000000", 8_000_000),
    ],
)
def test_memory_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["24 apples", "", "GB", "1.2.3GB", "0GB", ".", "9" * 400, "-1", "24", "1,5GB", "9EB"]
)
def test_bad_memory_sizes(text):
    with pytest.raises(ValueError, match="memory: got"):
        parse_memory(text)


def test_sharding_divides_what_is_sharded(config):
    planner = Planner(config, default_lengths(64), "cuda")
    options = StepOptions(device="cuda", memory_budget=2**30)
    one, four = (planner.estimate(options, 1, 1, 64, n).components for n in (1, 4))
    assert four["optimiser"] == one["optimiser"] // 4 and four["weights"] == one["weights"] // 4
    # Two layers and the head, with whole gradients; the input embedding is not tied.
    total = count_weights(config, options)[0]
    head = config.vocab_size * config.hidden_size
    layers = 4 * (total - 2 * head) / config.num_hidden_layers
    assert four["gathered"] == pytest.approx(2 * (2 * layers + 4 * head), rel=1e-3)
    half = replace(options, bf16=True)  # gathers in bf16
    found = planner.estimate(half, 1, 1, 64, 4).components["gathered"]
    assert found == pytest.approx(four["gathered"] / 2, abs=1)
    # Without gradients of weights, and without those that wait for the last micro-batch.
    lora = replace(options, method="lora", reference="adapter")
    for other, accumulation in ((lora, 1), (options, 2)):
        found = planner.estimate(other, 1, accumulation, 64, 4).components["gathered"]
        assert found == pytest.approx(four["gathered"] / 2, rel=0.2)
    # 4-bit weights are whole on each device, embeddings and the adapter are not.
    qlora = StepOptions(method="qlora", device="cuda", dtype=torch.bfloat16, reference="adapter")
    one, four = (planner.estimate(qlora, 1, 1, 64, n).components for n in (1, 4))
    quantised = (total - 2 * head) * 4.127 / 8
    rest = one["weights"] - quantised
    assert four["weights"] == pytest.approx(quantised + rest / 4, rel=0.01)


def test_the_peak_of_sharded_weights_is_where_activations_are(config):
    planner = Planner(config, default_lengths(64), "cuda")
    options = StepOptions(device="cuda", memory_budget=2**30, gradient_checkpointing=False)
    parts = planner.parts(options, 2, 64)
    one, many = (planner.estimate(options, 2, 1, 64, n) for n in (1, 10**6))
    moving = {k: sum(c.get(n, 0) for n in ("activations", "head")) for k, c in parts.items()}
    assert many.peak_phase == max(moving, key=moving.get)[0]
    found = sum(many.components.get(name, 0) for name in ("activations", "head"))
    assert found == max(moving.values())
    assert found >= sum(one.components.get(name, 0) for name in ("activations", "head"))


def test_devices_share_the_pairs_of_a_step(config):
    given = {"memory": 2**36, "batch_size": 8, "max_length": 64, "kind": "cuda", "table": False}
    way = plan_training(config, devices=4, **given).asked
    assert way.pairs * way.accumulation * way.devices == 8
    with pytest.raises(ValueError, match="batch_size: got 8, which 3 devices .* such as 9"):
        plan_training(config, devices=3, **given)
    rates = Rates("one", 1e11, 1e11, 1e10, 1e10, 1e-5, measured=False, link=1e9)
    planner = Planner(config, default_lengths(64), "cuda")
    one, two = (planner.estimate(StepOptions(device="cuda"), 1, 1, 64, n, rates) for n in (1, 2))
    assert two.seconds.optimiser == one.seconds.optimiser / 2
    tight = plan_training(config, **{**given, "memory": 2**20, "batch_size": 6, "max_length": 16})
    doubled = {text: way for text, way in tight.changes if "GPUs" in text}
    ((text, way),) = doubled.items()
    assert text == "2 GPUs that share the weights" and way.pairs * way.accumulation * 2 == 6


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_whole_until_devices_exchange_them(config, bf16):
    planner = Planner(config, default_lengths(64), "cuda")
    options = StepOptions(device="cuda", memory_budget=2**30, bf16=bf16)
    whole = trained_share(config, options) * (2 if bf16 else 4)
    accumulated = planner.estimate(options, 1, 2, 64, 4)
    assert accumulated.components["gradients"] >= whole
    each = replace(options, sync_each_batch=True)
    at_once = planner.estimate(each, 1, 2, 64, 4)
    assert 0 < at_once.components["gradients"] <= trained_share(config, options) * 8 // 4
    assert planner.estimate(options, 1, 1, 64, 4).bytes <= at_once.bytes < accumulated.bytes
    given = {"memory": 2**20, "batch_size": 132, "max_length": 64, "kind": "cuda", "table": False}
    plan = plan_training(config, devices=4, options=options, **given)
    assert not plan.asked.options.sync_each_batch
    (change,) = (way for text, way in plan.changes if "sync_each_batch" in text)
    assert change.options.sync_each_batch and change.pairs == 1 and change.accumulation == 33
    assert change.bytes < plan.asked.bytes


def test_a_micro_batch_without_accumulated_gradients_may_need_less(config):
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 1024}
    sizes["num_hidden_layers"] = 8
    config = type(config)(**{**config.to_dict(), **sizes})
    planner = Planner(config, default_lengths(16), "cuda")
    options = StepOptions(device="cuda", memory_budget=2**20)
    needs = {n: planner.estimate(options, n, 6 // n, 16, 4).bytes for n in (1, 2, 3, 6)}
    assert min(needs, key=needs.get) == 6
    assert planner.largest(options, 6, 16, 1, 4, None).pairs == 6
    assert planner.largest(options, 6, 16, 2 * needs[6], 4, None).pairs == 6


def test_a_pass_hides_an_exchange_that_takes_no_longer():
    step = StepTime(body_forward=1.0, head=9.0, body_backward=3.0, optimiser=9.0)
    assert exchange_seconds(step, 0.9, 3.0) == 0.0
    assert exchange_seconds(step, 1.5, 5.0) == 2.5


@pytest.mark.parametrize("method", ["full", "lora"])
def test_devices_wait_for_what_their_work_does_not_hide(config, method):
    def seconds(link, devices=4, accumulation=2, **changes):
        rates = Rates("one", 1e11, 1e11, 1e10, 1e10, 1e-5, measured=False, link=link)
        planner = Planner(config, default_lengths(64), "cuda")
        options = StepOptions(**{"method": method, "device": "cuda", **changes})
        return planner.estimate(options, 1, accumulation, 64, devices, rates).seconds

    assert seconds(0.0) is None and seconds(0.0, devices=1).exchange == 0.0
    assert seconds(1e15).exchange == 0.0
    slow, slower = seconds(1e6), seconds(1e5)
    # Bytes that each of 4 devices sends: in both micro-batches all weights in the forward pass and
    # those without the head in the backward pass, and in the last one the gradients.
    total, trained, _ = count_weights(config, StepOptions(method=method))
    head = config.vocab_size * config.hidden_size
    sent = 0.75 * 4 * (2 * total + 2 * (total - head) + trained)
    assert slower.exchange - slow.exchange == pytest.approx(sent * (1e-5 - 1e-6), rel=0.01)
    one = seconds(1e5, devices=1)
    hidden = one.body_forward + one.body_backward  # of both micro-batches
    assert slower.exchange == pytest.approx(sent * 1e-5 - hidden, rel=1e-3)
    assert slow.total == pytest.approx(
        slow.exchange + slow.body_forward + slow.head + slow.body_backward + slow.optimiser
    )
    again = seconds(1e5, sync_each_batch=True).exchange
    assert again - slower.exchange == pytest.approx(0.75 * 4 * trained * 1e-5, rel=0.01)
    # A second model is gathered as well, or the policy again without its head.
    other, again = ("model", total) if method == "full" else ("adapter", total - head)
    two = seconds(1e5, reference=other).exchange
    more = two + seconds(1e5, devices=1, reference=other).body_forward
    assert more - slower.exchange - one.body_forward == pytest.approx(
        0.75 * 4 * 2 * again * 1e-5, rel=0.01
    )
    half = seconds(1e5, bf16=True).exchange
    assert half == pytest.approx(slower.exchange / 2, rel=0.01)
    assert seconds(1e5, method="qlora").exchange < seconds(1e5, method="lora").exchange


def test_many_pairs_keep_no_more_logits_than_the_budget(config):
    """The bytes of many pairs follow from those of few, which may keep all of D."""
    planner = Planner(config, default_lengths(1024), "cuda")
    whole = StepOptions(device="cuda", memory_budget=2**40)
    tight = replace(whole, memory_budget=2**27)
    stashed, mixed = (planner.estimate(options, 8, 1, 1024) for options in (whole, tight))
    assert (stashed.head_strategy, mixed.head_strategy) == ("stash", "mixed")
    plan, _ = step_head(8 * 2 * 768, config.hidden_size, config.vocab_size, True, tight)
    made_again = 4 * (8 * 2 * 768 - plan.stash_tokens) * config.vocab_size
    found = stashed.components["head"] - mixed.components["head"]
    assert found == pytest.approx(made_again, rel=0.05)


def test_listed_rates_are_of_one_dtype_and_of_the_links_that_are_used():
    h100, server, mi300x = (find_device(name) for name in ("h100", "server", "mi300x"))
    assert h100.rates(False) is None and server.rates(True) is None
    assert server.rates(False).flops == 0.6 * server.flops
    assert h100.rates(True, 2).link == h100.rates(True, 8).link == 0.7 * 450e9
    links = [mi300x.rates(True, n).link / (0.7 * 64e9) for n in (1, 2, 4, 8, 16)]
    assert links == pytest.approx([1, 1, 3, 7, 7])


@pytest.mark.parametrize(
    "text, name",
    [
        ("h100", "H100 80GB"),
        ("A100 40GB", "A100 40GB"),
        ("4090", "RTX 4090 24GB"),
        ("a10", "A10 24GB"),
        ("desktop", "desktop, 8 AVX2 cores, 32GB"),
        ("A100-40GB", "A100 40GB"),
    ],
)
def test_devices_are_found_by_words_of_their_names(text, name):
    assert find_device(text).name == name


@pytest.mark.parametrize("text, number", [("a100", 2), ("", len(DEVICES)), ("tpu", len(DEVICES))])
def test_a_name_of_no_device_or_of_several_lists_them(text, number):
    with pytest.raises(ValueError, match=f"device: got '{text}', expected one of") as error:
        find_device(text)
    assert sum(f"'{d.name}'" in str(error.value) for d in DEVICES) == number


@pytest.mark.parametrize(
    "driver, mib, name",
    [
        ("NVIDIA H200", 143771, "H200 141GB"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100 80GB"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX 4090 24GB"),
        ("AMD Instinct MI300X", 196592, "MI300X 192GB"),
        ("NVIDIA A10G", 23028, None),
        ("NVIDIA H100 PCIe", 81559, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 24564, None),
        ("NVIDIA GeForce RTX 3090 Ti", 24564, None),
        ("NVIDIA GeForce RTX 4090 D", 24564, None),
        ("NVIDIA H200 NVL", 143771, None),
        ("NVIDIA GeForce RTX 4090", 12282, None),
        ("NVIDIA L40S", 46068, "L40S 48GB"),
    ],
)
def test_this_machine_s_gpu_is_found_by_its_driver_s_name(monkeypatch, driver, mib, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = types.SimpleNamespace(name=driver, total_memory=mib * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    device = own_device()
    assert (None if device is None else device.name) == name


def test_a_device_of_the_table_gives_memory_and_seconds(config, tmp_path):
    config.save_pretrained(tmp_path)
    given = ["--model", tmp_path, "--max-length", 64, "--batch-size", 16, "--no-table"]
    out = json.loads(invoke(*given, "--device", "h100", "--gpus", 4, "--json").stdout)
    h100 = find_device("h100")
    assert out["memory"] == h100.memory and out["rates"]["name"] == "H100 80GB"
    assert not out["probed"] and out["asked"]["seconds"]["total"] > 0
    assert out["asked"]["options"]["bf16"] and out["asked"]["devices"] == 4
    text = " ".join(invoke(*given, "--device", "h100", "--gpus", 4).stdout.split())
    assert "seconds follow from listed rates of H100 80GB and of its links within one" in text
    text = " ".join(invoke(*given, "--device", "h100", "--fp32").stdout.split())
    assert "no seconds: the rates of H100 80GB are listed in bf16 alone" in text
    out = json.loads(invoke(*given, "--device", "server", "--json").stdout)
    assert not out["asked"]["options"]["bf16"] and not out["rates"]["measured"]
    if not torch.cuda.is_available():
        text = invoke(*given, "--where", "gpu", "--memory", "24GB").stdout
        assert "no seconds: --device names a GPU of the table, such as h100" in text
        result = invoke(*given, "--where", "gpu")
        assert result.exit_code == 2 and "memory: this machine has no GPU" in result.stderr


def test_devices_have_no_more_memory_than_their_names_say():
    for device in DEVICES:
        named = parse_memory(device.name.split()[-1].rsplit(",")[-1].replace("GB", "GiB"))
        assert 0.92 * named < device.memory <= 1.01 * named
