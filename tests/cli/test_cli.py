"""The command line end to end, on the model and the pairs of the demo."""

import dataclasses
import inspect
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from fastpref import cli
from fastpref.cli import demo, report, train_run
from fastpref.cli.demo import ASSETS
from fastpref.cli.train_options import Reference

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The jobs are so small that waiting for each other would take the threads most of the time."""
    threads(1)


@pytest.fixture(autouse=True)
def undo_global_settings():
    """The commands set up the libraries for a process of their own."""
    import datasets
    import transformers

    level = logging.getLogger("transformers").level
    yield
    logging.getLogger("transformers").setLevel(level)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exit_code != code and result.exception is not None:
        raise AssertionError(result.output) from result.exception
    assert result.exit_code == code, result.output
    return result


def train(output, *arguments, data=ASSETS / "train.jsonl", model=ASSETS, code=0):
    return invoke(
        "train", "--model", model, "--data", data, "--output", output, "--fp32",
        "--batch-size", 4, "--no-gradient-checkpointing", *arguments, code=code,
    )  # fmt: skip


ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def complaint(result):
    """The one line on stderr."""
    assert result.stderr.startswith("fastpref: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def pairs():
    return demo.read_pairs("train.jsonl")[:12]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_assets_are_small_and_pairs_are_disjoint():
    assert sum(f.stat().st_size for f in ASSETS.iterdir()) < 3_000_000
    train_requests, heldout_requests = (
        {demo.request(row) for row in demo.read_pairs(name)}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(train_requests) == 320 and len(heldout_requests) == 96
    assert not train_requests & heldout_requests


def test_train_dpo(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(
        tmp_path, "--max-steps", 6, "--lr", 1e-3, "--save-steps", 0, "--batch-size", 16,
        "--eval-data", ASSETS / "heldout.jsonl", "--eval-steps", 3,
    )  # fmt: skip
    assert "reference: precompute" in result.stdout and "Summary" in result.stdout
    log = json.loads((tmp_path / "training_log.json").read_text("utf-8"))
    summary = log["summary"]
    assert summary["steps"] == 6
    assert summary["eval_rewards/accuracies"] > 0.8 and summary["eval_rewards/margins"] > 0
    assert summary["logits_bytes"] == summary["batch_positions"] * 2944 * 4
    assert 0 < summary["batch_labelled_tokens"] < summary["batch_positions"]
    assert summary["tokens_per_second"] > 0
    losses = report.series(log["history"], "loss")
    assert losses[0] == [1, 2, 3, 4, 5, 6]
    assert losses[1][0] == pytest.approx(math.log(2), abs=1e-4)
    assert report.series(log["history"], "eval_loss")[0][:2] == [3, 6]
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("checkpoint-*"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    start = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is not None


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, " of all rows, of which 3 steps train 24 (--reference model computes those alone,"),
        ({"max_steps": 1}, " of all rows, of which 1 step trains 8 (--reference"),
        ({"max_steps": -1}, ""),
        ({"max_steps": 40}, ""),
        ({"reference_store": "store"}, ""),
        ({"reference": Reference.model}, ""),
        ({"lora": True}, " of all rows, of which 3 steps train 24 (--reference adapter computes"),
        ({"columns": ["ref_chosen_logps", "ref_rejected_logps"]}, ""),  # held-out data lacks them
    ],
)
def test_few_steps_of_much_data(changes, expected, monkeypatch):
    """The reference's log-probs of all rows take longer than such a training."""
    import datasets

    monkeypatch.setenv("WORLD_SIZE", "2")
    values = dict(batch_size=4, grad_accumulation=1, max_steps=3, reference_store=None)
    options = SimpleNamespace(**{**values, **changes})
    columns = {name: [0.0] * 1000 for name in ["row", *changes.get("columns", [])]}
    plan = SimpleNamespace(
        reference=changes.get("reference", Reference.precompute),
        lora=changes.get("lora", False),
        train_set=datasets.Dataset.from_dict(columns),
    )
    found = train_run._untrained_rows(options, plan)
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_train_ipo_lora_and_resume(tmp_path):
    options = ("--loss", "ipo", "--lora", "--lora-r", 4, "--lr", 1e-3, "--save-steps", 2,
               "--max-steps", 4, "--eval-split", 0.1, "--cpu-linear", "native")  # fmt: skip
    result = train(tmp_path / "run", *options)
    assert "IPO" in result.stdout and "LoRA" in result.stdout
    assert "reference: adapter" in result.stdout and "288 pairs, 32 held out" in result.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    whole = json.loads((tmp_path / "run" / "training_log.json").read_text("utf-8"))
    assert whole["summary"]["loss"] < 25  # (1 / (2 beta))^2, where it starts

    half = tmp_path / "run" / "checkpoint-2"
    train(tmp_path / "resumed", *options, "--resume", half)
    resumed = json.loads((tmp_path / "resumed" / "training_log.json").read_text("utf-8"))
    for key in ("loss", "eval_loss", "rewards/margins"):
        assert resumed["summary"][key] == pytest.approx(whole["summary"][key], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft, here
def test_train_on_from_an_adapter(tmp_path, pairs):
    from peft import AutoPeftModelForCausalLM

    data = write(tmp_path / "pairs.jsonl", pairs)
    options = ("--max-steps", 3, "--lr", 1e-2)
    train(tmp_path / "first", *options, "--lora", "--lora-r", 4, data=data)
    adapter = tmp_path / "first"
    result = train(tmp_path / "second", *options, data=data, model=adapter)
    said = " ".join(result.stdout.split())
    assert "LoRA" in said and "reference: adapter as it is now" in said
    history = json.loads((tmp_path / "second" / "training_log.json").read_text())["history"]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[0]["rewards/margins"] == 0 and history[1]["rewards/margins"] != 0
    ids, close = torch.arange(5, 15)[None], {"rtol": 1e-3, "atol": 1e-3}
    tuned = [
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("first", "second")
    ]
    with torch.no_grad():
        first, second = (model(input_ids=ids).logits for model in tuned)
        torch.testing.assert_close(
            tuned[1].merge_and_unload()(input_ids=ids).logits, second, **close
        )
    assert (first - second).abs().max() > 1e-3
    kept = train(tmp_path / "c", *options, "--lora-r", 8, data=data, model=adapter, code=2)
    assert "--lora-r would do nothing: --model" in complaint(kept)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()  # the base's is taken
    train(tmp_path / "d", "--max-steps", 1, "--lora", data=data, model=adapter)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(ASSETS), str(tmp_path / "moved")))
    lost = train(tmp_path / "e", *options, data=data, model=adapter, code=2)
    assert "moved is not a directory" in complaint(lost)


