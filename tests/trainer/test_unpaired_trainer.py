"""KTO and APO-zero on single answers: the data, and the same run as with TRL's KTOTrainer."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from datasets import Dataset  # noqa: E402
from parity import options  # noqa: E402
from tiny import history, lora, same  # noqa: E402

from fastpref import UnpairedPreferenceConfig, UnpairedPreferenceTrainer  # noqa: E402
from fastpref.data import load_preference_data  # noqa: E402
from fastpref.data.collate import UnpairedCollator  # noqa: E402
from fastpref.data.unpaired import prepare_unpaired_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def rows(n=24, **kwargs):
    """Answers, two of three desirable."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 != 0}
        for i, row in enumerate(tiny.rows(n, **kwargs))
    ]


def config(tmp_path, **kwargs):
    settings = {**options(tmp_path / "out", max_steps=4, per_device_train_batch_size=4), **kwargs}
    return UnpairedPreferenceConfig(**settings)


def trainer(tmp_path, model=None, train=None, **kwargs):
    own = ("ref_model", "eval_dataset", "callbacks", "peft_config", "compute_metrics")
    own = {key: kwargs.pop(key) for key in own if key in kwargs}
    return UnpairedPreferenceTrainer(
        model=tiny.model() if model is None else model,
        args=config(tmp_path, **kwargs),
        train_dataset=rows() if train is None else train,
        processing_class=tiny.tokenizer(),
        **own,
    )


# ---- data ----


def prepared(data, **kwargs):
    if isinstance(data, list):
        data = load_preference_data(data)
    dataset, report = prepare_unpaired_dataset(data, tiny.tokenizer(), **kwargs)
    return list(dataset), report


def test_answers_and_their_mismatches():
    first = [
        {"prompt": f"w{i} ", "completion": f"w{i}", "label": label}
        for i, label in enumerate([True, False, True, True, False])
    ]
    data, report = prepared(first, mismatch=2)
    eos = tiny.tokenizer().eos_token_id
    assert [row["completion_ids"] for row in data] == [[6 + i, eos] for i in range(5)]
    assert [row["KL_completion_ids"][0] - 6 for row in data] == [1, 0, 3, 2, 3]
    assert [row["label"] for row in data] == [True, False, True, True, False]
    assert [row["row"] for row in data] == list(range(5)) and report.kept == 5
    assert "KL_completion_ids" not in prepared(first)[0][0]
    batch = UnpairedCollator(0)(data[:2])
    assert batch["input_ids"].tolist() == [[6, 6, eos], [7, 7, eos]]
    assert batch["KL_input_ids"].tolist() == [[6, 7, eos], [7, 6, eos]]
    assert batch["labels"].tolist() == [[6, eos, -100], [7, eos, -100]]
    assert batch["label"].tolist() == [True, False] and batch["rows"].tolist() == [0, 1]
    assert batch["KL_token_indices"].tolist() == [0, 1, 3, 4]
    stream = load_preference_data(first).to_iterable_dataset()
    assert [{**row} for row in prepared(stream, mismatch=2)[0]] == data


MISMATCHES = {
    # prompts, block: the row whose answer each gets
    "other prompts": ("abcdefg", 3, [2, 0, 1, 5, 3, 4, 5]),
    "runs": ("aabbbcc", 4, [3, 3, 1, 1, 6, 4, 4]),
    "a block of one prompt": ("aaaabb", 2, [5, 5, 5, 5, 3, 3]),
    "a last block of one": ("abcda", 2, [1, 0, 3, 2, 3]),
    "the last block has the first prompt": ("abbba", 2, [1, 0, 0, 0, 3]),
    "one block": ("abab", 9, [3, 0, 1, 2]),
    "two rows": ("ab", 2, [1, 0]),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", MISMATCHES)
def test_the_mismatched_answer_is_to_another_prompt(case, stream):
    prompts, block, wanted = MISMATCHES[case]
    given = [
        {"prompt": f"w{ord(letter) - 96} ", "completion": f"w{100 + i}", "label": True}
        for i, letter in enumerate(prompts)
    ]
    data = load_preference_data(given)
    data, _ = prepared(data.to_iterable_dataset() if stream else data, mismatch=block)
    assert [row["KL_completion_ids"][0] - 106 for row in data] == wanted


def test_other_prompts_are_found_far_away(monkeypatch):
    """In chunks that have one prompt only, and memory for no more than a chunk."""
    from fastpref.data import unpaired as unpaired_data

    monkeypatch.setattr(unpaired_data, "CHUNK", 4)
    given = [
        {"prompt": f"w{prompt} ", "completion": f"w{100 + i}", "label": True}
        for i, prompt in enumerate([1, 1, 1, 1, 1, 2, 2, 2, 2])
    ]
    data, _ = prepared(given, mismatch=2)
    # No other prompt among the first four, and none around the last one.
    assert [row["KL_completion_ids"][0] - 106 for row in data] == [5, 5, 5, 5, 5, 4, 4, 4, 0]
    for rows in (given[:5], given[:1]):
        data = load_preference_data(rows)
        for source in (data, data.to_iterable_dataset()):
            with pytest.raises(ValueError, match=f"train data: got one prompt in {len(rows)} rows"):
                prepared(source, mismatch=2)
    monkeypatch.setattr(unpaired_data, "SEARCHED", 3)
    stream = load_preference_data(given).to_iterable_dataset()
    with pytest.raises(ValueError, match="train data: got one prompt in the first 3 rows"):
        prepared(stream, mismatch=2)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
def test_pairs_become_answers_in_trls_order(chat, implicit):
    trl = pytest.importorskip("trl.data_utils")
    pairs = tiny.rows(5, chat=chat)
    if implicit:
        pairs = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in pairs]
    given = Dataset.from_list(pairs)
    split = given.map(trl.extract_prompt) if implicit else given
    theirs = trl.unpair_preference_dataset(split)
    assert prepared(given)[0] == prepared(theirs)[0]
    assert [row["label"] for row in prepared(given)[0]] == [True] * 5 + [False] * 5


