"""Evaluation figures are over rows: the same for every batch size, of every loss and data."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import tiny  # noqa: E402
from test_unpaired_trainer import rows as answers  # noqa: E402
from test_unpaired_trainer import trainer as unpaired_trainer  # noqa: E402
from tiny import trainer  # noqa: E402

from fastpref.trainer.metrics import NonFiniteLossError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

MAKE = {"pairs": trainer, "answers": unpaired_trainer}
ROWS = {"pairs": tiny.rows, "answers": answers}
UNSTABLE = ("runtime", "per_second", "preparation", "epoch", "num_tokens")


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def moved(seed=7, make=tiny.model):
    """A policy that is not its reference any more."""
    model = make()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def figures(t, data):
    """What an evaluation finds, without times."""
    metrics = t.evaluate(data)
    return {k: v for k, v in metrics.items() if not any(word in k for word in UNSTABLE)}


def evaluated(tmp_path, data, kind="pairs", make=tiny.model, **options):
    options.setdefault("ref_model", make())
    return figures(MAKE[kind](tmp_path, moved(make=make), **options), data)


def in_batches_of(sizes, tmp_path, data, kind="pairs", make=tiny.model, **options):
    """The figures for each batch size, which one trainer takes in turn."""
    options.setdefault("ref_model", make())
    t = MAKE[kind](tmp_path, moved(make=make), **options)
    found = []
    for size in sizes:
        t.args.per_device_eval_batch_size = size
        found.append(figures(t, data))
    return found


def assert_alike(many):
    for metrics in many[1:]:
        assert set(metrics) == set(many[0])
        for key, value in metrics.items():
            assert math.isclose(value, many[0][key], rel_tol=2e-5, abs_tol=2e-6), key


def weighed(n=7, **kwargs):
    return [
        {**row, "weight": 0.5 + i, "margin": 0.1 * i}
        for i, row in enumerate(tiny.rows(n, **kwargs))
    ]


def own_loss(pairs):
    return F.softplus(-pairs.beta * (pairs.chosen - pairs.rejected)) / pairs.chosen_lengths


FREE = {"ref_model": None}
CASES = {
    "sigmoid": {},
    "weights and margins": {"data": weighed(seed=9)},
    "ipo": {"loss_type": "ipo"},
    "nll": {"nll_weight": 0.7},
    "nll on prompts": {"nll_weight": 0.7, "nll_on_prompt": True},
    "sft": {"loss_type": "sft"},
    "cpo": {"loss_type": "cpo", **FREE},
    "orpo": {"loss_type": "orpo", **FREE},
    "simpo": {"loss_type": "simpo", **FREE},
    "list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "aot": {"loss_type": "aot"},
    "aot unpaired": {"loss_type": "aot_unpaired"},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.3},
    "f": {"f_divergence_type": "js_divergence"},
    "free": {"reference_free": True, **FREE},
}


@pytest.mark.parametrize("name", CASES)
def test_figures_of_pairs_do_not_depend_on_the_batch_size(tmp_path, name):
    options = dict(CASES[name])
    data = options.pop("data", tiny.rows(7, seed=9))
    many = in_batches_of((7, 1, 2, 3, 16), tmp_path, data, **options)
    assert_alike(many)
    margin = many[0]["eval_rewards/chosen"] - many[0]["eval_rewards/rejected"]
    assert many[0]["eval_rewards/margins"] == pytest.approx(margin)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_one_batch_of_all_rows(tmp_path, name):
    """Which a training step over the same rows has; TRL's figures are held to those."""
    options = dict(CASES[name])
    data = options.pop("data", tiny.rows(7, seed=9))
    if options.get("ref_model", 1):
        options["ref_model"] = tiny.model()
    t = trainer(tmp_path, moved(), data, max_steps=1, per_device_train_batch_size=7, **options)
    metrics = t.evaluate(data)
    t.train()
    (step,) = tiny.history(t)
    keys = [key for key in step if "/" in key or key in ("loss", "nll_loss", "entropy")]
    assert len(keys) >= 9
    for key in keys:
        assert metrics[f"eval_{key}"] == pytest.approx(step[key], rel=2e-5, abs=2e-6), key


def test_a_loss_of_ones_own(tmp_path):
    from fastpref import PreferenceTrainer

    many = []
    for size in (1, 3, 7):
        t = PreferenceTrainer(
            moved(), tiny.model(), tiny.config(tmp_path, per_device_eval_batch_size=size),
            train_dataset=tiny.rows(), processing_class=tiny.tokenizer(), loss_function=own_loss,
        )  # fmt: skip
        metrics = t.evaluate(tiny.rows(7, seed=9))
        many.append({k: v for k, v in metrics.items() if not any(w in k for w in UNSTABLE)})
    assert_alike(many)


def test_an_nll_is_a_mean_over_tokens(tmp_path):
    data = tiny.rows(5, seed=3)
    plain = evaluated(tmp_path, data, per_device_eval_batch_size=2)
    both = evaluated(tmp_path, data, per_device_eval_batch_size=2, nll_weight=0.5)
    t = trainer(tmp_path, moved(), ref_model=tiny.model())
    prepared = t._prepare_data(data, "eval")
    tokens = sum(len(row["chosen_ids"]) for row in prepared)
    nll = -5 * plain["eval_logps/chosen"] / tokens
    assert both["eval_nll_loss"] == pytest.approx(nll)
    assert both["eval_loss"] == pytest.approx(plain["eval_loss"] + 0.5 * nll)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("weights", [False, True])
