"""Check the head of every vision-language model of transformers at full size, without memory.

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
found = {}
for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
    try:
        config = transformers.CONFIG_MAPPING[name]()
        with torch.device("meta"):
            model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    except Exception:  # wants another package, or a part of its config
        continue
    try:
        install_head_forward(model)
        found[name] = None
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