def test_train_with_reference_columns(tmp_path, pairs):
    rows = [{**row, "ref_chosen_logps": -30.0, "ref_rejected_logps": -30.0} for row in pairs]
    data = write(tmp_path / "pairs.jsonl", rows)
    assert "reference: columns" in train(tmp_path / "a", "--max-steps", 1, data=data).stdout
    mixed = train(tmp_path / "m", "--max-steps", 1, "--eval-data", write(
        tmp_path / "eval.jsonl", pairs), data=data)  # fmt: skip
    assert "columns (training), precompute (held out)" in " ".join(mixed.stdout.split())
    result = train(tmp_path / "b", "--reference", "precompute", data=data, code=2)
    assert "--reference columns" in complaint(result)
    result = train(tmp_path / "c", "--reference", "columns", code=2)
    assert "lacks ref_chosen_logps and ref_rejected_logps" in complaint(result)


def test_second_model_gives_the_same_loss_as_precomputing(tmp_path, pairs):
    data = write(tmp_path / "pairs.jsonl", pairs)
    losses = {}
    for mode in ("model", "precompute"):
        train(tmp_path / mode, "--max-steps", 3, "--lr", 1e-3, "--reference", mode, data=data)
        log = json.loads((tmp_path / mode / "training_log.json").read_text("utf-8"))
        losses[mode] = report.series(log["history"], "loss")[1]
    assert losses["model"] == pytest.approx(losses["precompute"], rel=1e-4)


