"""bitsandbytes' 4-bit layers on a CPU, in the layout that has gradients."""

from __future__ import annotations

from typing import Any


def keep_gradients(model: Any) -> None:
    """Keep the layers of a CPU from repacking their weights for inference.

    On a processor with AVX512-BF16 bitsandbytes (0.50) does so in the first forward pass in
    evaluation mode, as of a reference or of an evaluation. The product of that layout has no
    gradient: training would go on without one. Its results are also rounded to bfloat16, so that a
    reference would differ from the policy that it is a copy of. Weights that are repacked already
    are unpacked; their scales stay rounded to bfloat16.

    Raises:
        ValueError: weights are repacked already, and this bitsandbytes cannot undo it.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                _unpack(layer)
            layer.support_avx512bf16_for_cpu = False


def _unpack(layer: Any) -> None:
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked
    except ImportError:
        raise ValueError(
            "the model's 4-bit weights were repacked for inference by a forward pass in evaluation "
            "mode, and have no gradients; expected a model that has only been loaded"
        ) from None
    layer.weight.data, layer.weight.quant_state = unpacked(
        layer.weight.data, layer.weight.quant_state
    )
