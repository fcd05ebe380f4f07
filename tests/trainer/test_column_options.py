"""The trainers' gradient_tolerance: what is logged, and that a resumed run repeats the bits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tiny import config, history, lora, trainer  # noqa: E402

NAMES = ("columns", "error", "left_out", "bound_mean", "bound_max")


def _weights(t):
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def test_a_run_with_columns_logs_them_and_resumes_to_the_same_bits(tmp_path):
    options = dict(gradient_tolerance=0.3, head_gradient_tolerance=0.3)
    options |= dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    exact = trainer(tmp_path / "exact", max_steps=1)
    exact.train()
    assert not any(key.startswith("head/") for key in exact.state.log_history[0])
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert history(whole)[0]["loss"] == history(exact)[0]["loss"]  # no gradient has moved yet
    logs = [line for line in whole.state.log_history if "loss" in line]
    for line in logs:
        columns, error, left_out, mean, most = (line[f"head/{name}"] for name in NAMES)
        assert 0 < columns <= 1 and 0 <= error < 0.5
        assert 0 <= left_out and 0 <= mean <= most
    assert any(line["head/columns"] < 1 for line in logs)
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert torch.equal(_weights(resumed), _weights(whole))


def test_a_frozen_head_has_no_columns(tmp_path, caplog):
    """The option has no effect there, which is said once; nothing is logged as 0."""
    pytest.importorskip("peft")
    t = trainer(tmp_path, head_gradient_tolerance=0.3, max_steps=1, peft_config=lora())
    t.train()
    assert caplog.text.count("but the output head is frozen: it has no effect") == 1
    assert not any(key.startswith("head/") for line in t.state.log_history for key in line)


def test_each_process_has_a_seed_of_its_own(tmp_path, monkeypatch):
    args = config(tmp_path, gradient_tolerance=1e-2)
    first = args.head_options()
    assert first["gradient_tolerance"] == 1e-2 and first["head_gradient_tolerance"] is None
    monkeypatch.setattr(type(args), "process_index", 1)
    assert args.head_options()["gradient_seed"] != first["gradient_seed"]


@pytest.mark.parametrize("name", ["gradient_tolerance", "head_gradient_tolerance"])
def test_bad_tolerances(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: got 2"):
        config(tmp_path, **{name: 2})
