"""Adapters and saved copies of the output layer in the trainer: the model's own logits, and TRL."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import families  # noqa: E402
import oracle  # noqa: E402
import tiny  # noqa: E402
from parity import KEYS, options  # noqa: E402
from tiny import history, lora, trainer  # noqa: E402

from fastpref.heads import batch_labels, model_inputs  # noqa: E402
from fastpref.reference import as_reference  # noqa: E402
from fastpref.trainer import PreferenceTrainer  # noqa: E402
from fastpref.trainer.config import PreferenceConfig  # noqa: E402

HEAD = {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 16}
KINDS = {
    "lora": HEAD,
    "head alone": {"target_modules": ["lm_head"]},
    "rslora": {**HEAD, "use_rslora": True},
    "dora": {**HEAD, "use_dora": True},
    "saved": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def move(model):
    """The weights that train, as they are after some steps."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def own_sums(model, batch):
    """Log-probs [2P] of the answers from the model's own logits."""
    labels = batch_labels(batch)
    return families.log_probs(model(**model_inputs(batch)).logits, labels).sum(1)


@pytest.mark.parametrize("given", ["peft_config", "trained adapter"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_plain_torch(tmp_path, kind, tied, given):
    policy, settings = tiny.model(tie_word_embeddings=tied), {"peft_config": lora(**KINDS[kind])}
    if tied:  # the padding token's row is 0, by which DoRA would divide
        torch.nn.init.normal_(policy.lm_head.weight.data[policy.config.pad_token_id], std=0.02)
    if given == "trained adapter":  # whose frozen copy is the reference
        policy = peft.get_peft_model(policy, settings.pop("peft_config"))
        move(policy)
    t = trainer(tmp_path, policy, prefix_sharing=False, **settings)
    move(t.model)
    batch = t._prepare_inputs(next(iter(t.get_train_dataloader())))
    t.model.train()
    loss = t.compute_loss(t.model, batch)
    loss.backward()
    found = families.gradients(t.model)

    policy = own_sums(t.model, batch)
    with torch.no_grad(), as_reference(t.model):
        reference = own_sums(t.model, batch)
    if given == "trained adapter":
        assert "ref" in t.model.peft_config
    ratios = policy - reference
    assert ratios.abs().max() > 0.1
    expected = oracle.dpo(*ratios.chunk(2)).mean()
    expected.backward()
    wanted = families.gradients(t.model)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert set(found) == set(wanted) and any("lm_head" in name for name in wanted)
    assert all(gradient.any() for gradient in wanted.values())
    for name in wanted:
        size = float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5 * max(size, 1))


@pytest.mark.train
@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_training_and_resuming(tmp_path, kind):
    whole = trainer(tmp_path / "a", peft_config=lora(**KINDS[kind]), max_steps=4)
    before = {n: p.clone() for n, p in whole.model.named_parameters()}
    whole.train()
    logs = history(whole)
    assert logs[0]["loss"] == pytest.approx(math.log(2)) and logs[0]["rewards/margins"] == 0
    assert logs[-1]["rewards/margins"] != 0
    for name, parameter in whole.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    settings = {"peft_config": lora(**KINDS[kind]), "save_strategy": "steps", "save_steps": 2}
    half = trainer(tmp_path / "b", **settings, max_steps=4)
    half.train()
    again = trainer(tmp_path / "b", **settings, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-2"))
    tiny.same(logs, history(again), tol=1e-6)


@pytest.mark.train
@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
@pytest.mark.parametrize("how", ["autocast", "model"])
def test_sixteen_bits(tmp_path, kind, how):
    policy = tiny.model().bfloat16() if how == "model" else None
    config = lora(**KINDS[kind])
    t = trainer(tmp_path, policy, peft_config=config, bf16=how == "autocast", max_steps=2)
    t.train()
    first, second = history(t)[:2]
    if kind == "dora" and how == "model":  # whose first magnitudes peft rounds to bf16
        assert abs(first["rewards/margins"]) < 0.01
        assert first["loss"] == pytest.approx(math.log(2), abs=0.01)
    else:
        assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(math.log(2))
    assert second["rewards/margins"] != first["rewards/margins"]


def test_dropout_of_the_adapter_is_the_policys_alone(tmp_path):
    """Where dropout stays on, the adapter drops hidden states in training and not in evaluation."""
    config = lora(**HEAD, lora_dropout=0.5)
    t = trainer(tmp_path, peft_config=config, disable_dropout=False)
    move(t.model)
    batch = t._prepare_inputs(next(iter(t.get_train_dataloader())))
    t.model.train()
    assert t.compute_loss(t.model, batch) != t.compute_loss(t.model, batch)
    assert torch.equal(*(t.reference_logps(batch) for _ in range(2)))
    t.model.eval()
    assert torch.equal(*(t.compute_loss(t.model, batch).detach() for _ in range(2)))


def test_what_cannot_work_says_so_at_once(tmp_path):
    with pytest.raises(ValueError, match="a DoRA adapter with dropout; expected it alone"):
        config = lora(**KINDS["dora"], lora_dropout=0.5)
        trainer(tmp_path, peft_config=config, disable_dropout=False)
    trainer(tmp_path, peft_config=config)  # which switches dropout off
    with pytest.raises(ValueError, match="adapter of kind ia3.layer.Linear; expected LoRA, DoRA"):
        config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
        trainer(tmp_path, peft_config=config)
    model = peft.get_peft_model(tiny.model(), lora(**KINDS["dora"]))
    model.add_adapter("second", lora(**HEAD))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active adapters are default, second; expected one"):
        trainer(tmp_path, model)
    with pytest.raises(ValueError, match="a DoRA adapter with others"):
        trainer(tmp_path, model, ref_model=tiny.model())


@pytest.mark.parametrize("init", ["pissa", "olora", False])
def test_the_reference_is_the_model_that_training_starts_from(tmp_path, init):
    """Also where an adapter does not start from 0: switched off, it would leave another model."""
    model = tiny.model().eval()
    ids = torch.randint(3, 200, (2, 7))
    before = model(input_ids=ids).logits
    t = trainer(tmp_path, model, peft_config=lora(**HEAD, init_lora_weights=init), max_steps=1)
    if init is not False:
        after = t.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    t.train()
    (step,) = (h for h in t.state.log_history if "loss" in h)
    assert math.isclose(step["loss"], math.log(2), rel_tol=1e-6)
    assert abs(step["rewards/margins"]) < 1e-6


def test_an_adapter_that_is_called_as_the_reference(tmp_path):
    model = peft.get_peft_model(tiny.model(), lora(), adapter_name="ref")
    with pytest.raises(ValueError, match="'ref', the name of the frozen reference, is active"):
        trainer(tmp_path, model)


def test_dora_on_rows_of_zeros(tmp_path):
    """PEFT divides 0 by 0 there."""
    model = tiny.model()
    model.lm_head.weight.data[3] = 0
    with pytest.raises(ValueError, match="own logits are not numbers.*DoRA"):
        trainer(tmp_path, model, peft_config=lora(**KINDS["dora"]))


@pytest.mark.train
@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_trajectory_equals_trl(tmp_path, kind, loss):
    """TRL alone takes a saved layer; for an adapter on it, it needs the patch."""
    trl = pytest.importorskip("trl")
    import contextlib

    import fastpref

    path = str(tmp_path / "model")
    tiny.model().save_pretrained(path)
    settings = options(tmp_path / "out", max_steps=5, loss_type=loss, learning_rate=5e-3)
    logs = []
    for trainer_class, config_class, patch in (
        (trl.DPOTrainer, trl.DPOConfig, kind != "saved"),
        (PreferenceTrainer, PreferenceConfig, False),
    ):
        with fastpref.patch_trl() if patch else contextlib.nullcontext():
            t = trainer_class(
                model=path,
                args=config_class(**settings),
                train_dataset=tiny.data(24),
                processing_class=tiny.tokenizer(),
                peft_config=lora(**KINDS[kind]),
            )
            t.train()
        logs.append(history(t))
    compared = 0
    for mine, his in zip(*reversed(logs), strict=True):
        for key in (key for key in KEYS if key in his):
            # Rewards are differences of sums of about 100 nats, which fp32 holds to 1e-5.
            absolute = 1e-5 if "rewards" in key else 1e-6 if "logits" in key else 0
            if key == "rewards/accuracies" and his["step"] == 1:
                continue  # ties, broken by rounding
            assert math.isclose(mine[key], his[key], rel_tol=1e-4, abs_tol=absolute), (key, his)
            compared += 1
    assert compared >= 50 and logs[1][-1]["rewards/margins"] != 0
