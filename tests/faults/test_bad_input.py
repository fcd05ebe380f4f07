"""A hundred kinds of bad input: each is answered by one sentence that names its subject."""

from __future__ import annotations

import gzip
import re

import pytest
import reliability
import runs
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import fastpref  # noqa: E402
from fastpref import cli  # noqa: E402
from fastpref.data import load_preference_data, prepare_dataset  # noqa: E402

pytestmark = pytest.mark.train

# ---- options of the command: what is passed, and what the answer names ----

OPTIONS = {
    "no such loss": (("--loss", "dpoo"), "--loss|loss_type|dpoo"),
    "negative beta": (("--beta", -1), "beta"),
    "beta nan": (("--beta", "nan"), "beta"),
    "beta inf": (("--beta", "inf"), "beta"),
    "beta is text": (("--beta", "x"), "--beta"),
    "lr is text": (("--lr", "fast"), "--lr"),
    "lr nan": (("--lr", "nan"), "--lr|learning_rate"),
    "lr negative": (("--lr", -1e-3), "--lr|learning_rate"),
    "lr inf": (("--lr", "inf"), "--lr|learning_rate"),
    "no steps": (("--max-steps", 0), "--max-steps"),
    "steps below -1": (("--max-steps", -2), "--max-steps"),
    "no epochs": (("--epochs", 0), "--epochs"),
    "epochs inf": (("--epochs", "inf"), "--epochs"),
    "epochs nan": (("--epochs", "nan"), "--epochs"),
    "batch of nothing": (("--batch-size", 0), "--batch-size"),
    "no accumulation": (("--grad-accumulation", 0), "--grad-accumulation"),
    "length of one": (("--max-length", 1), "--max-length"),
    "unknown precision": (("--precision", "exactly"), "--precision"),
    "fast without bf16": (("--precision", "fast"), "--precision fast"),
    "unknown reference": (("--reference", "base"), "--reference"),
    "adapter without one": (("--reference", "adapter"), "--reference adapter"),
    "columns that are not there": (("--reference", "columns"), "--reference columns"),
    "reference of a loss without": (("--loss", "simpo", "--reference", "model"), "--reference"),
    "rank without an adapter": (("--lora-r", 4), "--lora-r"),
    "rank of nothing": (("--lora", "--lora-r", 0), "--lora-r"),
    "modules that are not there": (("--lora", "--lora-targets", "nope"), "nope|lora-targets"),
    "option without a value": (("--loss-option", "label_smoothing"), "loss-option|label_smoothing"),
    "unknown loss option": (("--loss-option", "smooth=1"), "smooth"),
    "loss option of another loss": (("--loss", "hinge", "--loss-option", "alpha=1"), "alpha"),
    "loss option that is text": (("--loss-option", "label_smoothing=x"), "label_smoothing"),
    "evaluation of nothing": (("--eval-steps", 3), "--eval-steps"),
    "two held-out sets": (("--eval-split", 0.1, "--eval-data", "x.jsonl"), "--eval-data"),
    "held-out data that is not there": (("--eval-data", "no.jsonl"), "no.jsonl"),
    "a split of all": (("--eval-split", 1), "--eval-split"),
    "resume from nothing": (("--resume", "latest"), "--resume latest"),
    "resume from a place": (("--resume", "no/checkpoint-4"), "no/checkpoint-4"),
    "resume anyway": (("--resume-anyway",), "--resume-anyway"),
    "resume and overwrite": (("--resume", "latest", "--overwrite"), "--resume"),
    "seed is text": (("--seed", "x"), "--seed"),
    "negative seed": (("--seed", -1), "seed"),
    "huge seed": (("--seed", 2**70), "seed"),
    "negative save steps": (("--save-steps", -1), "--save-steps"),
    "no logging steps": (("--logging-steps", 0), "--logging-steps"),
    "unknown option": (("--betta", 1), "--betta"),
    "a directory that is a file": (("--output", __file__), "test_bad_input.py"),
    "no model": (("--model", "no/such/dir"), "no/such/dir"),
    "a model without files": (("--model", "."), "--model|config.json"),
    "no data": (("--data", "no.jsonl"), "no.jsonl"),
    "data without an ending": (("--data", __file__), "test_bad_input.py"),
}

# ---- data files: contents, and what the answer names besides the file ----

