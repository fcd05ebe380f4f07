"""Streams, dispatched batches and resuming: the rows of every step are those of a run that was not
interrupted."""

from functools import partial

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from datasets import Dataset  # noqa: E402
from test_evaluation import UNSTABLE, assert_alike, moved  # noqa: E402
from test_unpaired_trainer import rows as answers  # noqa: E402
from test_unpaired_trainer import trainer as unpaired_trainer  # noqa: E402
from tiny import trainer  # noqa: E402
from transformers import Trainer  # noqa: E402

# Streams have a row for each answer, and so has what they are compared with.
MAKE = {"pairs": partial(trainer, prefix_sharing=False), "answers": unpaired_trainer}
ROWS = {"pairs": tiny.rows, "answers": answers}


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def stream(kind, n, shuffle=False, **kwargs):
    data = Dataset.from_list(ROWS[kind](n, **kwargs)).to_iterable_dataset()
    return data.shuffle(seed=3, buffer_size=5) if shuffle else data


def seen_rows(t, resume=None):
    """The rows of each micro-step of a run, with the steps that came before."""
    seen, step = [], t.training_step

    def training_step(model, inputs, *args, **kwargs):
        # Numbers of rows count what a shuffled stream yields, so the tokens say which they are.
        seen.append((t.state.global_step, inputs["rows"].tolist(), inputs["input_ids"].tolist()))
        return step(model, inputs, *args, **kwargs)

    t.training_step = training_step
    t.train(resume_from_checkpoint=resume)
    return seen


def crossed(first, second, third):
    """Cases in which each two values of different parameters meet, the third's in turn."""
    return [
        (one, two, third[(i + j) % len(third)])
        for i, one in enumerate(first)
        for j, two in enumerate(second)
    ]


DATA = ("stream", "shuffled", "dispatched", "map", "map dispatched")


@pytest.mark.parametrize("data, kind, accumulation", crossed(DATA, MAKE, (1, 2)))
def test_resumed_rows_are_those_of_the_uninterrupted_run(tmp_path, kind, accumulation, data):
    """Resumed in the first, second and third pass over the data, in the middle and at the end."""

    def start(out, **saves):
        train = ROWS[kind](5) if "map" in data else stream(kind, 5, data == "shuffled")
        return MAKE[kind](
            tmp_path / out, train=train, max_steps=8, **saves,
            per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
            accelerator_config={"dispatch_batches": True} if "dispatched" in data else None,
            logging_steps=8,
        )  # fmt: skip

    whole = seen_rows(start("whole", save_strategy="steps", save_steps=1))
    passes = [whole[i : i + 3] for i in (0, 3, 6)]
    for one in passes[: 2 if accumulation == 1 else 3]:
        assert sorted(row for _, rows, _ in one for row in rows) == list(range(5))
    first, second = ([tokens for *_, tokens in one] for one in passes[:2])
    in_order = data in ("stream", "dispatched") or (kind == "answers" and "map" in data)
    assert (first == second) == in_order
    for saved in (2, 3, 5) if accumulation == 1 else (1, 3, 4):
        checkpoint = str(tmp_path / "whole" / "out" / f"checkpoint-{saved}")
        resumed = seen_rows(start(f"resumed from {saved}"), checkpoint)
        assert resumed == [seen for seen in whole if seen[0] >= saved], saved


def test_a_stream_that_one_pass_of_a_shorter_run_went_through(tmp_path):
    """A run of as many steps as its stream has batches, gone on with from its end."""

    def start(out, steps):
        return trainer(
            tmp_path / out, train=stream("pairs", 8), max_steps=steps, save_strategy="steps",
            save_steps=3, per_device_train_batch_size=2,
        )  # fmt: skip

    whole = seen_rows(start("whole", 7))
    seen_rows(start("short", 3))
    resumed = seen_rows(start("short", 7), str(tmp_path / "short" / "out" / "checkpoint-3"))
    assert resumed == whole[3:]


