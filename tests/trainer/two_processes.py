"""Run by test_processes.py in each of two processes: what a single process must find as well."""

from pathlib import Path

import agreeing
import tiny
from datasets import Dataset, disable_progress_bars
from test_evaluation import moved
from test_unpaired_trainer import rows as answers
from test_unpaired_trainer import trainer as unpaired_trainer

from fastpref.data.segments import PLAN
from fastpref.reference import Reference

MAKE = {"pairs": tiny.trainer, "answers": unpaired_trainer}
ROWS = {"pairs": tiny.rows, "answers": answers}
CONFIGS = {
    "each": {},
    "uneven": {"even_batches": False},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
    "dispatched and split": {"dispatch_batches": True, "split_batches": True},
}


def stream(kind, n, **kwargs):
    return Dataset.from_list(ROWS[kind](n, **kwargs)).to_iterable_dataset()


def evaluated(path, kind, data, **config):
    options = {"nll_weight": 0.5} if kind == "pairs" else {}
    t = MAKE[kind](
        path, moved(), ref_model=tiny.model(), per_device_eval_batch_size=2,
        accelerator_config=config, **options,
    )  # fmt: skip
    return t.evaluate(data)


def evaluations(path):
    """Figures by kind of data, number of rows and way of loading; one row is too few for two."""
    found = {f"pairs {n} rows": evaluated(path, "pairs", ROWS["pairs"](n, seed=9)) for n in (1, 2)}
    for name, config in CONFIGS.items():
        data = ROWS["pairs"](7, seed=9)
        found[f"pairs 7 {name}"] = evaluated(path, "pairs", data, **config)
        data = stream("answers", 7, seed=9)
        found[f"answers 7 {name}"] = evaluated(path, "answers", data, **config)
    found["pairs 7 stream"] = evaluated(path, "pairs", stream("pairs", 7, seed=9))
    return found


def references(path):
    """The reference's log-probs of the training data."""
    t = tiny.trainer(path, moved(), train=tiny.rows(7), precompute_ref_log_probs=True)
    return [[row[column] for column in t.reference_columns()] for row in t.train_dataset]


def stored_references(path):
    """The same from a store that is filled, and extended by two rows; and how often it was asked.

    The second run asks for the rows that are new and for the three that it checks.
    """
    found, asked = [], []
    original = Reference.token_logps

    def token_logps(self, batch):
        asked.append(len(batch["lengths" if PLAN in batch else "input_ids"]))
        return original(self, batch)

    Reference.token_logps = token_logps
    for count in (5, 7):
        asked.clear()
        t = tiny.trainer(path, moved(), train=tiny.rows(count), reference_store=str(path / "store"))
        found = [[row[column] for column in t.reference_columns()] for row in t.train_dataset]
    Reference.token_logps = original
    return {"references": found, "asked": sum(asked)}


def rows_of_runs(path):
    """This process's rows at every step of whole runs, and of runs that resume in a second pass."""
    found = {}
    for name, kind, config in (
        ("map", "pairs", {}),
        ("stream", "pairs", {}),
        ("dispatched map", "pairs", {"dispatch_batches": True}),
        ("dispatched stream", "answers", {"dispatch_batches": True}),
    ):
        for resume in (False, True):
            data = stream(kind, 8) if "stream" in name else ROWS[kind](8)
            out = path / name
            t = MAKE[kind](
                out, train=data, max_steps=5, per_device_train_batch_size=2,
                save_strategy="steps", save_steps=3, accelerator_config=config,
            )  # fmt: skip
            seen, step = [], t.training_step

            def training_step(model, inputs, *args, seen=seen, step=step):
                seen.append(inputs["rows"].tolist())
                return step(model, inputs, *args)

            t.training_step = training_step
            t.train(resume_from_checkpoint=str(out / "out" / "checkpoint-3") if resume else None)
            found[f"{name} {'resumed' if resume else 'whole'}"] = seen
    return found


def packed_runs(path, processes=2):
    """Losses and tokens of runs with packing, whose batches the processes divide among them."""
    found = {}
    parts, split = {"tokens_per_batch": 60}, {"accelerator_config": {"split_batches": True}}
    for name, kind, size, options in (
        ("whole", "pairs", 8 // processes, {}),
        ("parts", "pairs", 8 // processes, parts),
        ("accumulated", "pairs", 4 // processes, {"gradient_accumulation_steps": 2}),
        ("split", "pairs", 8, split),
        # The KL term's mismatched answers depend on per_device_train_batch_size.
        ("answers", "answers", 8, {**parts, **split}),
    ):
        t = MAKE[kind](
            path / name, train=ROWS[kind](40, longest=20), max_steps=4, packing=True,
            per_device_train_batch_size=size, include_num_input_tokens_seen="non_padding",
            **options,
        )  # fmt: skip
        t.train()
        found[name] = [line["loss"] for line in tiny.history(t)]
        found[name].append(t.state.num_input_tokens_seen)
    return found


def predictions(path):
    """Of seven rows, by kind of data and whether it is a stream."""
    found = {}
    for kind, make in MAKE.items():
        t = make(path, ref_model=tiny.model(seed=5), per_device_eval_batch_size=2)
        for name, data in (
            (kind, ROWS[kind](7, seed=4)), (f"{kind} stream", stream(kind, 7, seed=4)),
        ):  # fmt: skip
            found[name] = t.predict(data).predictions.tolist()
    return found


def found(folder):
    path = Path(folder)
    disable_progress_bars()
    found = {"evaluations": evaluations(path), "references": references(path)}
    found["stored"] = stored_references(path)
    found["rows"] = rows_of_runs(path)
    found["packed"] = packed_runs(path / "packed")
    found["predictions"] = predictions(path)
    found["agreed"] = agreeing.agreed(path / "agreed")
    return found