LINE = b'{"prompt": "a ", "chosen": "b c", "rejected": "d"}\n'
HEADER = b"prompt,chosen,rejected\n"
FILES = {
    "empty.jsonl": (b"", "empty"),
    "blank.jsonl": (b"\n\n", "no rows"),
    "utf8.jsonl": (LINE + b'{"prompt": "\xff"}\n', "line 2"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "line 1"),
    "text.jsonl": (b"hello\n", "line 1"),
    "cut.jsonl": (LINE + LINE[:20], "line 2"),
    "deep.jsonl": (b"[" * 100_000, "line 1"),
    "number.jsonl": (LINE + b"3\n", "line 2"),
    "digits.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1"),
    "kinds.jsonl": (LINE + LINE.replace(b'"b c"', b"[]"), "row 1"),
    "column.jsonl": (LINE.replace(b"rejected", b"other"), "rejected"),
    "surrogate.jsonl": (LINE.replace(b'"b c"', rb'"\ud800"'), "row 0"),
    "name.jsonl": (LINE.replace(b'"d"', rb'"d", "a\u0000b": 1'), "column name"),
    "weight.jsonl": (LINE.replace(b'"d"', b'"d", "weight": -1'), "row 0: weight"),
    "margin.jsonl": (LINE.replace(b'"d"', b'"d", "margin": "x"'), "margin"),
    "soft.jsonl": (LINE.replace(b'"d"', b'"d", "soft_label": 2'), "row 0: soft_label"),
    "nan.jsonl": (LINE.replace(b'"d"', b'"d", "margin": NaN'), "row 0: margin"),
    "identical.jsonl": (LINE.replace(b'"d"', b'"b c"'), "identical"),
    "one-reference.jsonl": (
        LINE.replace(b'"d"', b'"d", "ref_chosen_logps": -1'),
        "ref_chosen_logps",
    ),
    "array.json": (b"[1, 2]", "row 0"),
    "cut.json": (b"[" + LINE + b",", "line"),
    "object.json": (b"3", "line 1"),
    "header.csv": (HEADER, "no rows"),
    "twice.csv": (b"prompt,prompt\na,b\n", "prompt"),
    "fields.csv": (HEADER + b"a,b\n", "line 2"),
    "quote.csv": (HEADER + b'a,"b,c\n', "line 2"),
    "null.csv": (HEADER + b"a,b,c\n\xff\n", "line 3"),
    "magic.parquet": (b"PAR1" + b"\0" * 50, "not a Parquet file"),
    "text.parquet": (b"hello", "not a Parquet file"),
    "plain.jsonl.gz": (LINE, "gzip"),
    "cut.jsonl.gz": (gzip.compress(LINE * 2000)[:100], "gzip"),
}

# ---- tensors: a call, and the argument that the answer names ----

H, W, Y = torch.randn(4, 8), torch.randn(11, 8), torch.randint(11, (4,))
LOGPS = torch.tensor([-1.0, -2.0])


def head(**changes):
    return fastpref.linear_token_logps(**{"hidden": H, "weight": W, "labels": Y, **changes})


def pair(**changes):
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return fastpref.preference_loss(**{**dict.fromkeys(names, LOGPS), **changes})


def fused(**changes):
    values = {"hidden": H.view(2, 2, 8), "weight": W, "labels": Y.view(2, 2), "ref_logps": LOGPS}
    return fastpref.linear_preference_loss(**{**values, **changes})


