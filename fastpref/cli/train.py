"""`fastpref train`: preference training of a model from one command."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastpref.backends.processor import bf16_is_fast, training_device
from fastpref.cli import report
from fastpref.cli.losses import LOSS_HELP, OPTION_HELP, choose_loss
from fastpref.cli.models import (
    continues,
    latest_checkpoint,
    load_model,
    load_tokenizer,
    lora_config,
)
from fastpref.progress import lines_to


class Precision(str, Enum):
    exact = "exact"
    fast = "fast"


class Reference(str, Enum):
    auto = "auto"
    model = "model"
    adapter = "adapter"
    precompute = "precompute"
    columns = "columns"


REFERENCE_COLUMNS = {"ref_chosen_logps", "ref_rejected_logps"}
LEARNING_RATES = {False: 1e-6, True: 1e-5}  # full, LoRA: what TRL recommends for preferences


def command(
    model: Annotated[
        str,
        typer.Option(
            help="Directory or hub name of a causal model, or of a LoRA adapter to train on."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Preference pairs, or labelled answers: .jsonl, .json, .csv, .parquet or a hub "
            "name."
        ),
    ],
    loss: Annotated[str, typer.Option(help=LOSS_HELP)] = "dpo",
    loss_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help=OPTION_HELP)
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Where the model, checkpoints, log and plot go.")
    ] = Path("fastpref-output"),
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter only.")] = False,
    lora_r: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter; by default 16.")
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="Scale of the adapter; by default 32.")
    ] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Comma-separated modules; by default all-linear.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out pairs.")] = None,
    eval_split: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Hold out this fraction of the data instead.")
    ] = 0.0,
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate every so many steps; at the end in any case."),
    ] = None,
    beta: Annotated[float, typer.Option(help="Strength of the pull to the reference.")] = 0.1,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; by default 1e-6, with --lora 1e-5.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; -1: epochs.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs or answers per device.")] = 4,
    grad_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimiser step.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")] = 1024,
    precision: Annotated[
        Precision, typer.Option(help="Logits in fp32 (exact) or bf16 (fast).")
    ] = Precision.exact,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--fp32",
            help="Mixed bf16 or plain fp32; by default what the machine is fast at.",
        ),
    ] = None,
    reference: Annotated[
        Reference,
        typer.Option(
            help="Where reference log-probs come from: a second model, the model with its adapter "
            "off (or as it is now, if --model is one), a pass before training, or columns of the "
            "data. auto: columns where the data has them, else adapter with LoRA, else precompute."
        ),
    ] = Reference.auto,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, slower.")
    ] = True,
    resume: Annotated[
        str | None,
        typer.Option(help="Continue from this checkpoint directory, or 'latest' of --output."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 42,
    logging_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between two log points; by default at least 50 points, 1 to 10."
        ),
    ] = None,
    save_steps: Annotated[
        int, typer.Option(min=0, help="Steps between two checkpoints; 0 saves at the end only.")
    ] = 500,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a model on preferences with DPO, IPO, KTO or another loss."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    if not console.is_terminal:  # bars are for people
        hide_library_bars()
    adapter = {"--lora-r": lora_r, "--lora-alpha": lora_alpha, "--lora-targets": lora_targets}
    given = [k for k, v in adapter.items() if v]
    continued = continues(model, given)
    check_options(epochs, max_steps, [] if lora else given)
    lora = lora or continued
    if eval_steps and eval_data is None and not eval_split:
        raise ValueError("--eval-steps needs held-out pairs; add --eval-data or --eval-split")
    if resume == "latest":
        resume = latest_checkpoint(output)
    elif resume is not None and not Path(resume).is_dir():
        raise ValueError(f"--resume {resume} is not a checkpoint directory")
    chosen = choose_loss(loss, beta, loss_option or [])
    if chosen.reference != "required" and reference is not Reference.auto:
        raise ValueError(f"--reference {reference.value} would not be used by --loss {loss}")
    tokenizer, train_set, eval_set = load(model, data, eval_data, eval_split, seed)
    rows = "pairs"
    if chosen.unpaired:  # whose trainer reads rows in order, in batches of both kinds at best
        from fastpref.data.unpaired import unpair

        rows, train_set = "answers", unpair(train_set).shuffle(seed=seed)
        if eval_set is not None:
            eval_set = unpair(eval_set, "held-out").shuffle(seed=seed)
    mode, source = Reference.auto, "none"
    if chosen.reference == "required":
        mode = reference_mode(reference, lora, train_set, eval_set)
        source = reference_text(mode, train_set, eval_set)
        if continued:
            source = source.replace("adapter", "adapter as it is now")
    device = training_device()
    use_bf16 = bf16_is_fast(device) if bf16 is None else bf16
    if not use_bf16 and precision is Precision.fast:
        raise ValueError("--precision fast needs bf16 operands, but this run is fp32; add --bf16")
    rate = LEARNING_RATES[lora] if lr is None else lr
    rows_per_step = batch_size * grad_accumulation
    steps = max_steps if max_steps > 0 else math.ceil(epochs * len(train_set) / rows_per_step)
    numbers = "bf16" if use_bf16 else "fp32"
    if bf16 is None and not use_bf16:
        numbers += f" (this {'CPU' if device == 'cpu' else 'GPU'} has no bf16 units)"
    console.print(
        f"{chosen.title} on [bold]{escape(model)}[/bold]: {len(train_set)} {rows}"
        + (f", {len(eval_set)} held out" if eval_set is not None else "")
        + f", {'LoRA' if lora else 'all weights'}, {numbers}, "
        f"learning rate {rate:g}, beta {beta:g}, reference: {source}"
    )

    from fastpref.cli.progress import ProgressBar
    from fastpref.trainer.config import PreferenceConfig, UnpairedPreferenceConfig

    output.mkdir(parents=True, exist_ok=True)
    config_class: Any = UnpairedPreferenceConfig if chosen.unpaired else PreferenceConfig
    config = config_class(
        output_dir=str(output),
        **chosen.settings,
        learning_rate=rate,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=grad_accumulation,
        max_length=max_length,
        precision=precision.value,
        bf16=use_bf16,
        precompute_ref_log_probs=mode is Reference.precompute,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        logging_steps=logging_steps or min(10, max(1, steps // 50)),
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if eval_steps and eval_set is not None else "no",
        eval_steps=eval_steps,
        report_to="none",
        disable_tqdm=not console.is_terminal,
    )
    bar = ProgressBar(console)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    log = console.file if first and not console.is_terminal else None
    with notes_on(console), lines_to(log), report.PeakMemory(device) as memory:
        trainer = make_trainer(
            load_model(model, torch.bfloat16 if lora and use_bf16 else torch.float32),
            config,
            tokenizer,
            train_set,
            eval_set,
            peft_config=lora_config(*adapter.values()) if lora and not continued else None,
            bar=bar,
        )
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            bar.close()
        if eval_set is not None:
            trainer.evaluate()
    trainer.save_model(str(output))
    facts = summarise(trainer, memory, bar)
    title = f"{chosen.title}, {Path(model).name}, beta {beta:g}"
    report.plot_training(trainer.state.log_history, output / "training.png", title)
    report.write_json(
        output / "training_log.json",
        {
            "summary": facts,
            "history": trainer.state.log_history,
            "options": {k: v for k, v in config.to_dict().items() if k != "hub_token"},
        },
    )
    console.print(report.summary_table("Summary", summary_rows(facts)))
    console.print(
        f"Model, training_log.json and training.png are in [bold]{escape(str(output))}[/bold]"
    )


@contextlib.contextmanager
def notes_on(console: Any) -> Iterator[None]:
    """Print what the trainer logs, such as counts of rows that it dropped."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False)
    notes = logging.getLogger("fastpref")
    notes.addHandler(handler)
    try:
        yield
    finally:
        notes.removeHandler(handler)


