"""References of every kind, and runs that resume from a checkpoint with the right one."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from tiny import Kill, history, lora, same, trainer  # noqa: E402

# peft reads an attribute that transformers has renamed.


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


# ---- references ----


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_every_kind_of_reference_gives_the_same_run(tmp_path, loss):
    kinds = {"copy": {}, "model": {"ref_model": tiny.model()}}
    kinds["precomputed"] = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    runs = {}
    for kind, kwargs in kinds.items():
        t = trainer(tmp_path, loss_type=loss, **kwargs)
        t.train()
        runs[kind] = history(t)
        if kind == "precomputed":
            assert t.ref_model is None
            columns = t.train_dataset.to_list()
    given = [
        {**row, **{k: c[k] for k in ("ref_chosen_logps", "ref_rejected_logps")}}
        for row, c in zip(tiny.rows(), columns, strict=True)
    ]
    t = trainer(tmp_path, train=given, loss_type=loss)
    assert t.ref_model is None and t.reference is None
    t.train()
    runs["columns"] = history(t)
    for kind in runs:
        same(runs["copy"], runs[kind])
    unchanged = trainer(tmp_path)
    unchanged.train()
    for p, q in zip(unchanged.ref_model.parameters(), tiny.model().parameters(), strict=True):
        assert torch.equal(p, q) and not p.requires_grad


def test_lora_references(tmp_path):
    from peft import get_peft_model

    plain = trainer(tmp_path, peft_config=lora(), learning_rate=1e-2)
    plain.train()
    assert plain.ref_model is None
    second = trainer(tmp_path, peft_config=lora(), ref_model=tiny.model(), learning_rate=1e-2)
    second.train()
    same(history(plain), history(second))
    ahead = trainer(tmp_path, peft_config=lora(), precompute_ref_log_probs=True, learning_rate=1e-2)
    ahead.train()
    same(history(plain), history(ahead))

    # An adapter that was trained before is its own reference, not the model beneath it.
    trained = get_peft_model(tiny.model(), lora(init_lora_weights=False))
    before = {n: p.clone() for n, p in trained.named_parameters()}
    t = trainer(tmp_path, trained, learning_rate=1e-2)
    t.train()
    assert history(t)[0]["rewards/margins"] == 0 and history(t)[-1]["rewards/margins"] != 0
    for name, p in t.model.named_parameters():
        if ".ref." in name:
            assert torch.equal(p, before[name.replace(".ref.", ".default.")])
            assert not p.requires_grad
        elif ".default." in name:
            assert not torch.equal(p, before[name]) and p.requires_grad


def test_a_base_model_that_trains_is_no_reference(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny.model(), lora())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="norm.weight"):
        trainer(tmp_path, model)


def test_reference_free(tmp_path):
    t = trainer(tmp_path, reference_free=True, max_steps=1)
    assert t.ref_model is None
    t.train()
    first = history(t)[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * first["logps/chosen"], rel=1e-5)
    with pytest.raises(ValueError, match="reference_free is True"):
        trainer(tmp_path, reference_free=True, ref_model=tiny.model())


# ---- checkpoints ----


@pytest.mark.parametrize("kind", ["full", "lora", "trained-adapter", "precomputed"])
def test_a_killed_run_resumes_on_the_same_trajectory(tmp_path, kind):
    from peft import get_peft_model

    def start(where, **kwargs):
        model, adapter = tiny.model(), None
        if kind == "lora":
            adapter = lora(lora_dropout=0.1)
        elif kind == "trained-adapter":
            torch.manual_seed(3)
            model = get_peft_model(model, lora(init_lora_weights=False))
        return trainer(
            tmp_path / where, model, peft_config=adapter, max_steps=6, save_strategy="steps",
            save_steps=3, precompute_ref_log_probs=kind == "precomputed",
            disable_dropout=False, gradient_accumulation_steps=2, **kwargs,
        )  # fmt: skip

    whole = start("whole")
    whole.train()
    killed = start("killed", callbacks=[Kill(5)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = start("killed")
    resumed.train(resume_from_checkpoint=True)
    keys = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens", "learning_rate")
    same(history(whole), history(resumed), keys, tol=1e-6)
    for (name, p), q in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_the_reference_adapter_comes_back_from_the_checkpoint(tmp_path):
    """Even if the run is resumed from the half-trained adapter instead of the first one."""
    from peft import PeftModel, get_peft_model

    torch.manual_seed(3)
    first = get_peft_model(tiny.model(), lora(init_lora_weights=False))
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
    whole = trainer(tmp_path, first, **options)
    whole.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    moved = PeftModel.from_pretrained(tiny.model(), checkpoint, is_trainable=True)
    resumed = trainer(tmp_path, moved, **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    same(history(whole), history(resumed), tol=1e-6)