TENSORS = {
    "hidden is a list": (lambda: head(hidden=[1.0]), "hidden"),
    "hidden of integers": (lambda: head(hidden=Y.view(4, 1).expand(4, 8)), "hidden"),
    "weight of another width": (lambda: head(weight=torch.randn(11, 7)), "weight"),
    "weight of another dtype": (lambda: head(weight=W.double()), "weight"),
    "weight of no entries": (lambda: head(weight=W[:0]), "weight|labels"),
    "weight of three dimensions": (lambda: head(weight=W[None]), "weight"),
    "bias of another size": (lambda: head(bias=torch.randn(3)), "bias"),
    "labels of another shape": (lambda: head(labels=Y[:2]), "labels"),
    "labels of another dtype": (lambda: head(labels=Y.float()), "labels"),
    "a label beyond the vocabulary": (lambda: head(labels=Y + 11), "labels"),
    "a negative label": (lambda: head(labels=Y.clone().fill_(-1)), "labels"),
    "scale nan": (lambda: head(scale=float("nan")), "scale"),
    "softcap of 0": (lambda: head(softcap=0.0), "softcap"),
    "temperature of 0": (lambda: head(temperature=0.0), "temperature"),
    "unknown strategy": (lambda: head(strategy="fastest"), "strategy"),
    "negative budget": (lambda: head(memory_budget=-1), "memory_budget"),
    "unknown precision": (lambda: head(precision="half"), "precision"),
    "unknown backend": (lambda: head(backend="abacus"), "backend"),
    "unknown extra": (lambda: head(extras=["entropie"]), "extras|entropie"),
    "adapter of another rank": (
        lambda: head(lora_hidden=torch.randn(4, 2), lora_B=torch.randn(11, 3)), "lora_B|lora_hidden"
    ),
    "half an adapter": (lambda: head(lora_hidden=torch.randn(4, 2)), "lora_B|lora_hidden"),
    "logits of no entries": (lambda: fastpref.token_logps(torch.randn(4, 0), Y), "logits"),
    "log-probs of two dimensions": (lambda: pair(chosen_logps=LOGPS[None]), "chosen_logps"),
    "one log-prob too many": (lambda: pair(rejected_logps=torch.zeros(3)), "rejected_logps"),
    "no reference": (lambda: pair(ref_chosen_logps=None), "ref_chosen_logps|ref"),
    "unknown loss": (lambda: pair(loss_type="dpoo"), "loss_type|dpoo"),
    "negative beta": (lambda: pair(beta=-0.1), "beta"),
    "smoothing of one half": (lambda: pair(label_smoothing=0.5), "label_smoothing"),
    "option of another loss": (lambda: pair(loss_type="hinge", alpha=1.0), "alpha"),
    "weights of another size": (lambda: pair(weight=torch.ones(3)), "weight"),
    "three sequences": (
        lambda: fused(hidden=torch.randn(3, 2, 8), labels=Y.new_zeros(3, 2)), "odd|even|hidden"
    ),
    "references of another size": (lambda: fused(ref_logps=torch.zeros(4)), "ref_logps"),
    "two references": (lambda: fused(ref_hidden=H.view(2, 2, 8)), "ref_hidden"),
}  # fmt: skip

# ---- options of a trainer ----

CONFIGS = {
    "unknown loss": ({"loss_type": "dpoo"}, "loss_type"),
    "negative beta": ({"beta": -1.0}, "beta"),
    "short sequences": ({"max_length": 1}, "max_length"),
    "unknown truncation": ({"truncation_mode": "middle"}, "truncation_mode"),
    "unknown precision": ({"precision": "half"}, "precision"),
    "references of a loss without": (
        {"loss_type": "simpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs"
    ),
}  # fmt: skip

COUNT = sum(map(len, (OPTIONS, FILES, TENSORS, CONFIGS)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return runs.write_pairs(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tmp_path, pairs, name):
    options, subject = OPTIONS[name]
    words = [
        "train", "--model", runs.ASSETS, "--data", pairs, "--output", tmp_path / "out", "--fp32",
        "--batch-size", 2, *options,
    ]  # fmt: skip
    environment = {"TERMINAL_WIDTH": "400", "NO_COLOR": "1"}
    result = CliRunner().invoke(cli.app, [str(word) for word in words], env=environment)
    said = result.stderr
    assert result.exit_code == (4 if "that is a file" in name else 2), result.output
    assert "Traceback" not in result.output
    assert re.search(subject, said), said
    if not said.startswith("Usage: "):  # the command line's own parser shows the usage first
        assert said.startswith("fastpref: ") and said.count("\n") == 1, said
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    contents, subject = FILES[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=subject) as error:
        prepare_dataset(load_preference_data(str(tmp_path / name)), tiny.tokenizer())
    text = str(error.value)
    assert name in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name):
    call, subject = TENSORS[name]
    with pytest.raises((ValueError, TypeError), match=subject) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(tmp_path, name):
    options, subject = CONFIGS[name]
    with pytest.raises(ValueError, match=subject) as error:
        tiny.trainer(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_there_are_a_hundred():
    assert COUNT >= 100
    reliability.record("bad input", kinds=COUNT)
