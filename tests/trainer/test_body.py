"""`cpu_linear` in the trainers: the same training, said in one line, undone between steps."""

import logging

import pytest
import tiny
import torch

from fastpref.backends import native
from fastpref.body import attach
from fastpref.trainer import PreferenceConfig, UnpairedPreferenceConfig, UnpairedPreferenceTrainer

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="the module is not built")


@pytest.fixture
def calls(monkeypatch):
    """Counts the products of layers."""
    count = []
    real = attach.linear
    monkeypatch.setattr(attach, "linear", lambda *args: count.append(1) or real(*args))
    return count


@pytest.mark.parametrize("ckpt", [None, True, False], ids=["kept", "reentrant", "recomputed"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_same_training(tmp_path, calls, adapter, ckpt):
    options = {"per_device_eval_batch_size": 3}
    if ckpt is not None:
        options |= tiny.checkpointing(True) | {
            "gradient_checkpointing_kwargs": {"use_reentrant": ckpt}
        }
    if adapter:
        options["peft_config"] = tiny.lora()
    found = []
    for cpu_linear in ("torch", "native"):
        t = tiny.trainer(
            tmp_path / cpu_linear,
            eval_dataset=tiny.rows(7, seed=1),
            cpu_linear=cpu_linear,
            **options,
        )
        t.train()
        layers = {type(m).__name__ for m in t.model.modules()}
        assert "NativeLinear" not in layers
        assert bool(calls) == (cpu_linear == "native")
        found.append((tiny.history(t), [t.evaluate()], t.predict(tiny.rows(5)).predictions))
    tiny.same(found[0][0], found[1][0])
    tiny.same(found[0][1], found[1][1], keys=("eval_loss", "eval_rewards/margins"))
    torch.testing.assert_close(
        *map(torch.as_tensor, (found[0][2], found[1][2])), rtol=1e-3, atol=1e-5
    )


def test_policy_and_reference_have_the_same_bits(tmp_path, calls):
    for more in ({}, {"precompute_ref_log_probs": True}):
        t = tiny.trainer(tmp_path / str(len(more)), cpu_linear="native", max_steps=1, **more)
        t.train()
        (first,) = tiny.history(t)
        assert first["rewards/margins"] == first["rewards/chosen"] == 0.0
    assert calls


def test_bf16(tmp_path, calls):
    t = tiny.trainer(tmp_path, cpu_linear="native", bf16=True)
    t.train()
    plain = tiny.trainer(tmp_path / "plain", cpu_linear="torch", bf16=True)
    plain.train()
    tiny.same(tiny.history(t), tiny.history(plain), keys=("loss", "rewards/margins"), tol=0.05)
    assert calls


def test_a_resumed_run_has_the_same_bits(tmp_path):
    options = {"cpu_linear": "native", "save_strategy": "steps", "save_steps": 2}
    whole = tiny.trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path / "cut", callbacks=[tiny.Kill(3)], **options).train()
    again = tiny.trainer(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_single_answers(tmp_path, calls):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
            for i, r in enumerate(tiny.rows(12))]  # fmt: skip
    t = UnpairedPreferenceTrainer(
        model=tiny.model(),
        args=UnpairedPreferenceConfig(
            output_dir=str(tmp_path), max_steps=2, bf16=False, use_cpu=True, save_strategy="no",
            cpu_linear="native", per_device_train_batch_size=4, disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    t.train()
    assert calls


def test_one_line_says_it(tmp_path, caplog, monkeypatch):
    from fastpref.trainer import body

    monkeypatch.setattr(attach, "LEAST_ELEMENTS", 64 * 32)
    monkeypatch.setattr(body, "speedup", lambda shape, dtype: 1.5)
    monkeypatch.setattr(body, "say_once", logging.getLogger("fastpref").warning)
    with caplog.at_level(logging.WARNING, "fastpref"):
        tiny.trainer(tmp_path)
    said = [r.getMessage() for r in caplog.records if "cpu_linear" in r.getMessage()]
    assert said == [
        "cpu_linear: 6 of 14 Linear layers on fastpref's product, 1.50x torch's on 1 threads"
    ]


def test_small_models_are_torchs(tmp_path, calls):
    t = tiny.trainer(tmp_path, max_steps=1)  # auto, which measures no layer as small as these
    t.train()
    assert not calls


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cpu_linear is 'mkl'; expected 'auto', 'native'"):
        PreferenceConfig(output_dir=str(tmp_path), cpu_linear="mkl", use_cpu=True)
    with pytest.raises(ValueError, match="cpu_linear is 'native', but torch_compile is on"):
        tiny.trainer(tmp_path, cpu_linear="native", torch_compile=True)
    with pytest.raises(ValueError, match="has no Linear layer in float32"):
        tiny.trainer(tmp_path, tiny.model().double(), cpu_linear="native")
    monkeypatch.setattr(native, "_PROBLEM", "it is not built")
    with pytest.raises(ValueError, match="cpu_linear is 'native', but it is not built"):
        tiny.trainer(tmp_path, cpu_linear="native", backend="eager")


def test_processes_choose_as_the_first_one_does(tmp_path, monkeypatch):
    from fastpref.trainer import body

    measured = []

    def speedup(shape, dtype):
        measured.append(shape)
        return 1.3

    def broadcast(found):  # from the first process, whose figure is another one
        return [1.5 if found == [None] else found[0]]

    monkeypatch.setattr(body, "speedup", speedup)
    monkeypatch.setattr(body, "broadcast_object_list", broadcast)
    for rank, expected in ((0, 1.3), (1, 1.5)):
        t = tiny.trainer(tmp_path / str(rank))
        monkeypatch.setattr(type(t.args), "world_size", 2)
        monkeypatch.setattr(type(t.args), "process_index", rank)
        agreed = t._agreed_speedup()
        assert agreed((64, 32), torch.float32) == agreed((64, 32), torch.float32) == expected
        monkeypatch.undo()
        monkeypatch.setattr(body, "speedup", speedup)
        monkeypatch.setattr(body, "broadcast_object_list", broadcast)
    assert measured == [(64, 32)]
