"""References that follow the policy (TR-DPO), and runs that resume with them."""

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import test_unpaired_trainer as unpaired  # noqa: E402
import tiny  # noqa: E402
from tiny import (  # noqa: E402
    Kill,  # noqa: E402
    history,
    lora,
    same,
    trainer,
)
from transformers import TrainerCallback  # noqa: E402

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "learning_rate": 1e-2}
MAKERS = {"pairs": trainer, "answers": unpaired.trainer}


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


class Weights(TrainerCallback):
    """Copies of a model's weights after each step, before the reference moves."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters()})


def adapted():
    torch.manual_seed(3)
    return peft.get_peft_model(tiny.model(), lora(init_lora_weights=False))


@pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))
@pytest.mark.parametrize("given", [False, True], ids=["copy", "ref_model"])
def test_the_reference_moves(tmp_path, make, given):
    seen = Weights()
    other = {"ref_model": tiny.model(seed=5)} if given else {}
    t = make(tmp_path, callbacks=[seen], max_steps=5, ref_model_mixup_alpha=0.25, **SYNC, **other)
    expected = dict(tiny.model(seed=5 if given else 0).named_parameters())
    t.train()
    for step in (2, 4):
        now = seen.steps[step - 1]
        expected = {n: 0.25 * now[n] + 0.75 * p for n, p in expected.items()}
    for name, p in t.ref_model.named_parameters():
        torch.testing.assert_close(p, expected[name])
        assert not p.requires_grad
    if not given:
        first, second, third, *_ = history(t)
        assert first["rewards/chosen"] == 0 and second["rewards/chosen"] != 0


def test_a_share_of_one_makes_the_policy_the_reference(tmp_path):
    t = trainer(tmp_path, max_steps=3, ref_model_mixup_alpha=1.0, **SYNC)
    t.train()
    logs = history(t)
    assert logs[1]["rewards/margins"] != 0 and logs[2]["rewards/margins"] == 0
    fixed = trainer(tmp_path, max_steps=3, learning_rate=1e-2)
    fixed.train()
    same(history(fixed)[:2], logs[:2])


def test_what_has_not_moved_stays_bit_for_bit(tmp_path):
    t = trainer(tmp_path, max_steps=4, **SYNC, policy=frozen_but_norm())
    t.train()
    for (name, p), q in zip(t.ref_model.named_parameters(), tiny.model().parameters(), strict=True):
        assert torch.equal(p, q) == (name != "model.norm.weight")


def frozen_but_norm():
    model = tiny.model().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    return model


def test_the_reference_adapter_moves(tmp_path):
    seen = Weights()
    t = trainer(tmp_path, adapted(), callbacks=[seen], max_steps=2, **SYNC)
    t.train()
    before = dict(adapted().named_parameters())
    for name, p in t.model.named_parameters():
        if ".ref." in name:
            own = name.replace(".ref.", ".default.")
            mixed = 0.6 * seen.steps[1][own] + 0.4 * before[own]
            torch.testing.assert_close(p, mixed)
            assert not torch.equal(p, before[own])
        elif ".default." not in name:
            assert torch.equal(p, before[name])


@pytest.mark.parametrize("kind", ["pairs", "answers", "adapter", "tied"])
def test_a_killed_run_resumes_on_the_same_trajectory(tmp_path, kind):
    def start(where, **kwargs):
        make = MAKERS.get(kind, trainer)
        model = adapted() if kind == "adapter" else tiny.model(tie_word_embeddings=kind == "tied")
        return make(
            tmp_path / where, model, max_steps=6, save_strategy="steps", save_steps=3, **SYNC,
            **kwargs,
        )  # fmt: skip

    whole = start("whole")
    whole.train()
    killed = start("killed", callbacks=[Kill(5)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = start("killed")
    resumed.train(resume_from_checkpoint=True)
    same(history(whole), history(resumed), ("loss", "grad_norm", "rewards/margins"), tol=0)
    pairs = [(whole.model, resumed.model)]
    if kind != "adapter":
        pairs.append((whole.ref_model, resumed.ref_model))
    for a, b in pairs:
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_a_checkpoint_without_the_reference_is_said(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    t = trainer(tmp_path, **options)
    t.train()
    assert not list(tmp_path.rglob("reference.safetensors"))
    with pytest.raises(ValueError, match="sync_ref_model True instead of False"):
        trainer(tmp_path, **options, **SYNC).train(resume_from_checkpoint=True)
    t = trainer(tmp_path, **{**options, "max_steps": 3}, **SYNC, resume_anyway=True)
    t.train(resume_from_checkpoint=True)
    assert "holds no reference.safetensors" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "and so is precompute_ref_log_probs"),
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha is 0.0; expected above 0"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps is 0; expected a whole number"),
        ({"ref_model_sync_steps": 2.5}, "ref_model_sync_steps is 2.5; expected a whole number"),
        ({"loss_type": "simpo"}, "the loss needs no reference"),
        ({"peft_config": lora()}, "the model with its adapter off, which has no weights"),
        ({"peft_config": lora(), "ref_model": True}, "weights of model and ref_model differ"),
        ({"ref_model": True, "wide": True}, "weights of model and ref_model differ"),
        ({"train": "columns"}, "the data has columns of reference log-probs, which do not move"),
    ],
)
def test_what_it_does_not_go_with(tmp_path, options, message):
    options = {**SYNC, **options}
    if options.pop("ref_model", None):
        wide = options.pop("wide", False)
        options["ref_model"] = tiny.model(intermediate_size=96 if wide else 64)
    if "train" in options:
        ref = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
        options["train"] = [{**row, **ref} for row in tiny.rows(4)]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_new_data_with_references_of_its_own(tmp_path):
    ref = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
    t = trainer(tmp_path, **SYNC)
    for method in (t.evaluate, t.predict):
        with pytest.raises(ValueError, match="columns of reference log-probs, which do not move"):
            method([{**row, **ref} for row in tiny.rows(2)])


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_best_model_has_the_reference_that_it_was_the_best_against(tmp_path, kind):
    t = trainer(
        tmp_path, adapted() if kind == "adapter" else None, eval_dataset=tiny.rows(6, seed=2),
        max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", **SYNC,
    )  # fmt: skip
    t.train()
    assert not t.state.best_model_checkpoint.endswith("-6")
    assert t.evaluate()["eval_loss"] == pytest.approx(t.state.best_metric, rel=1e-6)
