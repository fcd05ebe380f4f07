"""Where the prompt is: in columns of other names, beside a system prompt, inside the answers."""

import json

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from datasets import Dataset, IterableDataset  # noqa: E402

from fastpref.data import load_preference_data, prepare_dataset  # noqa: E402
from fastpref.data.unpaired import prepare_unpaired_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def message(role, content):
    return {"role": role, "content": content}


def chat(question, answer, system=None):
    start = [message("system", system)] if system else []
    return [*start, message("user", question), message("assistant", answer)]


def text(row, key="chosen"):
    tokenizer = tiny.tokenizer()
    return tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row[f"{key}_ids"])


def as_pairs(rows, kind):
    data = load_preference_data(rows)
    if kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "generator":
        data = IterableDataset.from_generator(lambda: iter(rows))
    out, report = prepare_dataset(data, tiny.tokenizer())
    return list(out), report


TEXT = ("w1 w2", "w3 </s>", "w4 </s>")
CHAT = ("<user> w1 w2 </s> <assistant>", "w3 </s>", "w4 </s>")
SYSTEM = ("<system> w9 </s> " + CHAT[0], *CHAT[1:])
ANSWERS = {"chosen": "w3", "rejected": "w4"}
TURNS = {key: [message("assistant", value)] for key, value in ANSWERS.items()}
WHOLE = {key: chat("w1 w2", value) for key, value in ANSWERS.items()}
BOTH = {key: chat("w1 w2", value, "w9") for key, value in ANSWERS.items()}
ASKED = [message("user", "w1 w2")]
LAYOUTS = {
    "question": ({"question": "w1 w2 ", **ANSWERS}, TEXT),
    "query": ({"query": "w1 w2 ", **ANSWERS}, TEXT),
    "instruction": ({"instruction": "w1 w2 ", **ANSWERS}, TEXT),
    "instruction, input": ({"instruction": "w1", "input": "w2 ", **ANSWERS}, TEXT),
    "instruction, no input": ({"instruction": "w1 w2 ", "input": "", **ANSWERS}, TEXT),
    "input": ({"input": "w1 w2 ", **ANSWERS}, TEXT),
    "system, question": ({"system": "w9", "question": "w1 w2", **ANSWERS}, SYSTEM),
    "system, prompt": ({"system_prompt": "w9", "prompt": "w1 w2", **ANSWERS}, SYSTEM),
    "no system, question": ({"system": "", "question": "w1 w2", **ANSWERS}, CHAT),
    "system, messages": ({"system": "w9", "prompt": ASKED, **TURNS}, SYSTEM),
    "system, whole answers": ({"system": "w9", **WHOLE}, SYSTEM),
    "system twice": ({"system": "w9", **BOTH}, SYSTEM),
    "text, messages": ({"prompt": "w1 w2", **TURNS}, CHAT),
    "messages, text": ({"prompt": ASKED, **ANSWERS}, CHAT),
    "single messages": (
        {"prompt": ASKED[0], **{key: turn[0] for key, turn in TURNS.items()}},
        CHAT,
    ),
    "text in the answers": (
        {"prompt": "w1 w2 ", "chosen": "w1 w2 w3", "rejected": "w1 w2 w4"},
        TEXT,
    ),
    "UltraFeedback": ({"prompt": "w1 w2", "prompt_id": "a", "score_chosen": 7, **WHOLE}, CHAT),
    "text, with a system prompt": ({"prompt": "w1 w2", **BOTH}, SYSTEM),
    "messages in the answers": ({"prompt": ASKED, **WHOLE}, CHAT),
    "system in the answers alone": ({"prompt": ASKED, **BOTH}, SYSTEM),
    "system in the prompt alone": ({"prompt": [message("system", "w9"), *ASKED], **WHOLE}, SYSTEM),
    "a column beside whole answers": ({"input": "a note", **WHOLE}, CHAT),
}


