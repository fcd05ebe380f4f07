"""Plans: the simulated memory is what a real step has, and what fits is chosen."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("typer")

from support import tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from fastpref import cli
from fastpref.planning import StepOptions, plan_training, simulate, simulate_step
from fastpref.planning import plan as plan_module
from fastpref.planning.counts import count_weights
from fastpref.planning.devices import DEVICES
from fastpref.planning.times import Rates, step_seconds
from fastpref.profiling.account import known_blocks
from fastpref.profiling.profile import choose_rows
from fastpref.profiling.worker import all_tensors, profile_side

VOCAB = 4_000
PAIRS = [(20, 60, 50), (30, 80, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny.model(vocab_size=VOCAB).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config():
    return tiny.model(vocab_size=VOCAB).config


LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


# Weights, reference, and whether activations are kept; each with both heads and two shapes.
SETTINGS = (
    ("full", "precompute", False),
    ("full", "precompute", True),
    ("full", "model", False),
    ("full", "model", True),
    ("lora", "adapter", False),
    ("lora", "adapter", True),
)


@pytest.mark.parametrize(
    "batch_size, max_length, accumulation", [(2, 128, 1), (3, 96, 1), (2, 128, 2)]
)
@pytest.mark.parametrize("side", ["fastpref", "eager"])
@pytest.mark.parametrize("method, reference, kept", SETTINGS)
def test_a_real_step_has_the_predicted_memory(
    model, config, side, kept, method, reference, batch_size, max_length, accumulation
):
    request = {
        "model": model, "side": side, "loss": {"loss_type": "sigmoid", "beta": 0.1}, "steps": 2,
        "batch_size": batch_size, "grad_accumulation": accumulation,
        "max_length": max_length, "reference": reference,
        "lora": LORA if method == "lora" else None, "bf16": False, "dtype": "float32",
        "gradient_checkpointing": not kept, "optim": None, "learning_rate": 1e-6, "seed": 0,
        "trust_remote_code": False, "device": "cpu", "prefix_sharing": True,
    }  # fmt: skip
    rows, batches = choose_rows(model, tiny.rows(16, longest=80), request, 1)
    # One step warms up, and the other is watched.
    per_step = batch_size * accumulation
    rows = rows[:per_step] + rows[-per_step:]
    with FakeTensorMode():
        fake = torch.empty(8)  # of somebody else, alive in this process
    real = torch.empty(2_000_000)  # too, as what other tests have left
    gc.collect()
    others = list(all_tensors())
    foreign = sum(block.size for block in known_blocks({"other": others}, "cpu"))
    assert foreign >= real.nbytes
    found = profile_side({**request, "rows": rows}, lambda message: None)
    del fake, others
    longest = [tuple(pair) for pair in batches["longest"][0]["lengths"]]
    options = StepOptions(
        method=method, head=side, gradient_checkpointing=not kept, reference=reference,
        accumulates=accumulation > 1,
    )  # fmt: skip
    account = simulate_step(config, longest, options)
    assert account.peak_bytes == pytest.approx(found["tensor_bytes"] - foreign, rel=0.1)
    assert account.peak_phase == found["peak_phase"]
    for name in ("weights", "optimiser", *(["reference"] if reference == "model" else [])):
        measured = found["components"][name]
        # Each micro-batch of the step has log-probs of the reference.
        assert account.components[name] == pytest.approx(measured, rel=0.02 * accumulation)


def test_deep_models_are_extrapolated_exactly(config, monkeypatch):
    deep = type(config)(**{**config.to_dict(), "num_hidden_layers": 7})
    totals = []
    for layers in ((2, 4), (7, 8)):
        monkeypatch.setattr(simulate, "LAYERS", layers)
        parts = simulate.simulate_parts(deep, PAIRS, StepOptions())
        totals.append({part: sum(sizes.values()) for part, sizes in parts.items()})
    assert max(totals[0].values()) == pytest.approx(max(totals[1].values()), rel=0.01)
    assert totals[0].keys() == totals[1].keys()


def test_weights_are_counted_without_being_made(config):
    real = tiny.model(vocab_size=VOCAB)
    total, trained, products = count_weights(config, StepOptions())
    assert total == trained == sum(p.numel() for p in real.parameters())
    layers = [p for p in real.model.layers.parameters() if p.dim() == 2]
    assert products == sum(p.numel() for p in layers)
    assert count_weights(config, StepOptions(method="lora"))[1] < trained


def test_what_fits_is_chosen_and_what_does_not_is_explained(config):
    eager = StepOptions(head="eager", reference="model", gradient_checkpointing=False)
    given = {"batch_size": 4, "max_length": 64, "options": eager, "table": False}
    needed = plan_training(config, memory=2**36, **given)
    assert needed.chosen is needed.asked and not needed.changes
    tight = plan_training(config, memory=2**20, **given)
    assert tight.chosen is None and not tight.asked.fits(tight.memory)
    assert tight.asked.pairs == 1 and needed.asked.pairs == 4
    saved = [tight.asked.bytes - estimate.bytes for _, estimate in tight.changes]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    texts = [text for text, _ in tight.changes]
    assert "fastpref's head instead of logits" in texts
    assert "--reference precompute instead of a second model" in texts


def test_an_adapter_under_bf16_trains_over_bf16_weights_as_fastpref_train_does(config):
    options = StepOptions(bf16=True)
    given = {"memory": 2**36, "batch_size": 1, "max_length": 16, "options": options}
    ways = plan_training(config, table=False, **given).ways
    assert ways["full"].options.dtype == torch.float32 and ways["full"].options.bf16
    assert ways["lora"].options.dtype == torch.bfloat16 and not ways["lora"].options.bf16
    weights = [way.components["weights"] for way in ways.values()]
    assert weights[1] < 0.6 * weights[0]


def test_the_head_s_strategy_is_the_one_that_the_step_takes(config):
    ways = plan_training(config, memory=2**36, max_length=64, table=False).ways
    assert ways["full"].head_strategy == "stash" and ways["lora"].head_strategy == "frozen"
    little = plan_training(config, memory=2**22, max_length=64, table=False).asked
    assert little.head_strategy in ("mixed", "recompute")
    eager = plan_training(
        config, memory=2**36, max_length=64, table=False, options=StepOptions(head="eager")
    )
    assert eager.asked.head_strategy is None


def test_seconds_grow_with_the_work(config):
    rates = Rates("one", 1e11, 1e11, 1e10, 1e10, 1e-5, measured=False)
    full = StepOptions()
    base = step_seconds(config, PAIRS, full, rates)
    assert step_seconds(config, PAIRS * 2, full, rates).head == pytest.approx(2 * base.head)
    for other in (replace(full, head="eager"), replace(full, reference="model")):
        assert step_seconds(config, PAIRS, other, rates).total > base.total
    for other in (replace(full, head_strategy="recompute"), replace(full, memory_budget=10**5)):
        assert step_seconds(config, PAIRS, other, rates).head > base.head
    kept = replace(full, gradient_checkpointing=False)
    assert step_seconds(config, PAIRS, kept, rates).body_backward < base.body_backward


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["plan", "--no-probe", *map(str, arguments)])


def test_the_command_writes_tables_json_and_a_report(model, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "DEVICES", [d for d in DEVICES if d.name == "H100 80GB"])
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(12)))
    given = ["--model", model, "--max-length", 64, "--batch-size", 1]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 100_000.0, 0.0), raising=False)
    result = invoke(*given, "--data", data, "--memory", "64GB", "--report", tmp_path / "p.html")
    assert result.exit_code == 0, result.output
    if not torch.cuda.is_available():
        assert "seconds follow from rates of this CPU" in result.stdout
        assert "this machine is busy (a load of 100000.0 on" in result.stdout
    assert "take: all weights, 1 pair a micro-batch" in result.stdout
    assert "H100 80GB" in result.stdout
    page = (tmp_path / "p.html").read_text()
    assert "Common devices" in page and page.count("data:image/png;base64,") == 1
    assert "config.json lacks" not in result.stdout
    plot = tmp_path / "new" / "plan.svg"
    result = invoke(*given, "--memory", "1MB", "--json", "--why-oom", "--no-table", "--plot", plot)
    assert plot.read_text().startswith("<?xml")
    assert result.exit_code == 6
    out = json.loads(result.stdout)
    assert out["chosen"] is None and out["changes"] and not out["asked"]["fits"]
    assert len(DEVICES) >= 12


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "tpu"], "device: got 'tpu', expected one of 'RTX 3090 24GB'"),
        (["--device", "h100", "--where", "cpu"], "--where cpu contradicts --device h100, a gpu"),
        (["--gpus", 2, "--where", "cpu"], "--gpus is 2, but a CPU is planned for"),
        (["--memory", "much"], "memory: got 'much', expected a size"),
        (["--reference", "adapter"], "--reference is 'adapter'"),
        (["--model", "./nowhere"], "--model ./nowhere is not a directory"),
        (["--method", "qlora", "--where", "cpu"], "--method qlora needs a GPU's kernels"),
        (["--gpus", 3, "--batch-size", 8], "--batch-size is 8, which --gpus 3 cannot share"),
        (["--memory", "24"], "memory: got '24', expected a size from 1 MB to 4 EiB, with its unit"),
        (["--memory", "1GB", "--max-length", 2**31 - 1], "a plan is made for at most 4,194,304"),
        (["--max-length", 10**20], f"--max-length is {10**20}; expected at most 2147483647"),
        (["--plot", "memory"], "--plot memory: expected a name that ends in .png"),
    ],
)
def test_bad_options_are_one_sentence(model, options, message):
    result = invoke("--model", model, *options)
    assert result.exit_code == 2 and message in result.stderr


def test_a_config_alone_is_enough(config, tmp_path):
    config.save_pretrained(tmp_path)
    given = ["--model", tmp_path, "--max-length", 64, "--memory", "64GB", "--no-table", "--json"]
    result = invoke(*given, "--gpus", 10**6)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["asked"]["devices"] == 10**6
    result = invoke(*given, "--data", "pairs.jsonl")
    assert result.exit_code == 2 and "it has no files of one" in result.stderr


def test_sizes_that_a_config_lacks_are_said(config, tmp_path):
    given = {**config.to_dict(), "model_type": "llama"}
    del given["hidden_size"], given["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps({**given, "hidden_size": 64}))
    arguments = ["--model", tmp_path, "--max-length", 64, "--memory", "64GB", "--no-table"]
    result = invoke(*arguments)
    assert "config.json lacks sizes, for which its class has defaults: vocab_size 32,000" in (
        " ".join(result.stdout.split())
    )


def test_sizes_under_other_names_and_of_a_part_are_given(tmp_path):
    from transformers import Gemma3Config, GPT2Config

    from fastpref.cli.models import missing_sizes

    for config in (GPT2Config(n_embd=64, n_layer=2), Gemma3Config()):
        config.save_pretrained(tmp_path)
        assert missing_sizes(str(tmp_path), config) == {}
    given = json.loads((tmp_path / "config.json").read_text())
    del given["text_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = Gemma3Config.from_pretrained(tmp_path)
    size = config.get_text_config().vocab_size
    assert missing_sizes(str(tmp_path), config) == {"vocab_size": size}


@pytest.mark.parametrize("size", [None, "32", 33])
def test_a_config_that_cannot_be_is_one_sentence(config, size, tmp_path):
    given = {**config.to_dict(), "model_type": "llama", "hidden_size": size}
    (tmp_path / "config.json").write_text(json.dumps(given))
    result = invoke("--model", tmp_path, "--memory", "64GB", "--no-table")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "no config could be loaded" in result.stderr and "hidden" in result.stderr


def test_configs_of_no_causal_model_are_one_sentence():
    from transformers import T5Config, ViTConfig

    for other, message in (
        (T5Config(), "'t5' has an encoder"),
        (ViTConfig(), "'vit' has no vocab"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_training(other, memory=2**33)
    with pytest.raises(ValueError, match="method: got 'some'"):
        plan_training(tiny.model().config, memory=2**33, method="some")


def test_of_experts_memory_counts_all_and_time_those_of_a_token():
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 200}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, **heads, **experts)
    total, _, products = count_weights(config, StepOptions())
    expert, attention, router = 3 * 32 * 64, 2 * 32 * 32 + 2 * 32 * 16, 8 * 32
    assert products == 2 * (2 * expert + attention + router)
    account = simulate_step(config, PAIRS, StepOptions())
    assert account.components["weights"] == pytest.approx(4 * total, rel=0.01)
    assert account.components["activations"] > 0
