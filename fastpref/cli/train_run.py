"""The run of `fastpref train`: from its options to a trained model and a summary."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.backends.processor import bf16_is_fast, training_device
from fastpref.cli import report
from fastpref.cli.losses import ChosenLoss, choose_loss
from fastpref.cli.models import (
    continues,
    load_model,
    load_tokenizer,
    lora_config,
)
from fastpref.cli.outputs import check_report
from fastpref.cli.train_options import Precision, Reference, TrainOptions, check_options
from fastpref.cli.train_report import summarise, write_results
from fastpref.progress import lines_to

REFERENCE_COLUMNS = {"ref_chosen_logps", "ref_rejected_logps"}
LEARNING_RATES = {False: 1e-6, True: 1e-5}  # of all weights, of LoRA: TRL's recommendation


@dataclass(frozen=True)
class Plan:
    """The decisions that follow from the options, the model's kind and the data.

    Attributes:
        lora: whether an adapter is trained.
        continued: whether --model is an adapter, which is trained further.
        reference: where reference log-probs come from, without `auto` if the loss needs them.
        reference_text: the same for people.
    """

    loss: ChosenLoss
    lora: bool
    continued: bool
    tokenizer: Any
    train_set: Any
    eval_set: Any
    reference: Reference
    reference_text: str
    device: str
    bf16: bool
    learning_rate: float


def run(options: TrainOptions) -> None:
    """Train a model, save it, and print and write a summary. Raises ValueError for bad input."""
    from fastpref.cli.events import Events
    from fastpref.cli.progress import ProgressBar, RunConsole
    from fastpref.trainer.output_directory import OutputDirectory

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    console = RunConsole(highlight=False, quiet=options.quiet or options.as_json or not first)
    events = Events(enabled=options.as_json and first)
    if not console.is_terminal or console.quiet:  # bars are for people
        hide_library_bars()
    if options.quiet or not first:
        hide_library_warnings()
    directory = OutputDirectory(options.output)
    if first:
        check_output(options, directory)
    plan = make_plan(options)
    with directory.held() if first else contextlib.nullcontext():
        console.print(headline(options, plan))
        config = make_config(options, plan, not console.is_terminal or console.quiet)
        bar, memory = ProgressBar(console), report.PeakMemory(plan.device)
        trainer = train(options, plan, config, directory, console, events, bar, memory)
        if first:
            facts = summarise(trainer, memory, bar)
            title = f"{plan.loss.title}, {Path(options.model).name}, beta {options.beta:g}"
            text = headline(options, plan)
            write_results(options, trainer, console, title, text, facts, events.alarms)
            events.write("end", output=str(options.output), **facts)


def check_output(options: TrainOptions, directory: Any) -> None:
    """Raise ValueError, before anything is loaded, if the run could not start in its directory."""
    from fastpref.trainer.manifest import MANIFEST, checkpoints

    check_report(options.report)
    resume, foreign = options.resume, directory.foreign_files()
    complete = [p for _, p in checkpoints(directory.path) if (p / MANIFEST).is_file()]
    if resume not in (None, "latest", "auto"):
        if not Path(resume).is_dir():
            raise ValueError(f"--resume {resume} is not a checkpoint directory")
    elif resume == "latest" and not complete:
        raise ValueError(f"--resume latest: there is no complete checkpoint in {options.output}")
    elif not (options.overwrite or (resume and complete)):
        directory.check_free(foreign)
    if options.overwrite:
        directory.check_not_source(Path(options.model).expanduser())


# ---- decisions ----


def make_plan(options: TrainOptions) -> Plan:
    """Check the options, load the data and decide. Raises ValueError for bad input."""
    adapter_options = [name for name, value in options.adapter.items() if value]
    continued = continues(options.model, adapter_options)
    lora = options.lora or continued
    check_options(options, [] if options.lora else adapter_options)
    loss = choose_loss(options.loss, options.beta, options.loss_option or [])
    needs_reference = loss.reference == "required"
    if not needs_reference and options.reference is not Reference.auto:
        name = options.reference.value
        raise ValueError(f"--reference {name} would not be used by --loss {options.loss}")
    if not needs_reference and options.reference_store is not None:
        raise ValueError(f"--reference-store would not be used by --loss {options.loss}")
    tokenizer, train_set, eval_set = load_data(options, loss)
    reference, text = Reference.auto, "none"
    if needs_reference:
        requested = options.reference
        if options.reference_store is not None:
            requested = Reference.precompute
        reference = reference_mode(requested, lora, train_set, eval_set)
        text = reference_text(reference, train_set, eval_set)
        if options.reference_store is not None:
            text = text.replace("precompute", f"store {options.reference_store}")
        if continued:
            text = text.replace("adapter", "adapter as it is now")
    device = training_device()
    bf16 = bf16_is_fast(device) if options.bf16 is None else options.bf16
    if not bf16 and options.precision is Precision.fast:
        raise ValueError("--precision fast needs bf16 operands, but this run is fp32; add --bf16")
    return Plan(
        loss=loss,
        lora=lora,
        continued=continued,
        tokenizer=tokenizer,
        train_set=train_set,
        eval_set=eval_set,
        reference=reference,
        reference_text=text,
        device=device,
        bf16=bf16,
        learning_rate=LEARNING_RATES[lora] if options.lr is None else options.lr,
    )


def load_data(options: TrainOptions, loss: ChosenLoss) -> tuple[Any, Any, Any]:
    """Tokenizer, training data, and held-out data or None; as single answers if the loss needs it.

    Raises:
        ValueError: data that cannot be loaded, or that is too small to be split.
    """
    from fastpref.data.files import load_preference_data

    eval_data, fraction = options.eval_data, options.eval_split
    if eval_data is not None and fraction > 0:
        raise ValueError("--eval-data and --eval-split exclude each other; give one of them")
    train_set = numbered(load_preference_data(options.data))
    eval_set = None if eval_data is None else numbered(load_preference_data(eval_data))
    if fraction > 0:
        if len(train_set) < 2:
            raise ValueError(f"--eval-split needs at least 2 pairs, but {options.data} has 1")
        parts = train_set.train_test_split(fraction, seed=options.seed)
        train_set, eval_set = parts["train"], parts["test"]
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    if loss.unpaired:  # its trainer reads rows in order, so that a batch should have both classes
        from fastpref.data.unpaired import unpair

        train_set = unpair(train_set).shuffle(seed=options.seed)
        if eval_set is not None:
            eval_set = unpair(eval_set, "held-out").shuffle(seed=options.seed)
    return tokenizer, train_set, eval_set


def numbered(dataset: Any) -> Any:
    """The data with a column of row numbers, which errors name after a split or a shuffle."""
    if {"row", "prompt_ids"} & set(dataset.column_names):
        return dataset
    return dataset.add_column("row", list(range(len(dataset))))


def reference_mode(option: Reference, lora: bool, train_set: Any, eval_set: Any) -> Reference:
    """Resolve `auto`. Raises ValueError for an option that cannot work."""
    missing = REFERENCE_COLUMNS - set(train_set.column_names)
    if eval_set is not None:
        missing |= REFERENCE_COLUMNS - set(eval_set.column_names)
    if option is Reference.auto:
        if not missing:
            return Reference.columns
        return Reference.adapter if lora else Reference.precompute
    if option is Reference.adapter and not lora:
        raise ValueError("--reference adapter switches a LoRA adapter off; add --lora")
    if option is Reference.model and lora:
        raise ValueError("--reference model would load the base twice; with --lora use adapter")
    if option is Reference.columns and missing:
        raise ValueError(f"--reference columns: the data lacks {' and '.join(sorted(missing))}")
    if option is not Reference.columns and not missing:
        raise ValueError(
            f"the data has reference log-probs, which --reference {option.value} would not use; "
            "remove those columns or use --reference columns"
        )
    return option


def reference_text(mode: Reference, train_set: Any, eval_set: Any) -> str:
    """Where the reference log-probs of each data set come from; its columns have precedence."""
    sets = {"training": train_set, "held out": eval_set}
    sources = {
        name: "columns" if set(data.column_names) >= REFERENCE_COLUMNS else mode.value
        for name, data in sets.items()
        if data is not None
    }
    if len(set(sources.values())) == 1:
        return sources["training"]
    return ", ".join(f"{source} ({name})" for name, source in sources.items())


def headline(options: TrainOptions, plan: Plan) -> str:
    """One sentence about the run, with rich's markup."""
    from rich.markup import escape

    rows = "answers" if plan.loss.unpaired else "pairs"
    numbers = "bf16" if plan.bf16 else "fp32"
    if options.bf16 is None and not plan.bf16:
        numbers += f" (this {'CPU' if plan.device == 'cpu' else 'GPU'} has no bf16 units)"
    held_out = "" if plan.eval_set is None else f", {len(plan.eval_set)} held out"
    return (
        f"{plan.loss.title} on [bold]{escape(options.model)}[/bold]: {len(plan.train_set)} {rows}"
        f"{held_out}, {'LoRA' if plan.lora else 'all weights'}, {numbers}, "
        f"learning rate {plan.learning_rate:g}, beta {options.beta:g}, "
        f"reference: {plan.reference_text}{_untrained_rows(options, plan)}"
    )