def hide_library_bars() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def load(model: str, data: str, eval_data: str | None, fraction: float, seed: int) -> tuple:
    """Tokenizer, training pairs and held-out pairs (or None)."""
    from fastpref.data.files import load_preference_data

    if eval_data is not None and fraction > 0:
        raise ValueError("--eval-data and --eval-split exclude each other; give one of them")
    train_set = numbered(load_preference_data(data))
    eval_set = None if eval_data is None else numbered(load_preference_data(eval_data))
    if fraction > 0:
        if len(train_set) < 2:
            raise ValueError(f"--eval-split needs at least 2 pairs, but {data} has 1")
        parts = train_set.train_test_split(fraction, seed=seed)
        train_set, eval_set = parts["train"], parts["test"]
    return load_tokenizer(model), train_set, eval_set


def numbered(dataset: Any) -> Any:
    """The data with each row's number, which errors name, also once it is split and shuffled."""
    if {"row", "prompt_ids"} & set(dataset.column_names):
        return dataset
    return dataset.add_column("row", list(range(len(dataset))))


def check_options(epochs: float, max_steps: int, adapter_options: list[str]) -> None:
    """Refuse options that would do nothing. adapter_options: those given without --lora."""
    if max_steps < 1 and max_steps != -1:
        raise ValueError(f"--max-steps is {max_steps}; expected at least 1, or -1 for all epochs")
    if not 0 < epochs < math.inf:
        raise ValueError(f"--epochs is {epochs:g}; expected a finite number above 0")
    if adapter_options:
        raise ValueError(f"{' and '.join(adapter_options)} would do nothing; add --lora")