def test_a_later_pass_is_not_resumed_where_transformers_cannot(tmp_path, monkeypatch):
    def start(steps):
        return trainer(
            tmp_path, train=stream("pairs", 8), max_steps=steps, save_strategy="steps",
            save_steps=3, per_device_train_batch_size=2,
        )  # fmt: skip

    start(6).train()
    monkeypatch.delattr(Trainer, "_init_training_state", raising=False)
    with pytest.raises(ValueError, match="after 1 whole passes over a stream, which transformers"):
        start(7).train(resume_from_checkpoint=True)


# ---- evaluation ----


def evaluated(tmp_path, kind, data, config=None, **options):
    t = MAKE[kind](
        tmp_path, moved(), ref_model=tiny.model(), eval_dataset=data, accelerator_config=config,
        **{"per_device_eval_batch_size": 3, **options},
    )  # fmt: skip
    metrics = t.evaluate()
    return {k: v for k, v in metrics.items() if not any(word in k for word in UNSTABLE)}


@pytest.mark.parametrize("dispatch, kind, split", crossed((None, False, True), MAKE, (False, True)))
def test_a_stream_evaluates_as_data_in_memory(tmp_path, kind, dispatch, split):
    """Whoever reads it: accelerate's dispatcher would cut pairs and token positions apart."""
    config = {"dispatch_batches": dispatch, "split_batches": split}
    plain = evaluated(tmp_path, kind, ROWS[kind](7, seed=9), per_device_eval_batch_size=7)
    for data in (ROWS[kind](7, seed=9), stream(kind, 7, seed=9)):
        assert_alike([plain, evaluated(tmp_path, kind, data, config)])


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("train", ["map", "stream"])
def test_dispatched_training_is_the_same(tmp_path, kind, train):
    runs = []
    for config in ({"dispatch_batches": True}, {"dispatch_batches": None}):
        data = ROWS[kind](9) if train == "map" else stream(kind, 9)
        t = MAKE[kind](
            tmp_path, train=data, max_steps=6, per_device_train_batch_size=2,
            accelerator_config=config, eval_dataset=stream(kind, 5, seed=3), eval_strategy="steps",
            eval_steps=3,
        )  # fmt: skip
        assert t.args.accelerator_config.dispatch_batches is bool(config["dispatch_batches"])
        t.train()
        runs.append(t.state.log_history)
    for ours, theirs in zip(*runs, strict=True):
        assert_alike([{k: v for k, v in h.items() if "time" not in k and "per_second" not in k}
                      for h in (ours, theirs)])  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
def test_a_reference_computed_ahead_where_batches_are_dispatched(tmp_path, kind):
    columns = []
    for config in (None, {"dispatch_batches": True}):
        t = MAKE[kind](tmp_path, precompute_ref_log_probs=True, accelerator_config=config)
        columns.append([[row[c] for c in t.reference_columns()] for row in t.train_dataset])
    assert columns[0] == columns[1]


def test_stacked_batches_fall_apart_between_processes():
    from fastpref.data.collate import PreferenceCollator, UnpairedCollator
    from fastpref.data.loaders import StackedCollator, own_part

    pairs = [
        {"prompt_ids": [5] * n, "chosen_ids": [6], "rejected_ids": [7, 8], "row": n}
        for n in (1, 4, 2, 3, 1)
    ]
    alone = [{"prompt_ids": [5] * n, "completion_ids": [6], "label": n > 1} for n in (1, 4, 2)]
    for collator, rows in ((PreferenceCollator(0), pairs), (UnpairedCollator(0), alone)):
        for processes in (1, 2, 3):
            stack = StackedCollator(collator, processes)(rows)
            assert {len(t) for t in stack.values()} == {processes}
            size = -(-len(rows) // processes)
            for process in range(processes):
                part = own_part({k: t[process : process + 1] for k, t in stack.items()})
                mine = [rows[i % len(rows)] for i in range(process * size, (process + 1) * size)]
                for key, wanted in collator(mine).items():
                    if key.endswith("token_indices"):
                        assert key not in part
                    elif wanted.dim() == 1:
                        assert part[key].equal(wanted)
                    else:
                        width = wanted.shape[1]
                        assert part[key][:, :width].equal(wanted)
                        assert (part[key][:, width:] == (-100 if key == "labels" else 0)).all()