def test_rows_that_cannot_be_used_are_counted(tmp_path, pairs):
    pairs[1]["rejected"] = pairs[1]["chosen"]
    data = write(tmp_path / "pairs.jsonl", pairs)
    result = train(tmp_path / "out", "--max-steps", 1, data=data)
    assert "1 of 12 rows were dropped because chosen and rejected are" in result.stdout


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("\n\n", "has no rows"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n', "line 2 is not JSON"),
        ('{"prompt": "a", "chosen": "b"}\n', "column 'rejected' is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "chosen and rejected are identical"),
    ],
)
def test_bad_data(tmp_path, text, expected):
    path = tmp_path / "pairs.jsonl"
    if text is not None:
        path.write_text(text)
    assert expected in complaint(train(tmp_path / "out", data=path, code=2))


def test_bad_model(tmp_path):
    missing = train(tmp_path / "out", model=tmp_path / "nothing", code=2)
    assert f"--model {tmp_path / 'nothing'} is not a directory" in complaint(missing)
    (tmp_path / "empty").mkdir()
    empty = train(tmp_path / "out", model=tmp_path / "empty", code=2)
    assert "without config.json" in complaint(empty)
    for file in ASSETS.iterdir():
        if file.suffix == ".json":
            (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"oops" * 9)
    corrupt = train(tmp_path / "out", model=tmp_path / "empty", code=2)
    assert "no model could be loaded" in complaint(corrupt)


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--reference", "adapter"), "add --lora"),
        (("--precision", "fast"), "add --bf16"),
        (("--eval-split", 0.1, "--eval-data", "x.jsonl"), "exclude each other"),
        (("--resume", "latest"), "there is no complete checkpoint"),
        (("--max-length", 4), "the prompt alone reaches max_length=4"),
        (("--beta", -1), "beta"),
        (("--max-steps", 0), "--max-steps is 0; expected at least 1, or -1"),
        (("--epochs", 0), "--epochs is 0; expected a finite number above 0"),
        (("--lora-r", 4, "--lora-targets", "q_proj"), "--lora-r and --lora-targets would do"),
        (("--eval-steps", 3), "--eval-steps needs held-out pairs"),
    ],
)
def test_bad_options(tmp_path, options, expected):
    assert expected in complaint(train(tmp_path / "out", *options, code=2))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_errors_name_the_file_and_its_row_after_splits_and_shuffles(tmp_path, pairs, loss):
    chat = [
        {**row, **{key: [{"role": role, "content": row[key]}] for key, role in ROLES.items()}}
        for row in pairs
    ]
    chat[7]["rejected"] = []
    data = write(tmp_path / "chat.jsonl", chat)
    result = train(tmp_path / "out", "--eval-split", 0.3, "--loss", loss, data=data, code=2)
    assert "chat.jsonl: " in complaint(result)
    assert "data: row 7: rejected is an empty" in complaint(result).replace(
        "completion", "rejected"
    )


def test_a_backend_that_cannot_run_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "abacus")
    result = train(tmp_path / "out", model=tmp_path / "nothing", code=2)
    assert "FASTPREF_BACKEND: got 'abacus'" in complaint(result)