def test_token_ids_weights_and_files(tmp_path):
    ids = [{"prompt_ids": [5], "completion_ids": [6 + i], "label": i} for i in range(2)]
    data, _ = prepared(ids)
    assert [row["label"] for row in data] == [False, True]
    pair = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "weight": 0.5}]
    data, _ = prepared(pair)
    assert [row["completion_ids"] for row in data] == [[6], [7]]
    assert [row["weight"] for row in data] == [0.5, 0.5]
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion,label\nw1 ,w2,True\nw1 ,[w3],0\n")
    data, _ = prepared(load_preference_data(path))
    assert [row["label"] for row in data] == [True, False]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "w1", "completion": "w2"}, "column 'label' is missing.*label .true or false"),
        ({"completion": "w2", "label": True}, "column 'prompt' is missing"),
        ({"prompt": "w1", "label": True}, "column 'completion' is missing"),
        ({"prompt": "w1", "completion": "w2", "label": "yes"}, "row 0: label is 'yes'; expected t"),
        ({"prompt": "w1", "completion": "w2", "label": 0.5}, "row 0: label is 0.5"),
        ({"prompt": "w1", "completion": "w2", "label": None}, "row 0: label is None"),
        ({"prompt": "w1", "completion": [], "label": True}, "prompt is a str; expected prompt and"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w3", "margin": 1.0}, "'margin' is of pairs"),
        ({"prompt": "w1", "completion": "w2", "label": True, "margin": 1.0}, "'margin' is of pai"),
        (
            {"prompt": "w1 w2 w3 ", "completion": "w2", "label": True},
            "none of 1 rows can be used",
        ),
    ],
)
def test_bad_data(row, message):
    with pytest.raises(ValueError, match=message):
        prepared([row], max_length=3)


# ---- training ----