def _untrained_rows(options: TrainOptions, plan: Plan) -> str:
    """What to do about a reference of many rows for a run of few steps; or nothing."""
    ahead = plan.reference is Reference.precompute and options.reference_store is None
    if options.max_steps < 1 or not ahead or set(plan.train_set.column_names) >= REFERENCE_COLUMNS:
        return ""
    rows, trained = len(plan.train_set), options.max_steps * _rows_per_step(options)
    if 4 * trained > rows:
        return ""
    steps = "1 step trains" if options.max_steps == 1 else f"{options.max_steps} steps train"
    other = (
        "--reference adapter computes those alone"
        if plan.lora
        else "--reference model computes those alone, with the reference in memory"
    )
    return f" of all rows, of which {steps} {trained} ({other})"


def _rows_per_step(options: TrainOptions) -> int:
    """The rows of an optimiser step, of all processes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return options.batch_size * options.grad_accumulation * processes


def make_config(options: TrainOptions, plan: Plan, disable_tqdm: bool) -> Any:
    """The configuration of the trainer."""
    from fastpref.trainer.config import PreferenceConfig, UnpairedPreferenceConfig

    steps = options.max_steps
    if steps < 1:
        steps = math.ceil(options.epochs * len(plan.train_set) / _rows_per_step(options))
    config_class: Any = UnpairedPreferenceConfig if plan.loss.unpaired else PreferenceConfig
    return config_class(
        output_dir=str(options.output),
        **plan.loss.settings,
        **options.rows(plan.loss.unpaired),
        learning_rate=plan.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accumulation,
        max_length=options.max_length,
        precision=options.precision.value,
        bf16=plan.bf16,
        cpu_linear=options.cpu_linear.value,
        gradient_tolerance=options.gradient_tolerance,
        head_gradient_tolerance=options.head_gradient_tolerance,
        precompute_ref_log_probs=plan.reference is Reference.precompute,
        reference_store=None if options.reference_store is None else str(options.reference_store),
        gradient_checkpointing=options.gradient_checkpointing,
        seed=options.seed,
        overwrite_output_dir=options.overwrite,
        resume_anyway=options.resume_anyway,
        trust_remote_code=options.trust_remote_code,
        alarms=options.alarms,
        logging_steps=options.logging_steps or min(10, max(1, steps // 50)),
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if options.eval_steps and plan.eval_set is not None else "no",
        eval_steps=options.eval_steps,
        report_to="none",
        disable_tqdm=disable_tqdm,
    )


# ---- training ----


def train(
    options: TrainOptions,
    plan: Plan,
    config: Any,
    directory: Any,
    console: Any,
    events: Any,
    bar: Any,
    memory: report.PeakMemory,
) -> Any:
    """Make the trainer, train, save the model and evaluate on held-out data."""
    log = None if console.is_terminal or console.quiet else console.file
    with notes_on(console), events.notes(), lines_to(log), memory:
        trainer = load_trainer(options, plan, config, bar)
        trainer.output_directory = directory
        trainer.add_callback(events)
        try:
            trainer.train(resume_from_checkpoint=options.resume)
        finally:
            bar.close()
        trainer.save_model(str(options.output))  # a signal that ends the evaluation costs no model
        if plan.eval_set is not None:
            trainer.evaluate()
    return trainer


def load_trainer(options: TrainOptions, plan: Plan, config: Any, bar: Any) -> Any:
    """The trainer of the model that --model names."""
    new_adapter = plan.lora and not plan.continued
    dtype = torch.bfloat16 if plan.lora and plan.bf16 else torch.float32
    return make_trainer(
        load_model(options.model, dtype, options.trust_remote_code),
        config,
        plan.tokenizer,
        plan.train_set,
        plan.eval_set,
        peft_config=lora_config(*options.adapter.values()) if new_adapter else None,
        bar=bar,
    )


def make_trainer(model, config, tokenizer, train_set, eval_set, *, peft_config=None, bar) -> Any:
    """A trainer with the progress bar, whose collator records the size of its batches."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from fastpref.cli.progress import CountingCollator
    from fastpref.trainer.config import UnpairedPreferenceConfig
    from fastpref.trainer.preference import PreferenceTrainer
    from fastpref.trainer.unpaired import UnpairedPreferenceTrainer

    unpaired = isinstance(config, UnpairedPreferenceConfig)
    trainer_class: Any = UnpairedPreferenceTrainer if unpaired else PreferenceTrainer
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(bar)
    trainer.data_collator = CountingCollator(trainer.data_collator)
    return trainer


@contextlib.contextmanager
def notes_on(console: Any) -> Iterator[None]:
    """Print the trainer's log messages, such as the number of dropped rows."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False)
    logger = logging.getLogger("fastpref")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def hide_library_bars() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def hide_library_warnings() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