@pytest.mark.parametrize("kind", ["rows", "stream", "generator"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_tokens(layout, kind):
    row, expected = LAYOUTS[layout]
    (got, _), report = as_pairs([row, row], kind)
    assert (*text(got), text(got, "rejected")[1]) == expected
    unread = {
        "UltraFeedback": ("prompt_id", "score_chosen"),
        "a column beside whole answers": ("input",),
    }
    assert report.unread == unread.get(layout, ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_pairs_that_become_single_answers(layout):
    row, expected = LAYOUTS[layout]
    data = prepare_unpaired_dataset(load_preference_data([row]), tiny.tokenizer())[0]
    chosen, rejected = data
    assert text(chosen, "completion") == expected[:2] and chosen["label"]
    assert text(rejected, "completion") == expected[::2] and not rejected["label"]


SINGLE = {
    "question": ({"question": "w1 w2 ", "completion": "w3"}, TEXT),
    "system": ({"system": "w9", "instruction": "w1", "input": "w2", "completion": "w3"}, SYSTEM),
    "text, messages": ({"prompt": "w1 w2", "completion": TURNS["chosen"]}, CHAT),
    "messages, text": ({"prompt": ASKED, "completion": "w3"}, CHAT),
    "text in the answer": ({"prompt": "w1 w2 ", "completion": "w1 w2 w3"}, TEXT),
    "text in the conversation": ({"prompt": "w1 w2", "completion": BOTH["chosen"]}, SYSTEM),
    "messages in the answer": ({"prompt": ASKED, "completion": WHOLE["chosen"]}, CHAT),
}


@pytest.mark.parametrize("layout", SINGLE)
def test_layouts_of_single_answers(layout):
    row, expected = SINGLE[layout]
    data = load_preference_data([{**row, "label": True}] * 2)
    got, report = prepare_unpaired_dataset(data, tiny.tokenizer())
    assert text(got[1], "completion") == expected[:2] and report.unread == ()


def test_files_are_read_alike(tmp_path):
    row, expected = LAYOUTS["system, question"]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (got,), _ = as_pairs(path, "rows")
    assert text(got) == expected[:2]
    path = tmp_path / "d.csv"
    path.write_text("system,question,chosen,rejected\nw9,w1 w2,w3,w4\n,w1 w2,w3,w4\n")
    (first, second), _ = as_pairs(path, "rows")
    assert text(first) == expected[:2] and text(second) == CHAT[:2]


def test_answers_that_happen_to_start_with_the_prompt_stay_whole():
    rows = [
        {"prompt": "w1 ", "chosen": "w1 w3", "rejected": "w1 w4"},
        {"prompt": "w2 ", "chosen": "w5", "rejected": "w6"},
    ]
    (first, _), _ = as_pairs(rows, "rows")
    assert text(first) == ("w1", "w1 w3 </s>")
    # A user who says the same twice is no repetition of the prompt.
    again = [message("assistant", "w5"), *ASKED]
    row = {"prompt": ASKED, **{k: [*again, *turn] for k, turn in TURNS.items()}}
    (got,), _ = as_pairs([row], "rows")
    assert text(got) == (CHAT[0], "w5 </s> <user> w1 w2 </s> <assistant> w3 </s>")


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [{"topic": "w1", "chosen": "w2", "rejected": "w3"}],
            "all of 1 rows have an empty prompt, since there is no column 'prompt', and chosen and "
            "rejected do not start with the same text; not read: 'topic'; rename the column with",
        ),
        (
            [{"prompt": " ", "context": "w1", "chosen": "w2", "rejected": "w3"}],
            "all of 1 rows have an empty prompt, since the column 'prompt' is empty in all of "
            "them; not read: 'context'",
        ),
        ([{"prompt": [], **TURNS}], "all of 1 rows have an empty prompt|fails on an empty conv"),
        ([{"question": "a", "query": "b", **ANSWERS}], "any of the columns .'question', 'query'."),
        ([{"system": "a", **ANSWERS}], "the column 'system' but no prompt; found columns"),
        (
            [{"system": 3, "prompt": "a", **ANSWERS}],
            "row 0: the system prompt is a int; expect",
        ),
        (
            [{"system": "a", "prompt": [3], **ANSWERS}],
            "row 0: the prompt is a list; expected a string or a list of messages",
        ),
        (
            [{"conversations": ASKED, **TURNS}],
            "all of 1 rows have an empty prompt, .* not read: 'conversations'; rename the column",
        ),
        ([{"system": "", "system_prompt": "a", "prompt": "a", **ANSWERS}], "expected one system"),
        ([{"prompt": "w7", **WHOLE}], "row 0: prompt is text that is none of the user's messages"),
        (
            [{"prompt": [{"from": "human", "value": "w1"}], **TURNS}],
            "row 0: prompt has messages with 'from' and 'value'; expected 'role'",
        ),
        (
            [{"prompt": ASKED, **TURNS, "chosen": {"from": "gpt", "value": "w1"}}],
            "row 0: chosen has messages with 'from' and 'value'",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["rows", "generator"])
def test_prompts_that_would_be_lost_are_errors(rows, error, kind):
    with pytest.raises(ValueError, match=error) as raised:
        as_pairs(rows, kind)
    assert "\n" not in str(raised.value)


def test_a_system_column_without_a_chat_template_is_named():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    rows = [{"system": "w9", "question": "w1", **ANSWERS}]
    with pytest.raises(ValueError, match="train data has the system column 'system', which makes"):
        prepare_dataset(load_preference_data(rows), tokenizer)


def test_one_empty_prompt_among_others_is_data():
    rows = [{"prompt": "", **ANSWERS}, {"prompt": "w1 ", **ANSWERS}]
    out, report = as_pairs(rows, "rows")
    assert len(out) == 2 and report.warnings() == []
    ids = [{"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [7, 8]}]
    assert len(as_pairs(ids, "rows")[0]) == 1  # whoever gives token ids has decided


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_unread_columns_are_named_once(kind):
    rows = [{**row, "topic": "w1", "meta": {"a": i}} for i, row in enumerate(tiny.rows(3))]
    _, report = as_pairs(rows, kind)
    assert report.warnings() == ["train data: nothing reads the columns 'topic', 'meta'"]
    inside = [
        {"topic": "w1", **{k: row["prompt"] + row[k] for k in ("chosen", "rejected")}}
        for row in tiny.rows(3)
    ]
    said = as_pairs(inside, kind)[1].warnings()[0]
    assert said.endswith("'topic'; the prompt is the text that chosen and rejected start with")
    weighed = [{**row, "weight": 1.0, "margin": 0.0, "tools": None} for row in tiny.rows(3)]
    assert as_pairs(weighed, kind)[1].warnings() == []
    ids = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "prompt": "w1"}]
    assert as_pairs(ids, kind)[1].unread == ("prompt",)
    single = [{"prompt": "w1", "completion": "w2", "label": True, "ref_logps": 1.0}]
    data = load_preference_data(single)
    report = prepare_unpaired_dataset(data, tiny.tokenizer())[1]
    assert report.unread == ("ref_logps",)
    pairs = load_preference_data(rows)
    report = prepare_unpaired_dataset(pairs, tiny.tokenizer())[1]
    assert report.unread == ("topic", "meta")


def test_the_trainer_names_unread_columns(tmp_path, caplog):
    rows = [{**row, "topic": "w1"} for row in tiny.rows(4)]
    for train in (rows, Dataset.from_list(rows).to_iterable_dataset()):
        caplog.clear()
        tiny.trainer(tmp_path, train=train)
        said = [r.message for r in caplog.records if "nothing reads" in r.message]
        assert said == ["train data: nothing reads the columns 'topic'"]
