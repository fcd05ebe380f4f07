"""Each known pitfall of preference training, planted, and which tool finds it.

check-data, verify and the alarms have tests of their own for clean data and healthy runs, which are
silent: tests/quality/test_check_data.py, test_verify.py and tests/trainer/test_alarms.py.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from alarm_runs import State, alarms, figures, look
from support import tiny
from test_check_data import clean, content
from test_check_data import found as by_name

from fastpref.data.collate import PreferenceCollator
from fastpref.quality import check_data, verify

pytestmark = pytest.mark.train


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def checked(rows, **options):
    return set(by_name(check_data(rows, tiny.tokenizer(), **options)))


def verified(data=None, model=None, **options):
    data = tiny.rows(16) if data is None else data
    options = {"rows": 16, "compared": 1, "max_length": 64, **options}
    model = tiny.model() if model is None else model
    return set(by_name(verify(model, data, tiny.tokenizer(), **options)))


def trained(tmp_path, caplog, **options):
    tiny.trainer(tmp_path, **options).train()
    return set(alarms(caplog))


def watched(caplog, loss_type="sigmoid", step=30, **sums):
    """The alarms of a run whose last 256 pairs have these sums."""
    return set(look(caplog, figures(**sums), State(step), loss_type))


# ---- what each of them needs ----


def every_row(rows, change):
    for row in rows:
        change(row)
    return rows


def longer(row):
    content(row, "chosen", lambda text: f"{text} {text}")


def no_end(change):
    out = tiny.tokenizer()
    out.chat_template = change(tiny.TEMPLATE)
    return out


def tool_calls():
    from datasets import Dataset

    def row(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        chosen = [{"role": "assistant", "content": "w1 w2", "tool_calls": [call]}]
        return {
            "prompt": [{"role": "user", "content": f"w3 w4 {name}"}],
            "chosen": chosen,
            "rejected": [{"role": "assistant", "content": "w7 w8", "tool_calls": []}],
        }

    return Dataset.from_list([row("w5", {"city": "w9"}), row("w6", {"day": "w10"})] * 4)


def mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    return model


def probabilities(model):
    """The model, whose backbone returns probabilities as router logits."""

    def soften(module, args, output):
        if getattr(output, "router_logits", None):
            output["router_logits"] = tuple(t.softmax(-1) for t in output.router_logits)
        return output

    model.model.register_forward_hook(soften)
    return model


def shifted(examples):
    batch = PreferenceCollator(0, 64)(examples)
    batch["labels"] = batch["labels"].roll(1, 1)
    batch["token_indices"] = (batch["labels"].flatten() != -100).nonzero().flatten()
    return batch


def other_first_token(examples):
    batch = PreferenceCollator(0, 64)(examples)
    batch["input_ids"][len(examples) :, 0] = 199
    return batch


def of_each_row(model):
    """The model, whose hidden states depend on a sequence's place in the batch."""

    def scale(module, args, output):
        states = output.last_hidden_state
        output.last_hidden_state = states * (1 + torch.arange(len(states)).view(-1, 1, 1) / 8)

    model.model.register_forward_hook(scale)
    return model


def other_question(row):
    row["chosen"] = [*row["prompt"], *row["chosen"]]
    row["rejected"] = [{"role": "user", "content": "w100 w101 w102"}, *row["rejected"]]
    row["prompt"] = [{"role": "system", "content": "w103 w104 w105"}]


# ---- the pitfalls ----


def test_1_likelihood_displacement(caplog):
    assert watched(caplog, chosen=-0.8, rejected=-1.2) == {"displacement"}


def test_2_length_exploitation(caplog):
    assert "length_bias" in checked(every_row(clean(), longer))
    assert watched(caplog, slope=0.1) == {"length"}


def test_3_reward_accuracy_that_is_no_ranking(caplog):
    assert watched(caplog, accuracy=0.9, ranked=0.2) == {"ranking"}
    # A model prefers what is rejected, in 13 of 16 pairs.
    assert verified(liked("rejected", 13), favouring(tiny.model(), LIKED)) == {"ranking"}


LIKED = 20  # a token that a model is made to favour


def liked(side, count):
    """16 pairs, in so many of which this side has the token that the model favours."""
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    rows = []
    for i in range(16):
        best, worse = (side, other) if i < count else (other, side)
        answers = {f"{best}_ids": [LIKED, 1], f"{worse}_ids": [50 + i, 1]}
        rows.append({"prompt_ids": [9 + i], **answers})
    return rows


def favouring(model, token):
    """The model with a bias towards one token."""
    bias = torch.zeros(model.config.vocab_size)
    bias[token] = 12.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def test_4_bf16_weights_that_do_not_move(tmp_path, caplog):
    options = {"learning_rate": 5e-7, "max_steps": 2}
    assert "unmoved" in trained(tmp_path, caplog, policy=tiny.model().bfloat16(), **options)


def test_5_an_adapter_whose_initialisation_changes_the_base():
    assert verified(peft_config=tiny.lora(init_lora_weights="pissa")) == {"adapter_off"}


def test_6_an_adapter_with_the_wrong_reference(tmp_path, caplog):
    from peft import get_peft_model

    def adapted():
        torch.manual_seed(1)
        return get_peft_model(tiny.model(), tiny.lora(init_lora_weights=False))

    # The base model's log-probs stand in the data, and the policy is an adapter on it.
    base = tiny.trainer(tmp_path / "base", precompute_ref_log_probs=True).train_dataset.to_list()
    names = ("ref_chosen_logps", "ref_rejected_logps")
    rows = [
        {**row, **{name: value[name] for name in names}}
        for row, value in zip(tiny.rows(), base, strict=True)
    ]
    assert "step_zero" in verified(rows, adapted())
    assert "step_zero" in trained(tmp_path, caplog, policy=adapted(), train=rows, max_steps=1)


