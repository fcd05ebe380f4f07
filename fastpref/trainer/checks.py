"""Checks of a trainer's arguments, so that none is ignored."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastpref.data.loaders import row_lengths
from fastpref.heads.reading import unwrap

logger = logging.getLogger("fastpref")


def check_trains(model: Any) -> None:
    """Raise ValueError unless the model has a trainable weight."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    hint = ""
    if hasattr(model, "peft_config"):
        hint = " (PeftModel.from_pretrained(..., is_trainable=True) loads an adapter to train)"
    raise ValueError(
        "model: got one whose weights are all frozen, expected at least one with "
        f"requires_grad=True{hint}"
    )


def check_parallelism(models: Iterable[Any], config: Any) -> None:
    """Raise ValueError for models or options whose processes share the rows of a batch.

    The trainers give each process rows of its own, and their metrics, their evaluations and the
    computation of references count rows so.

    Args:
        models: the policy, and the reference or None.
        config: an accelerate `ParallelismConfig`, or None.
    """
    divided = any((getattr(unwrap(m), "_tp_size", None) or 1) > 1 for m in models if m is not None)
    if divided or getattr(config, "tp_size", 1) > 1:
        raise ValueError(
            "tensor parallelism gives several processes the same rows, which these trainers would "
            "count once for each process; expected DDP, FSDP2 or DeepSpeed here, or the linear_* "
            "functions in a loop of your own (docs/many-processes.md)"
        )
    if any(getattr(config, f"{name}_size", 1) > 1 for name in ("cp", "sp")):
        raise ValueError(
            "context and sequence parallelism give each process a part of every row, and these "
            "trainers need whole rows on a process, for a label is read from the token before it "
            "and an answer's log-prob is a sum over its tokens; expected DDP, FSDP2 or DeepSpeed"
        )


# What models call the table of their learned positions.
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def check_positions(model: Any, datasets: Iterable[Any], max_length: int | None) -> None:
    """Raise ValueError for rows that are longer than a model's table of learned positions.

    Args:
        model: a causal language model, wrapped or not.
        datasets: tokenised data; streams are not looked at.
        max_length: the number of tokens at which rows are cut, or None.
    """
    model = unwrap(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or (max_length is not None and max_length <= limit):
        return
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    tables = [
        module
        for name, module in text.named_modules()
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in _POSITIONS
    ]
    if not any(table.num_embeddings - limit in (0, 2) for table in tables):  # OPT's has two more
        return
    for dataset in datasets:
        lengths = row_lengths(dataset) if hasattr(dataset, "__len__") else []
        if lengths and (longest := max(lengths)) > limit:
            raise ValueError(
                f"max_length is {max_length}, the longest row has {longest} tokens, and "
                f"{type(model).__name__} has positions for {limit}; expected max_length={limit} or "
                "less"
            )


def warn_about_tolerances(model: Any, args: Any) -> None:
    """Say that head_gradient_tolerance has no effect where nothing of the head is trained."""
    if args.head_gradient_tolerance is None or args.process_index != 0:
        return
    if not any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        logger.warning(
            "head_gradient_tolerance is %s, but the output head is frozen: it has no effect",
            args.head_gradient_tolerance,
        )


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Raise ValueError if the user's optimizer holds none of the trainable weights."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    groups = getattr(optimizer, "param_groups", None)
    if not groups or not trained:  # `check_trains` raises if nothing is trainable
        return
    if not any(id(p) in trained for group in groups for p in group["params"]):
        raise ValueError(
            "optimizers: got an optimizer that holds none of the model's trainable weights, "
            "expected one made of them (those of an adapter exist once it is there: with "
            "optimizers, pass a PeftModel and not a peft_config)"
        )


# Options of transformers that have no effect in these trainers -> their default and the reason.
# Other values than the default are refused.
_NO_OUTPUTS = "an evaluation keeps its rows' rewards and no outputs of the model"
_MEANINGLESS: dict[str, tuple[Any, str]] = {
    "include_for_metrics": ([], _NO_OUTPUTS),
    "batch_eval_metrics": (False, _NO_OUTPUTS),
    "eval_do_concat_batches": (True, _NO_OUTPUTS),
    "eval_use_gather_object": (False, _NO_OUTPUTS),
    "label_names": (None, "labels are made of the data's answers"),
    "length_column_name": ("length", "lengths are those of the tokenised rows"),
}


def check_arguments(args: Any) -> None:
    """Raise ValueError for options of transformers that would be ignored or cannot work."""
    if args.label_smoothing_factor != 0:
        known = hasattr(args, "label_smoothing")
        instead = "set label_smoothing" if known else "losses of single answers have no smoothing"
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor}, which is of a "
            f"cross-entropy; expected 0: {instead}"
        )
    for name, (default, why) in _MEANINGLESS.items():
        if getattr(args, name, default) not in (default, None):
            raise ValueError(
                f"{name}: got {getattr(args, name)!r}, which would be ignored, as {why}; expected "
                f"{default!r}"
            )
    if sampling(args) == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy: got 'batch_rebalance', whose micro-batches differ in their "
            "numbers of rows, each of which would then count differently; expected 'random', "
            "'sequential' or 'group_by_length'"
        )


def sampling(args: Any) -> str:
    """The option `train_sampling_strategy`; transformers before 5.2 has group_by_length instead."""
    default = "group_by_length" if getattr(args, "group_by_length", False) else "random"
    return getattr(args, "train_sampling_strategy", default)


def check_sampling(args: Any, dataset: Any, in_order: bool) -> None:
    """Raise ValueError if rows are to be grouped by length but cannot be.

    Args:
        dataset: the tokenised training data.
        in_order: whether the loss needs the rows in the data's order.
    """
    if sampling(args) != "group_by_length":
        return
    name = "train_sampling_strategy: got 'group_by_length'"
    if in_order:
        raise ValueError(
            f"{name} with loss_type 'kto', whose KL term is made of rows in their order; expected "
            "'sequential', or loss_type 'apo_zero_unpaired'"
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{name} with a stream, whose lengths are unknown; expected 'random'")


def multiple(option: Any) -> int | None:
    """pad_to_multiple_of as an integer or None; on a command line it is text."""
    if option is None or (isinstance(option, str) and option.lower() in ("auto", "none")):
        return None
    value = int(option) if isinstance(option, str) and option.isdecimal() else option
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"pad_to_multiple_of is {option!r}; expected at least 1, 'auto' or None")
    return value


def auto_or_bool(name: str, option: Any) -> Any:
    """An option that is "auto" or a bool; on a command line a bool is text."""
    text = {"auto": "auto", "true": True, "false": False}
    value = text.get(str(option).lower())
    if value is None:
        raise ValueError(f"{name} is {option!r}; expected 'auto', True or False")
    return value