def reference_mode(wanted: Reference, lora: bool, train_set: Any, eval_set: Any) -> Reference:
    """Resolve `auto` and refuse what cannot work."""
    missing = REFERENCE_COLUMNS - set(train_set.column_names)
    if eval_set is not None:
        missing |= REFERENCE_COLUMNS - set(eval_set.column_names)
    if wanted is Reference.auto:
        if not missing:
            return Reference.columns
        return Reference.adapter if lora else Reference.precompute
    if wanted is Reference.adapter and not lora:
        raise ValueError("--reference adapter switches a LoRA adapter off; add --lora")
    if wanted is Reference.model and lora:
        raise ValueError("--reference model would load the base twice; with --lora use adapter")
    if wanted is Reference.columns and missing:
        raise ValueError(f"--reference columns: the data lacks {' and '.join(sorted(missing))}")
    if wanted is not Reference.columns and not missing:
        raise ValueError(
            f"the data has reference log-probs, which --reference {wanted.value} would not use; "
            "remove those columns or use --reference columns"
        )
    return wanted


def reference_text(mode: Reference, train_set: Any, eval_set: Any) -> str:
    """Where the reference log-probs of each data set come from: its columns win over the mode."""
    sets = {"training": train_set, "held out": eval_set}
    used = {
        name: "columns" if set(data.column_names) >= REFERENCE_COLUMNS else mode.value
        for name, data in sets.items()
        if data is not None
    }
    if len(set(used.values())) == 1:
        return used["training"]
    return ", ".join(f"{source} ({name})" for name, source in used.items())


def make_trainer(model, config, tokenizer, train_set, eval_set, *, peft_config=None, bar) -> Any:
    """A trainer with our progress bar that also counts the positions of its batches."""
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
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(bar)
    trainer.data_collator = CountingCollator(trainer.data_collator)
    return trainer


def summarise(trainer: Any, memory: report.PeakMemory, bar: Any) -> dict[str, Any]:
    """The figures of a finished run; None where something was not measured."""
    history = trainer.state.log_history
    metrics: dict[str, Any] = {}
    for row in history:
        metrics.update(row)
    tokens = metrics.get("num_tokens", 0) - bar.resumed_tokens
    vocabulary = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
    facts = {
        "steps": trainer.state.global_step,
        "seconds": bar.seconds,
        "tokens_per_second": tokens / bar.seconds if bar.seconds and tokens > 0 else None,
        "peak_memory_bytes": memory.peak,
        "peak_memory_kind": "device" if memory.device.type == "cuda" else "resident",
        "batch_positions": trainer.data_collator.positions,
        "batch_labelled_tokens": trainer.data_collator.labelled,
        "logits_bytes": trainer.data_collator.positions * vocabulary.shape[0] * 4,
    }
    for prefix in ("", "eval_"):
        for key in ("loss", "rewards/accuracies", "rewards/margins"):
            facts[prefix + key] = metrics.get(prefix + key)
    return facts


def summary_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    def trained(key: str, form: str) -> str:
        values = [(facts[key], "training"), (facts[f"eval_{key}"], "held out")]
        return ", ".join(f"{value:{form}} {name}" for value, name in values if value is not None)

    rate, seconds = facts["tokens_per_second"], facts["seconds"]
    rows = [
        ("steps", f"{facts['steps']}" + (f" in {seconds:.1f} s" if seconds else "")),
        ("loss", trained("loss", ".4f")),
        ("reward accuracy", trained("rewards/accuracies", ".3f")),
        ("reward margin", trained("rewards/margins", "+.4f")),
        ("tokens per second", "not measured" if rate is None else f"{rate:,.0f}"),
        (
            "peak memory",
            f"{report.size_text(facts['peak_memory_bytes'])} ({facts['peak_memory_kind']})",
        ),
        (
            "logits not made",
            f"{report.size_text(facts['logits_bytes'])} for one fp32 copy of those "
            f"of the largest batch ({facts['batch_positions']:,} positions)",
        ),
    ]
    return [(name, text) for name, text in rows if text]