def test_7_truncation_of_one_side():
    rows = clean()
    for i in range(0, 240, 20):
        content(rows[i], "chosen", lambda text: " ".join([text] * 12))
        content(rows[i + 1], "prompt", lambda _: " ".join(["w1"] * 60))
    assert {"truncated", "too_short"} <= checked(rows, max_length=64)


def test_8_ends_that_are_missing_or_doubled():
    missing = by_name(check_data(clean(), no_end(lambda t: t.replace(" </s>", ""))))
    assert "end_missing" in missing
    doubled = every_row(clean(), lambda row: content(row, "chosen", lambda text: f"{text} </s>"))
    assert "end_doubled" in checked(doubled)


def test_9_a_template_that_drops_a_turn_or_breaks_the_prefix():
    dropping = no_end(lambda t: "{% set messages = messages[-1:] %}" + t)
    assert "turn_dropped" in by_name(check_data(clean(), dropping))
    # The answer's first tokens are what a template adds and the model does not know.
    model = favouring(tiny.model(), 1)
    rows = [
        {"prompt_ids": [9], "chosen_ids": [20 + i, 30, 40] + [1] * 9, "rejected_ids": [21, 31]}
        for i in range(40, 56)
    ]
    for row in rows:
        row["rejected_ids"] = row["rejected_ids"] + [50] + [1] * 8
    assert "first_tokens" in verified(rows, model)


def test_9_a_prompt_whose_tokens_the_answer_joins():
    rows = [{"prompt": f"w{i} w1", "chosen": "3 w4", "rejected": "4 w5"} for i in range(20, 60)]
    assert "not_prefix" in checked(rows)
    spaced = [{**row, "prompt": f"{row['prompt']} w"} for row in rows]
    assert "not_prefix" in checked(spaced)
    for row in rows:
        row["chosen"], row["rejected"] = " w3 w4", " w4 w5"
    assert "not_prefix" not in checked(rows)


def test_10_answers_of_different_models():
    assert verified(liked("rejected", 16), favouring(tiny.model(), LIKED)) == {"off_policy"}
    assert verified(liked("chosen", 16), favouring(tiny.model(), LIKED)) == {"off_policy"}


def test_10_pairs_that_are_told_apart_by_a_word(caplog):
    certain = lambda row: content(row, "chosen", lambda text: f"{text} Certainly")  # noqa: E731
    assert "separable" in checked(every_row(clean(), certain))
    assert watched(caplog, accuracy=1.0, step=2) == {"saturated"}


def test_11_a_target_of_ipo_that_is_out_of_scale(caplog):
    small = {"chosen": 0.001, "rejected": 0.0, "noise": 0.001}
    assert watched(caplog, "ipo", **small) == {"target"}


def test_12_labels_and_prompts_that_are_not_aligned():
    assert "labels" in verified(data_collator=shifted)
    assert "prompts_differ" in verified(data_collator=other_first_token)
    assert "different_prompts" in checked(every_row(clean(), other_question))


def test_12_log_probs_that_are_not_those_of_the_answers():
    rows = tiny.rows(16)
    for row in rows:
        row["chosen"], row["rejected"] = f"w1 {row['chosen']}", f"w1 {row['rejected']}"
    assert verified(rows) == set()
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely
    assert "same_where_parting" in verified(rows, model)
    assert "differs_early" in verified(rows, of_each_row(tiny.model()))


def test_13_a_tied_head_that_an_adapter_copies():
    model = tiny.model(tie_word_embeddings=True)
    adapter = tiny.lora(modules_to_save=["lm_head"])
    assert "tied_head" in verified(model=model, peft_config=adapter)
    plain = tiny.model(tie_word_embeddings=False)
    assert "tied_head" not in verified(model=plain, peft_config=adapter)


def test_14_a_router_whose_logits_are_probabilities():
    assert verified(model=mixture()) == set()
    assert verified(model=probabilities(mixture())) == {"router"}


def test_15_a_question_in_a_column_that_nothing_reads():
    rows = [{"query_text": r["prompt"], **r} for r in tiny.rows(40)]
    for row in rows:
        row["prompt"] = ""
    assert {"empty_prompt", "unread_columns"} <= checked(rows)


def test_16_keys_of_tool_calls_that_arrow_has_merged():
    assert "merged_keys" in set(by_name(check_data(tool_calls())))


def test_17_a_margin_whose_sign_depends_on_batches(tmp_path):
    rows = tiny.rows(9)
    exact = tiny.trainer(tmp_path, train=rows, precompute_ref_log_probs=True).train_dataset

    def size(row):
        return max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    # The shortest row is a batch of its own, since the longest come first. Its log-ratios are 5
    # apart, and those of each other row -1.
    shortest = min(range(9), key=lambda i: size(exact[i]))
    for i, row in enumerate(rows):
        chosen, rejected = (5.0, 0.0) if i == shortest else (0.0, 1.0)
        row["ref_chosen_logps"] = exact[i]["ref_chosen_logps"] - chosen
        row["ref_rejected_logps"] = exact[i]["ref_rejected_logps"] - rejected
    assert "batch_means" in verified(rows, rows=9)
    del rows[shortest]
    assert "batch_means" not in verified(rows, rows=8)


def test_every_pitfall_has_a_test():
    numbers = {name.split("_")[1] for name in globals() if name.startswith("test_")}
    assert {str(i) for i in range(1, 18)} <= numbers