def test_defaults_are_trls_and_bad_options_raise(tmp_path):
    args = UnpairedPreferenceConfig(output_dir=str(tmp_path))
    assert (args.learning_rate, args.beta, args.loss_type) == (1e-6, 0.1, "kto")
    assert args.desirable_weight == args.undesirable_weight == 1.0 and args.max_length == 1024
    for changed, message in (
        ({"loss_type": "sigmoid"}, "loss_type: got 'sigmoid', expected one of kto"),
        ({"desirable_weight": -1.0}, "desirable_weight: got -1.0"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **changed)
    with pytest.raises(ValueError, match="got one prompt in 1 rows with loss_type 'kto'"):
        trainer(tmp_path, train=rows(1))
    with pytest.raises(ValueError, match="expected an instance of UnpairedP"):
        UnpairedPreferenceTrainer(tiny.model(), args=tiny.config(tmp_path), train_dataset=rows())
    with pytest.raises(ValueError, match="column 'chosen' is missing"):
        tiny.trainer(tmp_path, train=rows())


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_every_kind_of_reference_gives_the_same_run(tmp_path, loss):
    runs = []
    for kwargs in ({}, {"ref_model": tiny.model()}, {"precompute_ref_log_probs": True}):
        t = trainer(tmp_path, loss_type=loss, seed=3, **kwargs)
        t.train()
        runs.append(history(t))
    keys = ("loss", "grad_norm", "kl")
    same(runs[0], runs[1], keys)
    same(runs[0], runs[2], keys)
    assert runs[0][0]["loss"] == pytest.approx(0.5)
    assert runs[0][0]["rewards/chosen"] == runs[0][0]["kl"] == 0
    assert (max(h["kl"] for h in runs[0]) > 0) == (loss == "kto")


def test_training_prefers_the_desirable_answers(tmp_path):
    t = trainer(tmp_path, train=rows(8), max_steps=20, learning_rate=3e-3, bf16=True)
    t.train()
    logs = history(t)
    assert logs[-1]["rewards/margins"] > 0.1 and logs[-1]["loss"] < logs[0]["loss"]


def test_a_weight_for_each_answer(tmp_path):
    runs = []
    for weight in (1.0, 2.0):
        data = [{**row, "weight": weight} for row in rows()]
        t = trainer(tmp_path, train=data, max_steps=1, max_grad_norm=0)
        t.train()
        runs.append(history(t)[0])
    for key in ("loss", "grad_norm"):
        assert runs[1][key] == pytest.approx(2 * runs[0][key], rel=1e-5)


def test_batches_of_one_kind_count_where_they_have_something(tmp_path):
    """The mean of a metric is over the batches that have answers of its kind."""
    data = [{**row, "label": i < 6} for i, row in enumerate(rows(12))]
    t = trainer(tmp_path, train=data, max_steps=3, logging_steps=3, learning_rate=0.0)
    t.train()
    (logged,) = history(t)
    single = trainer(tmp_path, train=data, max_steps=3, learning_rate=0.0)
    single.train()
    logs = history(single)
    assert ["logps/chosen" in h for h in logs] == [True, True, False]
    assert ["rewards/margins" in h for h in logs] == [False, True, False]
    for key in ("logps/chosen", "logps/rejected", "logits/rejected", "entropy"):
        values = [h[key] for h in logs if key in h]
        assert logged[key] == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_streams_new_data_and_resuming(tmp_path):
    stream = Dataset.from_list(tiny.rows(8)).to_iterable_dataset()
    t = trainer(tmp_path / "a", train=stream, max_steps=2)
    t.train()
    assert history(t)[0]["loss"] == pytest.approx(0.5)

    def start():
        return trainer(
            tmp_path / "b", precompute_ref_log_probs=True, peft_config=lora(), max_steps=4,
            save_strategy="steps", save_steps=2, eval_dataset={"a": rows(5, seed=2)},
        )  # fmt: skip

    whole = start()
    assert whole.evaluate()["eval_a_loss"] == pytest.approx(0.5)
    whole.train()
    assert whole.evaluate(rows(6, seed=4))["eval_loss"] != pytest.approx(0.5)
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-2"))
    same(history(whole), history(resumed), ("loss", "grad_norm", "kl", "num_tokens"), tol=1e-6)


def test_mixture_of_experts_adds_its_balancing_loss(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

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
    assert first["loss"] == pytest.approx(0.5 + 0.5 * first["aux_loss"], rel=1e-5)


# ---- TRL ----

CASES = {
    "kto": {},
    "kto weights": {"desirable_weight": 1.3, "undesirable_weight": 0.4, "beta": 0.3},
    "kto lora": {"peft": True},
    "kto pairs": {"data": "pairs"},
    "kto chat, cut": {"data": "chat", "max_length": 14},
    "kto precomputed": {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2},
    "kto evaluated": {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2},
    "apo": {"loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("name", CASES)
def test_trajectory_equals_trl(name, tmp_path):
    trl = pytest.importorskip("trl")
    case = dict(CASES[name])
    peft, data = case.pop("peft", False), case.pop("data", "answers")
    path = str(tmp_path / "model")
    tiny.model().save_pretrained(path)
    settings = options(
        tmp_path / "out",
        **{"max_steps": 12, "per_device_train_batch_size": 4, "max_length": None,
           "train_sampling_strategy": "sequential", **case},
    )  # fmt: skip
    made = {
        "answers": lambda: rows(26),  # the last batch has two
        "pairs": lambda: tiny.rows(20),
        "chat": lambda: [
            {"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
            for i, r in enumerate(tiny.rows(23, chat=True))  # of which 20 are kept
        ],
    }
    logs = []
    for trainer_class, config_class in (
        (trl.KTOTrainer, trl.KTOConfig),
        (UnpairedPreferenceTrainer, UnpairedPreferenceConfig),
    ):
        t = trainer_class(
            model=path,
            args=config_class(**settings),
            train_dataset=Dataset.from_list(made[data]()),
            eval_dataset=Dataset.from_list(rows(7, seed=9)) if "eval_steps" in case else None,
            processing_class=tiny.tokenizer(),
            peft_config=lora() if peft else None,
        )
        t.train()
        logs.append([h for h in t.state.log_history if "loss" in h or "eval_loss" in h])
    theirs, ours = logs
    assert len(ours) == len(theirs)
    compared = 0
    for mine, his in zip(ours, theirs, strict=True):
        unstable = ("runtime", "per_second", "epoch", "preparation")
        keys = [key for key in his if not any(word in key for word in unstable)]
        assert {key for key in keys if key not in mine} == set()
        assert not {key for key in mine if "/" in key and key not in his}
        for key in keys:
            # Rewards and the KL are differences of sums of about 100 nats, held to 1e-5.
            near = 1e-5 if "rewards" in key else 1e-4 if key.endswith("kl") else 1e-6
            assert math.isclose(mine[key], his[key], rel_tol=1e-4, abs_tol=near), (
                key, his["step"], mine[key], his[key],
            )  # fmt: skip
            compared += 1
    assert compared >= 8 * len(ours)
    if settings["logging_steps"] == 1 and "precomputed" not in name:
        assert ours[0].get("rewards/chosen", 0) == ours[0]["kl"] == 0
    if "kto" in name:
        assert max(h.get("kl", 0) for h in ours) > 1e-3