def test_figures_of_answers_do_not_depend_on_the_batch_size(tmp_path, loss, weights):
    data = answers(9, seed=4)
    options = {"loss_type": loss}
    if weights:
        data = [{**row, "weight": 0.5 + i} for i, row in enumerate(data)]
        options |= {"desirable_weight": 1.3, "undesirable_weight": 0.4}
    many = in_batches_of((9, 1, 2, 4), tmp_path, data, "answers", **options)
    assert_alike(many)
    margin = many[0]["eval_rewards/chosen"] - many[0]["eval_rewards/rejected"]
    assert many[0]["eval_rewards/margins"] == pytest.approx(margin)
    t = unpaired_trainer(
        tmp_path, moved(), data, ref_model=tiny.model(), max_steps=1,
        per_device_train_batch_size=9, **options,
    )  # fmt: skip
    metrics = t.evaluate(data)
    t.train()
    (step,) = tiny.history(t)
    for key in [key for key in step if "/" in key or key in ("loss", "kl", "entropy")]:
        assert metrics[f"eval_{key}"] == pytest.approx(step[key], rel=2e-5, abs=2e-6), key


def mixtral(**kwargs):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, router_aux_loss_coef=0.5, pad_token_id=0, eos_token_id=1,
            bos_token_id=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
def test_the_balancing_loss_is_over_all_tokens(tmp_path, kind):
    data = ROWS[kind](7, seed=9)
    many = in_batches_of((7, 1, 3), tmp_path, data, kind, mixtral)
    assert_alike(many)
    whole = MAKE[kind](
        tmp_path, moved(make=mixtral), data, ref_model=mixtral(), max_steps=1,
        per_device_train_batch_size=7,
    )  # fmt: skip
    whole.train()
    (step,) = tiny.history(whole)
    assert many[0]["eval_aux_loss"] == pytest.approx(step["aux_loss"], rel=1e-5)
    if kind == "pairs":
        assert many[0]["eval_loss"] == pytest.approx(step["loss"], rel=1e-5)


def test_the_best_model_is_chosen_by_rows(tmp_path):
    t = trainer(
        tmp_path, eval_dataset=tiny.rows(7, seed=9), per_device_eval_batch_size=2, max_steps=4,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="rewards/margins",
        greater_is_better=True, logging_steps=3,
    )  # fmt: skip
    t.train()
    seen = [h["eval_rewards/margins"] for h in t.state.log_history if "eval_loss" in h]
    assert t.state.best_metric == max(seen)
    assert t.evaluate()["eval_rewards/margins"] == pytest.approx(max(seen), rel=1e-5)
    logged = tiny.history(t)  # evaluation takes nothing out of training's log
    assert [h["step"] for h in logged] == [3]
    counts = [h["eval_num_tokens"] for h in t.state.log_history if "eval_loss" in h]
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize("kind", MAKE)
def test_no_row_is_left_out_or_counted_twice(tmp_path, kind):
    """Neither by loaders that drop a batch or are kept, nor where rows have equal numbers."""
    from datasets import concatenate_datasets

    data = ROWS[kind](5, seed=9)
    plain = evaluated(tmp_path, data, kind, per_device_eval_batch_size=5)
    dropping = evaluated(
        tmp_path, data, kind, per_device_eval_batch_size=3, dataloader_drop_last=True
    )
    assert_alike([plain, dropping])
    t = MAKE[kind](tmp_path, moved(), ref_model=tiny.model(), per_device_eval_batch_size=3)
    prepared = t._prepare_data(data, "eval")
    twice = t.evaluate(concatenate_datasets([prepared, prepared]))
    assert_alike([plain, {key: twice[key] for key in plain}])
    kept = MAKE[kind](
        tmp_path, moved(), ref_model=tiny.model(), eval_dataset=ROWS[kind](4, seed=2),
        dataloader_num_workers=1, dataloader_persistent_workers=True,
    )  # fmt: skip
    kept.evaluate()
    new = kept.evaluate(data)
    assert_alike([plain, {key: new[key] for key in plain}])
    assert new["eval_samples_per_second"] > 0


def test_a_collator_of_ones_own(tmp_path):
    class Own:
        """Without labels or row numbers."""

        def __call__(self, examples):
            from fastpref.data import PreferenceCollator

            batch = PreferenceCollator(0)(examples)
            return {k: batch[k] for k in ("input_ids", "attention_mask", "completion_mask")}

    data = tiny.rows(5, seed=9)
    plain = evaluated(tmp_path, data, per_device_eval_batch_size=5)
    own = evaluated(tmp_path, data, per_device_eval_batch_size=2, data_collator=Own())
    assert_alike([plain, own])


def test_a_loss_that_is_not_finite_names_its_rows(tmp_path):
    data = tiny.rows(3)
    t = trainer(tmp_path, per_device_eval_batch_size=2)
    assert math.isfinite(t.evaluate(data)["eval_loss"])
    with torch.no_grad():
        t.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"nan at evaluation after step 0, data rows \[0"):
        t.evaluate(data)
