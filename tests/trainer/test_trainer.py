"""The trainer: references, resuming, accumulation, evaluation, and stopping at NaN."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from tiny import config, history, lora, same, trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from fastpref.trainer import PreferenceTrainer  # noqa: E402
from fastpref.trainer.config import PreferenceConfig  # noqa: E402
from fastpref.trainer.metrics import SUMS, NonFiniteLossError  # noqa: E402

# peft reads an attribute that transformers has renamed.


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


# ---- configuration ----


def test_defaults_are_trls(tmp_path):
    args = PreferenceConfig(output_dir=str(tmp_path))
    assert (args.learning_rate, args.beta, args.max_length) == (1e-6, 0.1, 1024)
    assert (args.loss_type, args.truncation_mode) == ("sigmoid", "keep_start")
    assert args.gradient_checkpointing and args.logging_steps == 10
    assert PreferenceConfig(output_dir=str(tmp_path), loss_type="dpo").loss_type == "sigmoid"
    assert PreferenceConfig(output_dir=str(tmp_path), loss_type=["ipo"]).loss_type == "ipo"
    copy = PreferenceConfig(**{k: v for k, v in args.to_dict().items() if not k.startswith("_")})
    assert copy.gradient_checkpointing and copy.loss_type == "sigmoid"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dppo"}, "loss_type: got 'dppo', expected one of"),
        ({"loss_type": ["sigmoid", "dppo"]}, "loss_type: got 'dppo', expected one of"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights: got .* one number for each of 1"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "needs no reference"),
        ({"nll_on_prompt": True}, "has no NLL"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "does not support it"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
        ({"router_aux_loss_coef": 0.1}, "not a mixture of experts"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "already loaded"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_bad_options_raise_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options).train()


def test_bad_arguments(tmp_path):
    from peft import get_peft_model

    model = tiny.model()
    with pytest.raises(ValueError, match="ref_model is model itself"):
        trainer(tmp_path, model, ref_model=model)
    with pytest.raises(ValueError, match="merge the adapter"):
        trainer(tmp_path, get_peft_model(tiny.model(), lora()), peft_config=lora())
    with pytest.raises(ValueError, match="train_dataset is None"):
        PreferenceTrainer(tiny.model(), args=config(tmp_path))
    with pytest.raises(ValueError, match="could not be loaded"):
        trainer(tmp_path, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        PreferenceTrainer(
            tiny.model(),
            args=config(tmp_path),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(pad_token=None, eos_token=None),
        )
    from transformers import TrainingArguments

    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="a TrainingArguments; expected an instance of Pref"):
        PreferenceTrainer(tiny.model(), args=plain, train_dataset=tiny.rows())
    rows = [{"prompt_ids": [5], "chosen_ids": [200], "rejected_ids": [6]}]
    with pytest.raises(ValueError, match="row 0: chosen_ids has the token id 200"):
        trainer(tmp_path, train=rows)
    odd = tiny.model()
    odd.config.logit_scale = 2.0
    with pytest.raises(ValueError, match="with scale 2 and softcap None"):
        trainer(tmp_path, odd)
    with pytest.raises(ValueError, match="return_outputs"):
        trainer(tmp_path).compute_loss(model, {}, return_outputs=True)


def test_a_model_without_its_trained_head(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    path = tmp_path / "m"
    tiny.model().save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has no trained output head: its files lack lm_head.w"):
        trainer(tmp_path, str(path))
    tiny.model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    trainer(tmp_path, str(tmp_path / "tied"))
    (path / "model.safetensors").write_bytes(b"oops" * 9)
    with pytest.raises(ValueError, match="could not be loaded"):
        trainer(tmp_path, str(path))
    config = BertConfig(
        vocab_size=200, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=True,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="has no trained output head: its files lack cls.pred"):
        trainer(tmp_path, str(tmp_path / "bert"))


def test_eos_as_pad_token_is_said(tmp_path, caplog):
    PreferenceTrainer(
        tiny.model(),
        args=config(tmp_path),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(pad_token=None),
    )
    assert "has no pad token; batches are padded with EOS '</s>'" in caplog.text


# ---- training ----


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_training_prefers_the_chosen_answers(tmp_path, loss, peft):
    t = trainer(
        tmp_path,
        train=tiny.rows(4),
        peft_config=lora() if peft else None,
        loss_type=loss,
        max_steps=15,
        learning_rate=1e-2 if peft else 3e-3,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
    )
    t.train()
    logs = history(t)
    assert logs[0]["rewards/margins"] == 0 and logs[0]["rewards/accuracies"] == 0
    assert logs[0]["loss"] == pytest.approx(math.log(2) if loss == "sigmoid" else 25.0, rel=1e-6)
    assert logs[-1]["rewards/accuracies"] == 1 and logs[-1]["rewards/margins"] > 0.1
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_bf16_autocast_and_a_bf16_model(tmp_path):
    for kwargs in ({"bf16": True}, {"policy": tiny.model().bfloat16()}):
        t = trainer(tmp_path, max_steps=2, **kwargs)
        t.train()
        first = history(t)[0]
        assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(math.log(2))


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        t = trainer(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        t.train()
        runs.append((history(t), t))
    same(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1].model.parameters(), runs[1][1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_and_margins_reach_the_loss(tmp_path):
    base = trainer(tmp_path, max_steps=1, max_grad_norm=1e9)
    base.train()
    rows = [{**row, "weight": 2.0} for row in tiny.rows()]
    weighted = trainer(tmp_path, train=rows, max_steps=1, max_grad_norm=1e9)
    weighted.train()
    a, b = history(base)[0], history(weighted)[0]
    assert b["loss"] == pytest.approx(2 * a["loss"])
    assert b["grad_norm"] == pytest.approx(2 * a["grad_norm"], rel=1e-5)
    rows = [{**row, "margin": 1.0} for row in tiny.rows()]
    offset = trainer(tmp_path, train=rows, max_steps=1)
    offset.train()
    assert history(offset)[0]["loss"] == pytest.approx(math.log1p(math.e))
    with pytest.raises(ValueError, match="margin"):
        trainer(tmp_path, train=rows, loss_type="ipo")


def test_a_batch_whose_answers_are_all_cut_away(tmp_path):
    rows = [{"prompt_ids": [5] * 8, "chosen_ids": [6], "rejected_ids": [7]} for _ in range(4)]
    t = PreferenceTrainer(
        tiny.model(),
        args=config(tmp_path, max_steps=2, max_length=None),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        data_collator=Cut(),
    )
    t.train()
    assert history(t)[0]["loss"] == 0
    assert history(t)[0]["grad_norm"] == 0 and history(t)[0]["entropy"] == 0


class Cut:
    """A foreign collator, without labels, that truncates before the answers begin."""

    def __call__(self, examples):
        ids = torch.tensor([e["prompt_ids"] for e in examples] * 2)
        ones = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": ones, "completion_mask": ones * 0}


def test_a_stream(tmp_path):
    t = trainer(tmp_path, train=tiny.data().to_iterable_dataset(), max_steps=2)
    t.train()
    assert len(history(t)) == 2
    with pytest.raises(ValueError, match="needs data of known length"):
        trainer(tmp_path, train=tiny.data().to_iterable_dataset(), precompute_ref_log_probs=True)


def test_models_and_data_by_name(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows(6)))
    t = PreferenceTrainer(
        str(tmp_path / "m"),
        args=config(tmp_path, max_steps=1, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=tmp_path / "d.jsonl",
    )
    assert t.model.dtype == torch.bfloat16 and t.reports["train"].kept == 6
    t.train()


def test_token_ids_need_no_tokenizer(tmp_path):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8 + i], "rejected_ids": [9]} for i in range(4)]
    t = PreferenceTrainer(tiny.model(), args=config(tmp_path, max_steps=1), train_dataset=rows)
    t.train()


def test_mixture_of_experts_adds_its_balancing_loss(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    moe = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
            num_experts_per_tok=1, router_aux_loss_coef=0.5, pad_token_id=0, eos_token_id=1,
            bos_token_id=1,
        )
    )  # fmt: skip
    t = trainer(tmp_path, moe, max_steps=1)
    t.train()
    first = history(t)[0]
    assert first["aux_loss"] > 0
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["aux_loss"], rel=1e-5)


# ---- evaluation ----


def test_evaluation_sets_and_new_data(tmp_path):
    sets = {"a": tiny.rows(5, seed=1), "b": tiny.rows(4, seed=2)}
    t = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2, max_steps=2)
    t.train()
    last = {key: v for h in t.state.log_history for key, v in h.items()}
    metrics = t.evaluate()
    assert metrics["eval_a_loss"] == last["eval_a_loss"]
    assert metrics["eval_b_rewards/margins"] == last["eval_b_rewards/margins"]
    assert not any(key.startswith("eval_rewards") for key in last)
    fresh = t.evaluate(sets["a"])
    assert fresh["eval_loss"] == metrics["eval_a_loss"]
    assert t.evaluate("b")["eval_loss"] == metrics["eval_b_loss"]
    assert t.evaluate({"c": sets["b"]})["eval_c_loss"] == metrics["eval_b_loss"]


def test_evaluation_before_training_and_without_a_reference(tmp_path):
    rows = tiny.rows(5, seed=1)
    t = trainer(tmp_path, precompute_ref_log_probs=True, eval_dataset=rows, max_steps=1)
    metrics = t.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2))
    assert t.evaluate(tiny.rows(3, seed=4))["eval_loss"] == pytest.approx(math.log(2))
    t.train()
    assert math.isfinite(t.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="no reference model is kept"):
        t.evaluate(tiny.rows(3, seed=5))


def test_metrics_are_averaged_over_the_window_and_read_once(tmp_path, monkeypatch):
    single = trainer(tmp_path, max_steps=4)
    single.train()
    window = trainer(tmp_path, max_steps=4, logging_steps=4)
    calls, gather = [], window.accelerator.gather
    window._window.gather = lambda t: calls.append(t.shape) or gather(t)
    window.train()
    assert calls == [(4, len(SUMS))]
    logs = history(single)
    (only,) = history(window)
    for key in ("rewards/margins", "entropy", "logits/chosen", "logps/rejected"):
        assert only[key] == pytest.approx(sum(h[key] for h in logs) / 4, rel=1e-6)
    assert only["num_tokens"] == logs[-1]["num_tokens"]


# ---- numbers that are not finite ----


class Poison(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[3] = float("nan")


def test_nan_stops_at_once_and_keeps_the_last_checkpoint(tmp_path):
    t = trainer(
        tmp_path, callbacks=[Poison(3)], save_strategy="steps", save_steps=2,
        gradient_accumulation_steps=2, max_steps=6, logging_steps=10,
    )  # fmt: skip
    with pytest.raises(
        NonFiniteLossError, match=r"nan at step 4, micro-batch 1 of 2, data rows \["
    ):
        t.train()
    saved = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert saved == ["checkpoint-2"]
    resumed = trainer(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    out = resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert out.global_step == 3 and math.isfinite(out.training_loss)


def test_on_a_device_nan_is_found_before_anything_is_logged_or_saved(tmp_path):
    """There nothing is read between log lines; a window that does not check at once behaves so."""
    for options in ({"logging_steps": 5}, {"logging_steps": 50, "save_steps": 5}):
        t = trainer(tmp_path, callbacks=[Poison(2)], save_strategy="steps", max_steps=9, **options)
        window = t._window
        window.add = lambda *step, w=window: w.pending.append(Step(*step[:3]))
        with pytest.raises(
            NonFiniteLossError, match="nan at step 3, micro-batch 1 of 1, data rows"
        ):
            t.train()
        assert not history(t) and not list((tmp_path / "out").glob("checkpoint-*"))


def Step(sums, rows, where):  # noqa: N802
    from fastpref.trainer.metrics import _Step

    return _Step(sums, rows, where)


def test_weights_that_overflow_are_not_saved(tmp_path):
    t = trainer(tmp_path, save_strategy="steps", save_steps=1, learning_rate=float("inf"))
    with pytest.raises(NonFiniteLossError, match="a weight is not finite after step 1"):
        t.train()
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_a_model_that_overflowed_in_the_end_is_not_saved(tmp_path):
    t = trainer(tmp_path, max_steps=1)
    t.train()
    with torch.no_grad():
        t.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match="a weight is not finite after step 1"):
        t.save_model(str(tmp_path / "end"))
    assert not (tmp_path / "end").exists()
