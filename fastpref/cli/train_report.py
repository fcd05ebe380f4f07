"""The summary of a finished run of `fastpref train`."""

from __future__ import annotations

from typing import Any

from fastpref.cli import report
from fastpref.progress import size_text


def summarise(trainer: Any, memory: report.PeakMemory, bar: Any) -> dict[str, Any]:
    """The figures of a finished run; None for what was not measured."""
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
    """The rows of the summary table: name and text."""

    def both_sets(key: str, spec: str) -> str:
        values = [(facts[key], "training"), (facts[f"eval_{key}"], "held out")]
        return ", ".join(f"{value:{spec}} {name}" for value, name in values if value is not None)

    rate, seconds = facts["tokens_per_second"], facts["seconds"]
    rows = [
        ("steps", f"{facts['steps']}" + (f" in {seconds:.1f} s" if seconds else "")),
        ("loss", both_sets("loss", ".4f")),
        ("reward accuracy", both_sets("rewards/accuracies", ".3f")),
        ("reward margin", both_sets("rewards/margins", "+.4f")),
        ("tokens per second", "not measured" if rate is None else f"{rate:,.0f}"),
        (
            "peak memory",
            f"{size_text(facts['peak_memory_bytes'])} ({facts['peak_memory_kind']})",
        ),
        (
            "logits not made",
            f"{size_text(facts['logits_bytes'])} for one fp32 copy of those "
            f"of the largest batch ({facts['batch_positions']:,} positions)",
        ),
    ]
    return [(name, text) for name, text in rows if text]
