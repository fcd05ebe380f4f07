"""Models that DeepSpeed divides or converts, where deepspeed itself is not needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from transformers.integrations import deepspeed as hf_deepspeed  # noqa: E402

from fastpref.heads.calling import hidden_states, install_head_forward  # noqa: E402
from fastpref.trainer.division import loads_whole, make_whole, trained_form  # noqa: E402

IDS = torch.arange(12).view(2, 6) + 7


def accelerator(precision="bf16", plugin="a plugin"):
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(state=state, mixed_precision=precision, device=torch.device("cpu"))


class Zero3:
    """A DeepSpeed config, as transformers asks it."""

    def is_zero3(self):
        return True


def test_transformers_divides_nothing_while_a_model_is_loaded():
    config = Zero3()
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        with loads_whole():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


def test_deepspeeds_16_bits_are_a_copys_weights_and_not_its_buffers():
    model = tiny.model()
    install_head_forward(model)
    with trained_form(model, accelerator()) as trained:
        assert trained is not model
        assert {p.dtype for p in trained.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in trained.buffers()} == {torch.float32}
        assert hidden_states(trained, input_ids=IDS).dtype == torch.bfloat16  # the copy's own
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", [{"precision": "no"}, {"plugin": None}])
def test_without_a_conversion_there_is_no_copy(options):
    model = tiny.model()
    with trained_form(model, accelerator(**options)) as trained:
        assert trained is model


def test_a_model_that_deepspeed_trains_is_refused():
    model = tiny.model()
    make_whole(model)  # nothing is divided
    model.ds_id = 0
    with pytest.raises(ValueError, match="^model: DeepSpeed's ZeRO-3 trains it already"):
        make_whole(model)


def test_numbers_of_rows_keep_their_dtype_with_deepspeed(tmp_path):
    t = tiny.trainer(tmp_path)
    t.is_deepspeed_enabled = True  # transformers would ask DeepSpeed for its dtype, bf16
    sums = torch.tensor([-612.3456, -98.7654])
    found = t._prepare_input({"ref_chosen_logps": sums, "parts": [{"weight": sums}]})
    assert torch.equal(found["ref_chosen_logps"], sums)
    assert torch.equal(found["parts"][0]["weight"], sums)