def test_unexpected_errors_are_one_sentence(monkeypatch):
    @cli.guarded
    def command(**options):
        raise KeyError("what")

    result = CliRunner().invoke(_app(command), [])
    assert result.exit_code == 1
    assert complaint(result) == "fastpref: KeyError: 'what' (--debug shows the traceback)\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 30 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_no_fault_of_fastpref(error):
    @cli.guarded
    def command(**options):
        raise error

    result = CliRunner().invoke(_app(command), [])
    assert result.exit_code == 2 and "--debug" not in complaint(result)
    assert complaint(result).endswith("; fastpref plan --why-oom says what takes less memory\n")


def _app(command):
    import typer

    app = typer.Typer()
    app.command()(lambda: command(debug=False))
    return app


def test_debug_shows_the_error(tmp_path):
    result = CliRunner().invoke(
        cli.app, ["train", "--model", str(ASSETS), "--data", str(tmp_path / "no.jsonl"), "--debug"]
    )
    assert isinstance(result.exception, ValueError)


def test_loss_that_is_not_finite_stops_the_run(tmp_path, pairs):
    rows = [{**row, "ref_chosen_logps": -1e30, "ref_rejected_logps": -30.0} for row in pairs]
    data = write(tmp_path / "pairs.jsonl", rows)
    result = train(tmp_path / "out", "--loss", "ipo", data=data, code=3)
    assert "the loss is inf at step 1, micro-batch 1 of 1, data rows [" in complaint(result)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_in_a_log_file_says_how_far_it_is_and_why_it_is_fp32(tmp_path, pairs, monkeypatch):
    monkeypatch.setattr("fastpref.progress.INTERVAL", 0.0)
    monkeypatch.setattr("fastpref.cli.train_run.bf16_is_fast", lambda device: False)
    result = invoke(
        "train", "--model", ASSETS, "--data", write(tmp_path / "pairs.jsonl", pairs), "--output",
        tmp_path / "out", "--max-steps", 2, "--eval-split", 0.5, "--batch-size", 2,
    )  # fmt: skip
    text = " ".join(result.stdout.split())
    assert "fp32 (this CPU has no bf16 units)" in text or "fp32 (this GPU" in text
    for line in (
        "Tokenising train data: 1 of 6 rows (16%), ",
        "Reference log-probs of train data: 2 of 6 rows (33%), ",
        "Training: 1 of 2 steps (50%), ",
        "Evaluating: 1 of 3 batches (33%), ",
    ):
        assert line in text


def test_demo_quick(tmp_path):
    result = invoke("demo", "--quick", "--output", tmp_path)
    for text in ("after DPO", "after IPO", "reward accuracy", "eager / fastpref"):
        assert text in result.stdout
    facts = json.loads((tmp_path / "demo.json").read_text("utf-8"))
    assert set(facts["runs"]) == {"dpo", "ipo"} and len(facts["answers"]) == 8
    for run in facts["runs"].values():
        assert run["steps"] == 4
        assert run["after"]["eval_loss"] < run["before"]["eval_loss"]
    head = facts["head"]
    assert head["loss_difference"] < 1e-5 and head["largest_gradient_difference"] < 1e-6
    memory = head["extra_memory_bytes"]
    if memory["eager"] is not None:
        assert 0 < memory["fastpref"] < memory["eager"]
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_peak_memory_sees_what_was_allocated():
    with report.PeakMemory() as memory:
        torch.ones(50_000_000)
    if memory.extra is not None:
        assert 190e6 < memory.extra < 260e6


def test_json_has_no_nan(tmp_path):
    report.write_json(tmp_path / "x.json", {"a": math.nan, "b": [torch.tensor(1.5), math.inf]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, None]}


def test_options_have_the_defaults_of_the_command():
    """`fastpref precompute` sets some of them, and takes these for the rest."""
    from fastpref.cli import train as train_command
    from fastpref.cli.train_options import TrainOptions

    parameters = dict(inspect.signature(train_command.command).parameters)
    del parameters["debug"]
    defaults = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
    empty = {inspect.Parameter.empty: dataclasses.MISSING}
    assert defaults == {name: empty.get(p.default, p.default) for name, p in parameters.items()}
