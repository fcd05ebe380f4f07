"""Every loss through the trainer: columns of the data, references, metrics; TRL's CPO and ORPO."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import tiny  # noqa: E402
from tiny import config, history, trainer  # noqa: E402

from fastpref.losses import LOSS_TYPES  # noqa: E402
from fastpref.trainer import PreferenceTrainer  # noqa: E402
from fastpref.trainer.config import PreferenceConfig  # noqa: E402

OWN = {"exo_pair": {"label_smoothing": 0.01}, "alphapo": {"alpha": 0.25}}
FREE = ("cpo", "simpo", "alphapo", "orpo")


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_every_loss_trains(tmp_path, loss):
    t = trainer(tmp_path, max_steps=2, loss_type=loss, **OWN.get(loss, {}))
    before = [p.clone() for p in t.model.parameters()]
    t.train()
    first = history(t)[0]
    assert all(math.isfinite(h["loss"]) and h["grad_norm"] > 0 for h in history(t))
    assert any(not torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
    assert ("nll_loss" in first) == (loss in ("sft", "cpo", "orpo"))
    if loss in FREE or loss == "sft":
        assert t.ref_model is None and t.reference is None and first["rewards/chosen"] < 0
    else:
        assert first["rewards/margins"] == 0


def test_configuration(tmp_path):
    from transformers import HfArgumentParser

    args = PreferenceConfig(output_dir=str(tmp_path), loss_type=("dpo", "sft"))
    assert args.loss_type == ["sigmoid", "sft"] and args.loss_options().needs_nll
    parser = HfArgumentParser(PreferenceConfig)
    given = ["--output_dir", str(tmp_path), "--loss_type", "dpo", "sft", "--loss_weights", "1", "2"]
    (args,) = parser.parse_args_into_dataclasses([*given, "--ld_alpha", "0.5"])
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 2.0])
    assert args.loss_options().ld_alpha == 0.5
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert args.loss_type == "sigmoid"
    copy = PreferenceConfig(**{k: v for k, v in args.to_dict().items() if not k.startswith("_")})
    assert copy.loss_options() == args.loss_options()


def test_soft_labels_reach_the_loss(tmp_path):
    rows = [{**row, "soft_label": 0.75} for row in tiny.rows()]
    soft = trainer(tmp_path, train=rows, loss_type="sigmoid")
    smooth = trainer(tmp_path, loss_type="sigmoid", label_smoothing=0.25)
    for t in (soft, smooth):
        t.train()
    tiny.same(history(soft), history(smooth))
    with pytest.raises(ValueError, match="^soft_label: loss_type 'robust' does not support"):
        trainer(tmp_path, train=rows, loss_type="robust")
    rows[3]["soft_label"] = 1.5
    with pytest.raises(ValueError, match="row 3: soft_label is 1.5; expected a probability"):
        trainer(tmp_path, train=rows)
    weighted = [{**row, "weight": 2.0} for row in tiny.rows()]
    with pytest.raises(ValueError, match="^weight: loss_type 'aot' does not support it"):
        trainer(tmp_path, train=weighted, loss_type="aot")


def test_a_loss_without_a_reference_refuses_one(tmp_path):
    rows = [{**row, "ref_chosen_logps": -30.0, "ref_rejected_logps": -30.0} for row in tiny.rows()]
    with pytest.raises(ValueError, match="^ref_logps: got them for loss_type 'simpo'"):
        trainer(tmp_path, train=rows, loss_type="simpo")
    with pytest.raises(ValueError, match="^ref_logps: got them for loss_type 'orpo'"):
        trainer(tmp_path, ref_model=tiny.model(1), loss_type="orpo")
    t = trainer(tmp_path, train=rows, loss_type="sft", max_steps=1)  # there for the rewards
    t.train()
    assert history(t)[0]["rewards/chosen"] == pytest.approx(
        0.1 * (history(t)[0]["logps/chosen"] + 30), rel=1e-5
    )
    t = trainer(tmp_path, loss_type="simpo", max_steps=1)
    with pytest.raises(ValueError, match="^ref_logps: got them"):
        t.evaluate(rows)


@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_is_weighed_as_the_policy(tmp_path, precompute):
    """LD-DPO: margins are 0 at the first step whoever computes the reference's sums."""
    t = trainer(tmp_path, ld_alpha=0.3, precompute_ref_log_probs=precompute, max_steps=2)
    t.train()
    assert history(t)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert history(t)[0]["loss"] == pytest.approx(math.log(2))
    assert history(t)[1]["rewards/margins"] != 0


def test_a_loss_of_ones_own(tmp_path):
    def own(pairs):
        return F.softplus(-pairs.beta * (pairs.chosen - pairs.rejected))

    runs = []
    for function in (own, None):
        t = PreferenceTrainer(
            tiny.model(),
            args=config(tmp_path, max_steps=3),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
            loss_function=function,
        )
        t.train()
        runs.append(history(t))
    tiny.same(*runs)
    with pytest.raises(ValueError, match="loss_type is 'ipo' and loss_function is given"):
        PreferenceTrainer(
            tiny.model(),
            args=config(tmp_path, loss_type="ipo"),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
            loss_function=own,
        )


# ---- TRL's trainers of losses without a reference ----

EXPERIMENTAL = {
    "orpo": ({"beta": 0.3}, {"beta": 0.3, "nll_on_prompt": True}),
    "cpo": ({}, {}),
    "simpo": ({"beta": 2.0, "cpo_alpha": 0.5}, {"beta": 2.0, "nll_weight": 0.5}),
    "alphapo": ({"alpha": 0.2}, {"alpha": 0.2}),
}


@pytest.mark.parametrize("loss", EXPERIMENTAL)
def test_trajectory_equals_trl(tmp_path, loss, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl", exc_type=ImportError)
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
        from trl_runs import options
    trainers = (ORPOTrainer, ORPOConfig) if loss == "orpo" else (CPOTrainer, CPOConfig)
    theirs, ours = EXPERIMENTAL[loss]
    if loss != "orpo":
        theirs = {**theirs, "loss_type": "sigmoid" if loss == "cpo" else loss}
    shared = options(tmp_path, max_steps=3, per_device_train_batch_size=2, max_length=64)
    runs = []
    for (trainer_class, config_class), own in (
        (trainers, theirs),
        ((PreferenceTrainer, PreferenceConfig), {"loss_type": loss, **ours}),
    ):
        t = trainer_class(
            model=tiny.model(),
            args=config_class(**shared, **own),
            train_dataset=tiny.data(50),
            processing_class=tiny.tokenizer(),
        )
        t.train()
        runs.append(history(t))
    keys = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"]
    for his, mine in zip(*runs, strict=True):
        for key in keys + (["nll_loss"] if loss != "alphapo" else []):
            assert math.isclose(mine[key], his[key], rel_tol=1e-4, abs_tol=1e-5), key
