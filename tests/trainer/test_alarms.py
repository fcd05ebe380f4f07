"""The alarms of a run: silent where it is healthy, said once where it is not."""

from __future__ import annotations

import sys
import types

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from alarm_runs import State, alarms, figures, look  # noqa: E402
from test_unpaired_trainer import rows as answers  # noqa: E402
from test_unpaired_trainer import trainer as unpaired_trainer  # noqa: E402
from tiny import lora, trainer  # noqa: E402

from fastpref.fused.pair_loss import PreferenceOutput  # noqa: E402
from fastpref.trainer.alarms import raise_alarm  # noqa: E402
from fastpref.trainer.moments import MOMENTS, explained_by_length, margin_size, pair_moments  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


# ---- moments ----


def output(pairs, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def values():
        return torch.randn(pairs, generator=draw, dtype=torch.float64)

    return PreferenceOutput(values()[0], *(values() for _ in range(4)))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_moments_are_those_of_numpy(per_token, flat):
    np = pytest.importorskip("numpy")
    pairs, width = 40, 9
    lengths = torch.tensor([(7 * i) % width for i in range(2 * pairs)])  # some answers are empty
    labels = torch.where(torch.arange(width) < lengths[:, None], 3, -100)
    out = output(pairs)
    ids = None
    if flat:
        ids = torch.arange(2 * pairs).repeat_interleave(lengths)
        labels = torch.full_like(ids, 3)
    sums = {k: float(v) for k, v in pair_moments(out, labels, ids, per_token).items()}
    n = lengths.clamp(min=1).numpy()
    rewards = [out.chosen_rewards.numpy(), out.rejected_rewards.numpy()]
    ranked = out.chosen_logps.numpy() / n[:pairs] > out.rejected_logps.numpy() / n[pairs:]
    if per_token:
        rewards = [rewards[0] / n[:pairs], rewards[1] / n[pairs:]]
    m, d = rewards[0] - rewards[1], (lengths[:pairs] - lengths[pairs:]).numpy().astype(float)
    expected = [m.sum(), (m * m).sum(), d.sum(), (d * d).sum(), (m * d).sum(), ranked.sum()]
    assert np.allclose([sums[k] for k in MOMENTS], expected)
    sums["pairs"] = pairs
    assert np.isclose(explained_by_length(sums), np.corrcoef(m, d)[0, 1] ** 2)
    assert np.isclose(margin_size(sums), np.sqrt((m * m).mean()))


# ---- what is looked at ----


SMALL = {"chosen": 0.001, "rejected": 0.0, "noise": 0.001}  # margins after a few small steps


@pytest.mark.parametrize(
    "name, sums, options",
    [
        (None, {}, {}),
        (None, {"accuracy": 1.0}, {}),  # late in a run
        ("saturated", {"accuracy": 1.0}, {"state": State(2, 40)}),
        (None, {"accuracy": 1.0, "pairs": 32}, {"state": State(2, 40), "times": 1}),
        ("displacement", {"chosen": -0.8, "rejected": -1.2}, {}),
        (None, {"chosen": -0.2, "rejected": -1.2}, {}),
        (None, {"chosen": -0.8, "rejected": -1.2}, {"starts": False}),
        ("length", {"slope": 0.1}, {}),
        (None, {"slope": 0.1}, {"ref": False}),  # log-probs of a loss like CPO
        (None, {"slope": 0.01}, {}),
        (None, {"slope": 1e-4, "noise": 1e-3, "chosen": 0.01, "rejected": 0.01}, {}),
        ("ranking", {"accuracy": 0.9, "ranked": 0.2}, {}),
        ("target", SMALL, {"loss_type": "ipo"}),
        ("target", {**SMALL, "noise": 30.0}, {"loss_type": "ipo", "beta": 1.0}),
        (None, {**SMALL, "noise": 0.1}, {"loss_type": "ipo", "beta": 0.5}),
        (None, SMALL, {"loss_type": "ipo", "state": State(19)}),
    ],
)
def test_an_alarm_is_said_once_and_only_where_it_is_due(name, sums, options, caplog):
    assert look(caplog, figures(**sums), **options) == ([] if name is None else [name])


def test_a_reference_that_is_another_model_counts_from_the_first_pairs(caplog):
    before, after = figures(chosen=2.0, rejected=1.0), figures(chosen=1.0, rejected=0.8)
    assert look(caplog, [before, after], starts=False) == ["displacement"]


def test_the_suggested_beta_has_a_target_that_can_be_met(caplog):
    look(caplog, figures(**SMALL), loss_type="ipo")
    assert "is 5 nats a token, but the chosen answers can gain at most 2" in caplog.text
    assert "try beta=2.5, a target of 0.2" in caplog.text


def test_trackio_gets_the_alarms_of_a_run_that_reports_there(monkeypatch, caplog):
    got = []
    stub = types.SimpleNamespace(
        alert=lambda **alert: got.append(alert), AlertLevel=types.SimpleNamespace(WARN="warn")
    )
    monkeypatch.setitem(sys.modules, "trackio", stub)
    raise_alarm("length", "a sentence", types.SimpleNamespace(report_to=["trackio"]))
    raise_alarm("length", "another", types.SimpleNamespace(report_to=[]))
    assert got == [{"title": "fastpref: length", "text": "a sentence", "level": "warn"}]
    stub.alert = lambda **alert: 1 / 0
    raise_alarm("length", "a third", types.SimpleNamespace(report_to=["trackio"]))
    assert "trackio did not take the alarm 'length': division by zero" in caplog.text


# ---- real runs ----


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 6},
        {"max_steps": 6, "warmup_steps": 4, "learning_rate": 1e-6},
        {"max_steps": 6, "peft_config": True, "lr_scheduler_type": "constant"},
        {"max_steps": 24, "loss_type": "ipo", "beta": 1.0, "learning_rate": 3e-4},
        {"max_steps": 6, "packing": True, "loss_type": "simpo"},
        {"max_steps": 6, "learning_rate": 0.0},
    ],
)
def test_a_healthy_run_is_silent(tmp_path, options, caplog):
    if options.pop("peft_config", False):
        options["peft_config"] = lora()
    trainer(tmp_path, **options).train()
    assert alarms(caplog) == []


def test_a_healthy_run_of_single_answers_is_silent(tmp_path, caplog):
    unpaired_trainer(tmp_path, train=answers(20), max_steps=3).train()
    assert alarms(caplog) == []


def test_bf16_weights_that_do_not_move(tmp_path, caplog):
    options = {"learning_rate": 5e-7, "max_steps": 4, "warmup_steps": 2, "logging_steps": 1}
    trainer(tmp_path, tiny.model().bfloat16(), **options).train()
    assert alarms(caplog) == ["unmoved"]
    assert "% of the sampled weights changed in a step with learning rate 2.5e-07" in caplog.text


def test_dropout_is_said_at_the_first_step_unless_alarms_are_off(tmp_path, caplog):
    options = {"disable_dropout": False, "max_steps": 2}
    for on in (True, False):
        adapter = lora(lora_dropout=0.5, init_lora_weights=False)
        trainer(tmp_path, peft_config=adapter, alarms=on, **options).train()
        assert alarms(caplog) == ["step_zero"]  # of the first run
