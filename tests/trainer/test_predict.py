"""predict: the rewards of every row in order, and what compute_metrics gets."""

import math

import numpy as np
import pytest

pytest.importorskip("transformers")

import test_unpaired_trainer as unpaired  # noqa: E402
import tiny  # noqa: E402
from tiny import trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
KINDS = {"pairs": (trainer, tiny.rows), "answers": (unpaired.trainer, unpaired.rows)}
FIGURES = ("loss", "entropy", "num_tokens", "rewards/chosen", "rewards/margins", "logps/rejected")


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


def trained(make, tmp_path, **kwargs):
    options = {"max_steps": 2, "learning_rate": 1e-2, "per_device_eval_batch_size": 2}
    t = make(tmp_path, **{**options, **kwargs})
    t.train()
    return t


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_raw_rows_give_their_rewards_in_order(tmp_path, kind):
    make, rows = kind
    t = trained(make, tmp_path)
    data = rows(7, seed=4)
    out = t.predict(data)
    assert out.predictions.dtype == np.float32 and np.isfinite(out.predictions).all()
    for i, row in enumerate(data):  # the last batch has one row
        one = t.predict([row, data[i - 1]] if i else [row])  # in another batch
        close(out.predictions[i], one.predictions[0])
        if make is unpaired.trainer and not i:
            side = "chosen" if row["label"] else "rejected"
            close(one.metrics[f"test_rewards/{side}"], one.predictions[0])
            assert one.metrics[f"test_logps/{side}"] < 0
        assert out.label_ids[i] == row.get("label", 0)
    for source in (data[::-1], tiny.Dataset.from_list(data[::-1]).to_iterable_dataset()):
        again = t.predict(source)
        close(again.predictions, out.predictions[::-1])
        assert again.label_ids.tolist() == out.label_ids.tolist()[::-1]
    figures = t.evaluate(data)
    for key in FIGURES:
        assert out.metrics[f"test_{key}"] == pytest.approx(figures[f"eval_{key}"]), key
    assert not any("test_" in key for log in t.state.log_history for key in log)
    assert "other_rewards/chosen" in t.predict(data, metric_key_prefix="other").metrics


def test_the_metrics_are_those_of_the_rows(tmp_path):
    t = trained(trainer, tmp_path, per_device_eval_batch_size=7)
    out = t.predict(tiny.rows(7, seed=4))
    chosen, rejected = out.predictions.T
    assert out.metrics["test_rewards/chosen"] == pytest.approx(chosen.mean(), rel=1e-4)
    assert out.metrics["test_rewards/accuracies"] == pytest.approx((chosen > rejected).mean())
    t = trained(unpaired.trainer, tmp_path, per_device_eval_batch_size=7)
    out = t.predict(unpaired.rows(7, seed=4))
    good = out.predictions[out.label_ids == 1]
    assert out.metrics["test_rewards/chosen"] == pytest.approx(good.mean(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_drop_last": True},
        {"eval_accumulation_steps": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_could_lose_rows(tmp_path, kind, options):
    make, rows = kind
    t = trained(make, tmp_path, **options)
    plain = trained(make, tmp_path)
    close(t.predict(rows(5)).predictions, plain.predict(rows(5)).predictions)
    assert t.args.dataloader_drop_last == options.get("dataloader_drop_last", False)


def test_before_training_with_references_computed_ahead(tmp_path, kind):
    make, rows = kind
    t = make(tmp_path, per_device_eval_batch_size=2, precompute_ref_log_probs=True)
    assert np.abs(t.predict(rows(5)).predictions).max() < 1e-5


def test_rows_that_cannot_be_scored_are_nan(tmp_path, caplog):
    data = tiny.rows(6, seed=4)
    t = trained(trainer, tmp_path)
    plain = t.predict(data)
    data[1] = {**data[1], "rejected": data[1]["chosen"]}
    out = t.predict(data)
    assert "1 of 6 rows were dropped because chosen and rejected are identical" in caplog.text
    assert np.isnan(out.predictions[1]).all() and out.label_ids.tolist() == [0, -100, 0, 0, 0, 0]
    rest = [0, 2, 3, 4, 5]
    close(out.predictions[rest], plain.predictions[rest])
    assert math.isfinite(out.metrics["test_loss"])
    t = trained(unpaired.trainer, tmp_path, max_length=14)
    answers = unpaired.rows(5, seed=4)
    answers[4]["prompt"] = "w1 " * 14
    out = t.predict(answers)
    assert np.isnan(out.predictions).tolist() == [False] * 4 + [True]
    assert out.label_ids[4] == -100 and out.predictions.shape == (5,)


def test_own_evaluation_data_and_bad_sources(tmp_path):
    sets = {"a": tiny.rows(3, seed=1), "b": tiny.rows(2, seed=2)}
    t = trained(trainer, tmp_path, eval_dataset=sets)
    close(t.predict("b").predictions, t.predict(sets["b"]).predictions)
    close(t.predict(t.eval_dataset["b"]).predictions, t.predict(sets["b"]).predictions)
    with pytest.raises(ValueError, match="test_dataset is a dict of 2 data sets; expected one"):
        t.predict(sets)
    with pytest.raises(ValueError, match="column 'prompt' is missing|is missing"):
        t.predict([{"text": "w1"}])
    ahead = trained(trainer, tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="no reference model is kept"):
        ahead.predict(tiny.rows(2))


def test_compute_metrics_gets_rewards_of_rows(tmp_path, kind):
    make, rows = kind
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"best": float(prediction.predictions.max())}

    held_out = rows(5, seed=1)
    t = trained(
        make, tmp_path, compute_metrics=metrics, eval_dataset=held_out, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="best",
    )  # fmt: skip
    assert len(seen) == 2
    out = t.predict(held_out)
    close(seen[1].predictions, out.predictions)
    assert seen[1].label_ids.tolist() == out.label_ids.tolist()
    assert out.metrics["test_best"] == t.evaluate()["eval_best"]
    assert [h["eval_best"] for h in tiny.history(t, "eval_best")][1] == out.metrics["test_best"]
