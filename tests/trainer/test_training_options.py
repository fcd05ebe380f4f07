"""Options of transformers' TrainingArguments: those that work, and those that are refused."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from test_streams import MAKE, ROWS, seen_rows, stream  # noqa: E402
from tiny import history, trainer  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from fastpref.data.loaders import (
    LengthSampler,  # noqa: E402
    row_lengths,  # noqa: E402
)


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


REFUSED = {
    "label_smoothing_factor": (0.1, "^label_smoothing_factor: got 0.1"),
    "include_for_metrics": (["inputs"], "^include_for_metrics: got .'inputs'., which would be ig"),
    "batch_eval_metrics": (True, "^batch_eval_metrics: got True"),
    "eval_do_concat_batches": (False, "^eval_do_concat_batches: got False"),
    "eval_use_gather_object": (True, "^eval_use_gather_object: got True"),
    "label_names": (["labels"], "^label_names: got"),
    "length_column_name": ("size", "^length_column_name: got 'size'"),
    "train_sampling_strategy": ("batch_rebalance", "^train_sampling_strategy: got 'batch_rebal"),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(tmp_path, kind, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        MAKE[kind](tmp_path, **{name: value})


def test_label_smoothing_has_another_name_here(tmp_path):
    with pytest.raises(ValueError, match="expected 0: set label_smoothing$"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="single answers have no smoothing"):
        MAKE["answers"](tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("kind", MAKE)
def test_rows_of_like_lengths_go_together(tmp_path, kind):
    loss = {} if kind == "pairs" else {"loss_type": "apo_zero_unpaired"}

    def start(out):
        return MAKE[kind](
            tmp_path / out, train=ROWS[kind](160), train_sampling_strategy="group_by_length",
            max_steps=43, per_device_train_batch_size=4, save_strategy="steps", save_steps=41,
            eval_dataset=ROWS[kind](5, seed=3), **loss,
        )  # fmt: skip

    t = start("whole")
    lengths = dict(zip(t.train_dataset["row"], row_lengths(t.train_dataset), strict=True))
    whole = seen_rows(t)
    first, second = ([rows for _, rows, _ in part] for part in (whole[:40], whole[40:]))
    assert sorted(row for rows in first for row in rows) == list(range(160))
    assert first[:3] != second

    def spread(batches):
        return sum(max(map(lengths.get, rows)) - min(map(lengths.get, rows)) for rows in batches)

    in_order = [list(range(i, i + 4)) for i in range(0, 160, 4)]
    assert spread(first) < 0.5 * spread(in_order)
    assert max(lengths, key=lengths.get) in first[0]  # the memory peak comes at once
    assert t.evaluate()["eval_loss"] > 0
    resumed = seen_rows(start("resumed"), str(tmp_path / "whole" / "out" / "checkpoint-41"))
    assert resumed == whole[41:]


def test_grouping_as_transformers_before_5_2_has_it(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    monkeypatch.delattr(TrainingArguments, "train_sampling_strategy", raising=False)
    monkeypatch.delattr(t.args, "train_sampling_strategy", raising=False)
    t.args.group_by_length = True
    assert isinstance(t._get_train_sampler(), LengthSampler)


def test_where_rows_cannot_be_grouped_by_length(tmp_path):
    option = {"train_sampling_strategy": "group_by_length"}
    with pytest.raises(ValueError, match="'group_by_length' with loss_type 'kto', whose KL term"):
        MAKE["answers"](tmp_path, **option)
    with pytest.raises(ValueError, match="'group_by_length' with a stream"):
        trainer(tmp_path, train=stream("pairs", 8), **option)


def trained(path, kind, **options):
    t = MAKE[kind](
        path, max_steps=2, eval_dataset=ROWS[kind](5, seed=3), eval_strategy="steps",
        eval_steps=2, **options,
    )  # fmt: skip
    t.train()
    return history(t), [h["eval_loss"] for h in history(t, "eval_loss")]


@pytest.fixture(scope="module")
def without_options(tmp_path_factory):
    return {kind: trained(tmp_path_factory.mktemp(kind), kind) for kind in MAKE}


@pytest.mark.parametrize(
    "options",
    [
        {"remove_unused_columns": False},
        {"prediction_loss_only": True, "eval_accumulation_steps": 1},
        {"average_tokens_across_devices": False},
        {"include_num_input_tokens_seen": "non_padding"},
        {"torch_empty_cache_steps": 1},
        {"eval_on_start": True},
        {"logging_nan_inf_filter": True},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("kind", MAKE)
def test_options_that_change_no_figure(tmp_path, without_options, kind, options):
    if not hasattr(tiny.config(tmp_path), next(iter(options))):
        pytest.skip("not an option of this transformers")
    first, first_loss = without_options[kind]
    second, second_loss = trained(tmp_path, kind, **options)
    tiny.same(first, second, ("loss", "grad_norm"))
    assert first_loss[-1] == pytest.approx(second_loss[-1], rel=1e-6)


@pytest.mark.parametrize("kind", MAKE)
def test_a_compiled_model(tmp_path, kind):
    """Of one layer: the compiler takes seconds for each. Batches of pairs have several lengths, for
    which it compiles again; those of answers have one."""
    lengths = {} if kind == "pairs" else {"pad_to_multiple_of": 64}
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        t = MAKE[kind](
            tmp_path, tiny.model(num_hidden_layers=1), max_steps=2, torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
            eval_dataset=ROWS[kind](5, seed=3), **lengths,
        )  # fmt: skip
        t.train()
        runs.append((history(t), t.evaluate()))
    tiny.same(runs[0][0], runs[1][0], ("loss", "grad_norm"))
    assert runs[0][1]["eval_loss"] == pytest.approx(runs[1][1]["eval_loss"], rel=1e-5)
