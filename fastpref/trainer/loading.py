"""Loading the model, the reference, the tokenizer and the adapter of a trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ProcessorMixin,
)

from fastpref.heads.reading import unwrap
from fastpref.reference.model import add_reference_adapter, is_peft
from fastpref.trainer.adapter_loading import (
    find_adapter,
    is_path,
    load_adapter,
    quiet_peft,
    tokenizer_of,
)
from fastpref.trainer.checks import check_parallelism
from fastpref.trainer.config import BaseConfig
from fastpref.trainer.division import loads_whole, make_whole
from fastpref.trainer.four_bits import keep_gradients
from fastpref.trainer.pickles import readable_weights

logger = logging.getLogger("fastpref")


class Parts(NamedTuple):
    """What a trainer is made of. ref_model: the user's, or None."""

    model: Any
    ref_model: Any
    tokenizer: Any
    pad_token_id: int


def load_parts(
    model: Any,
    ref_model: Any,
    tokenizer: Any,
    args: BaseConfig,
    quantization_config: Any,
    peft_config: Any,
) -> Parts:
    """Load what is passed by name, and add the adapter of peft_config.

    Arguments and errors: those of `PreferenceTrainer`; tokenizer is its processing_class.
    """
    model, ref_model = _as_name(model), _as_name(ref_model)
    check_models(model, ref_model, args, quantization_config, peft_config)
    name = model if isinstance(model, str) else None
    with loads_whole():
        model = load_model(model, args, quantization_config)
        if ref_model is not None:
            ref_model = load_model(ref_model, args, quantization_config, trainable=False)
    for loaded in (model, ref_model):
        if loaded is not None:
            make_whole(loaded)
            keep_gradients(loaded)
    check_parallelism((model, ref_model), getattr(args, "parallelism_config", None))
    tokenizer, pad_token_id = load_tokenizer(model, tokenizer, args, name)
    model = add_adapter(model, peft_config, ref_model is not None)
    return Parts(model, ref_model, tokenizer, pad_token_id)


