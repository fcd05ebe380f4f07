"""Check the head of every vision-language model of transformers at full size, without memory. The
bodies have two layers where their configs allow it, which the heads do not see.

Prints a JSON object: model_type -> null, or why it is refused. Those without a default config that
can be built are left out.
"""

import json
import warnings

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from fastpref.heads import install_head_forward

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.nn.Linear.reset_parameters = lambda self: None  # a third of the time, for no numbers at all
LAYERS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")


def shallow(config):
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            shallow(value)
        elif name in LAYERS and isinstance(value, int):
            setattr(config, name, min(value, 2))
    return config


def built(name, change=lambda config: config):
    config = change(transformers.CONFIG_MAPPING[name]())
    with torch.device("meta"):
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)


found = {}
for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
    try:
        model = built(name, shallow)
    except Exception:
        try:
            model = built(name)
        except Exception:  # wants another package, or a part of its config
            continue
    try:
        install_head_forward(model)
        found[name] = None
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