def _as_name(model: Any) -> Any:
    """A path as the string that names a model; anything else unchanged."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def check_models(
    model: Any, ref_model: Any, args: BaseConfig, quantization_config: Any, peft_config: Any
) -> None:
    """Raise ValueError for arguments of a trainer that exclude each other."""
    if model is ref_model and not isinstance(model, str):
        raise ValueError("ref_model is model itself; leave it out to have a copy made")
    if not isinstance(model, str):
        if args.model_init_kwargs is not None:
            raise ValueError("model_init_kwargs is given but the model is already loaded")
        if quantization_config is not None:
            raise ValueError(
                "quantization_config is given but the model is already loaded; expected a model by "
                "name, or one that was loaded with that quantization_config"
            )
        return
    options = _options(args, quantization_config)
    if peft_config is not None and find_adapter(model, options) is not None:
        raise ValueError(
            f"model is the adapter {model!r} and peft_config is given; merge the adapter into its "
            "base model first, or leave peft_config out to go on training it"
        )


def load_model(
    model: Any, args: BaseConfig, quantization_config: Any = None, *, trainable: bool = True
) -> Any:
    """The model, loaded in float32 by default if it is a name.

    The name of an adapter gives a PeftModel: the base model with the adapter.
    """
    if not isinstance(model, str):
        return model
    options = _options(args, quantization_config)
    adapter = find_adapter(model, options)
    if adapter is not None:
        return load_adapter(model, adapter, options, _load_whole, trainable=trainable)
    return _load_whole(model, options)


def _options(args: BaseConfig, quantization_config: Any = None) -> dict[str, Any]:
    """The arguments of from_pretrained."""
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
    init_kwargs = _init_kwargs(args)
    if quantization_config is not None:
        if init_kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config is given, and in model_init_kwargs as well; expected it in "
                "one of the two"
            )
        options["quantization_config"] = quantization_config
    return {**options, **init_kwargs}


def _load_whole(name: str, options: dict[str, Any]) -> Any:
    if is_path(name) and not Path(name).is_dir():
        raise ValueError(f"model {name!r} could not be loaded: it is not a directory")
    try:
        loader = _auto_class(name, options)
        with readable_weights(name):
            loaded, info = loader.from_pretrained(name, **options, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model {name!r} could not be loaded: {error}") from error
    except ImportError as error:  # the library of a quantisation is not installed
        text = " ".join(str(error).split())
        raise ImportError(f"model {name!r} could not be loaded: {text}") from error
    check_loaded(loaded, info, f"model {name!r}")
    return loaded


def _auto_class(model: str, options: dict[str, Any]) -> Any:
    """The class that loads a causal model, or a vision-language model, of that name."""
    names = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
    hub_options = {name: options[name] for name in names if name in options}
    config = AutoConfig.from_pretrained(model, **hub_options)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    vision = not known and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def check_loaded(model: Any, info: Mapping[str, Any], what: str) -> None:
    """Raise ValueError if the output head was not in the model's files and so is random.

    Args:
        model: a model from from_pretrained.
        info: the second result of `from_pretrained(..., output_loading_info=True)`.
        what: the model's name in the error.
    """
    missing = set(info.get("missing_keys") or ())
    base = getattr(model, "base_model", model)
    backbone = set() if base is model else {id(p) for p in base.parameters()}
    names: dict[int, list[str]] = {}  # a tied weight has several names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    module = model.get_output_embeddings()
    head = {id(p) for p in module.parameters()} if module is not None else set()
    invented = [
        aliases[0]
        for key, aliases in names.items()
        if missing.issuperset(aliases) and (key in head or key not in backbone)
    ]
    if invented:
        raise ValueError(
            f"{what} has no trained output head: its files lack {', '.join(sorted(invented))}; "
            f"expected the weights of a whole causal language model ({type(model).__name__})"
        )


def load_tokenizer(
    model: Any, tokenizer: Any, args: BaseConfig, name: str | None = None
) -> tuple[Any, int]:
    """The tokenizer, by default the model's, with a pad token; and that token's id.

    Args:
        tokenizer: the user's or None.
        name: the name that the model was loaded by, or None. The tokenizer of an adapter has
            precedence over its base model's.
    """
    config = unwrap(model).config.get_text_config()
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError("processing_class is a multimodal processor; expected a tokenizer")
    base = getattr(unwrap(model).config, "_name_or_path", "")
    if tokenizer is None and (name or base):
        options = {k: v for k, v in _init_kwargs(args).items() if k in ("revision", "token")}
        if name is not None and is_peft(model):
            name = tokenizer_of(name, options)
            if name is None:  # the base model's tokenizer; the revision is the adapter's
                options.pop("revision", None)
        options["trust_remote_code"] = args.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(name or base, **options)
    if args.pad_token is not None:
        _set_pad_token(tokenizer, args.pad_token)
    if tokenizer is None:  # data that is tokenised already needs only a pad token's id
        ids = [i for i in (config.pad_token_id, config.eos_token_id) if i is not None]
        return None, ids[0] if ids else 0
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token"
            )
        logger.warning(
            f"the tokenizer has no pad token; batches are padded with EOS {tokenizer.eos_token!r}, "
            "without a label"
        )
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    if getattr(unwrap(model), "generation_config", None) is not None:
        unwrap(model).generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, tokenizer.pad_token_id


def _set_pad_token(tokenizer: Any, token: str) -> None:
    if tokenizer is None:
        raise ValueError(f"pad_token is {token!r} but there is no tokenizer; pass processing_class")
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"pad_token is {token!r}, which is not in the tokenizer's vocabulary; expected one of "
            "its tokens"
        )
    tokenizer.pad_token = token


def add_adapter(model: Any, peft_config: Any, has_ref_model: bool) -> Any:
    """The model with a new adapter, and with a frozen copy of a trained one if it is needed.

    The copy is the reference when training continues from an adapter without a ref_model.
    """
    if peft_config is not None:
        if is_peft(model):
            raise ValueError(
                "model is a PeftModel and peft_config is given; merge the adapter into the model "
                "first, or leave peft_config out to go on training it"
            )
        from peft import get_peft_model

        with quiet_peft():
            model = get_peft_model(model, peft_config)
        if not has_ref_model and _starts_elsewhere(model):
            # PiSSA and similar methods move a part of the weights into the adapter, so the model
            # without it is not the original one.
            add_reference_adapter(model)
        return model
    if is_peft(model) and not has_ref_model:
        add_reference_adapter(model)
    return model


def _starts_elsewhere(model: Any) -> bool:
    """Whether a new LoRA adapter changes the model's output, since its B is not 0."""
    lora_B = (p for n, p in model.named_parameters() if ".lora_B." in n or "lora_embedding_B" in n)
    return any(bool(p.detach().count_nonzero()) for p in lora_B if not p.is_meta)


def router_coefficient(model: Any, option: float | None) -> float:
    """The weight of the load-balancing loss; 0 for a model that is not a mixture of experts.

    option: router_aux_loss_coef, None for the model's default.
    """
    config = unwrap(model).config.get_text_config()
    routed = hasattr(config, "output_router_logits")
    if option and not routed:
        raise ValueError(
            f"router_aux_loss_coef is {option} but the model is a {type(unwrap(model)).__name__}, "
            "which is not a mixture of experts with router logits"
        )
    default = getattr(config, "router_aux_loss_coef", 0.0)
    return (default if option is None else option) if routed else 0.0


def as_list(datasets: Any) -> list[Any]:
    """One data set, a dict of data sets or None, as a list."""
    if isinstance(datasets, Mapping):
        return list(datasets.values())
    return [] if datasets is None else [datasets]


def _init_kwargs(args: BaseConfig) -> dict[str, Any]:
    init_kwargs: Any = args.model_init_kwargs or {}
    if not isinstance(init_kwargs, dict):
        raise ValueError(
            f"model_init_kwargs is {init_kwargs!r}; expected a dict, or JSON on a command line"
        )
    return init_kwargs
