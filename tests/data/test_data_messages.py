"""How rows become tokens: free-form dicts, special tokens, begun turns, errors."""

import json
from datetime import date

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from datasets import Dataset, IterableDataset  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from fastpref.data import load_preference_data, prepare_dataset  # noqa: E402
from fastpref.data.free_form import FreeForm  # noqa: E402
from fastpref.data.unpaired import prepare_unpaired_dataset  # noqa: E402

SHOWN = (  # everything that a message holds, as JSON, so that a null too many would show
    "{% for m in messages %}<{{ m.role }}> {{ m | tojson }} {{ tools | tojson }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def words(template=SHOWN):
    """A tokenizer that keeps each character, so that texts can be read back."""
    from transformers import AutoTokenizer

    from fastpref.cli.demo import ASSETS

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    tokenizer.chat_template = template
    return tokenizer


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


TOOLS = [
    {
        "prompt": [user("weather")],
        "chosen": [call("weather", city="Rome", days=2)],
        "rejected": [call("weather", days="2", city="Rom")],
    },
    {
        "prompt": [user("sum"), call("add", a=1, b=None), {"role": "tool", "content": "3"}],
        "chosen": [call("add", a=1.5, b=[{"x": 1}, {"y": 0.1234567890123456}])],
        "rejected": [says("no")],
        "tools": [{"name": "add", "parameters": {"a": {"type": "number"}}}],
    },
    {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "chosen": [says("yes")],
        "rejected": [{"role": "assistant", "content": None}],
        "tools": [{"name": "sum", "parameters": {"big": 2**70}}],
    },
]


def rendered(row, key, tokenizer):
    return tokenizer.apply_chat_template(
        row["prompt"] + row[key], tools=row.get("tools"), tokenize=False
    )


def read(tmp_path, kind):
    if kind == "list":
        return load_preference_data(TOOLS)
    path = tmp_path / f"rows.{kind}"
    lines = [json.dumps(row) for row in TOOLS]
    path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    return load_preference_data(path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["list", "jsonl", "json"])
def test_free_form_dicts_stay_as_they_are(tmp_path, kind, stream):
    tokenizer, data = words(), read(tmp_path, kind)
    assert [data[i]["chosen"] for i in range(3)] == [row["chosen"] for row in TOOLS]
    pairs = prepare_dataset(data.to_iterable_dataset() if stream else data, tokenizer)[0]
    for row, got in zip(TOOLS, pairs, strict=True):
        for key in ("chosen", "rejected"):
            text = tokenizer.decode(got["prompt_ids"] + got[f"{key}_ids"])
            assert text == rendered(row, key, tokenizer), key
    answers = prepare_unpaired_dataset(data.to_iterable_dataset() if stream else data, tokenizer)[0]
    found = {tokenizer.decode(got["prompt_ids"] + got["completion_ids"]) for got in answers}
    assert found == {
        rendered(row, key, tokenizer) for row in TOOLS for key in ("chosen", "rejected")
    }


def test_single_answers_with_free_form_dicts():
    tokenizer = words()
    rows = [
        {"prompt": row["prompt"], "completion": row[key], "label": True, "tools": row.get("tools")}
        for row in TOOLS
        for key in ("chosen", "rejected")
    ]
    data, _ = prepare_unpaired_dataset(load_preference_data(rows), tokenizer)
    for row, got in zip(rows, data, strict=True):
        text = tokenizer.decode(got["prompt_ids"] + got["completion_ids"])
        assert text == rendered(row, "completion", tokenizer)


def test_splits_shuffles_and_copies_keep_them(tmp_path):
    data = load_preference_data(TOOLS)
    assert isinstance(data.features["chosen"], FreeForm)
    parts = data.train_test_split(2, seed=0)
    rows = [row["chosen"] for part in parts.values() for row in part]
    assert sorted(map(str, rows)) == sorted(str(row["chosen"]) for row in TOOLS)
    data.shuffle(seed=1).save_to_disk(tmp_path / "saved")
    rows = [row["chosen"] for row in load_preference_data(tmp_path / "saved")]
    assert sorted(map(str, rows)) == sorted(str(row["chosen"]) for row in TOOLS)
    in_processes, _ = prepare_dataset(data, words(), num_proc=2)
    assert in_processes.to_list() == prepare_dataset(data, words())[0].to_list()


def test_what_arrow_has_merged_is_taken_apart_and_said():
    """Rows that came through Arrow have null wherever another row has a key."""
    rows = [
        {"prompt": [user("q")], "chosen": [call("f", a="x")], "rejected": [call("f", b="y")]},
        {"prompt": [user("r")], "chosen": [call("g", b="z")], "rejected": [says("no")]},
    ]
    tokenizer = words()
    merged = Dataset.from_list(rows)
    assert merged[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]["b"] is None

    plain = IterableDataset.from_generator(lambda: iter(rows))
    through_arrow = merged.to_iterable_dataset().map(lambda row: row)
    assert through_arrow.features is None
    for data in (merged, through_arrow, plain, merged.to_iterable_dataset()):
        out, report = prepare_dataset(data, tokenizer)
        for row, got in zip(rows, out, strict=True):
            text = tokenizer.decode(got["prompt_ids"] + got["chosen_ids"])
            assert text == rendered(row, "chosen", tokenizer)
    report = prepare_dataset(merged, tokenizer)[1]
    assert "2 of 2 rows have nulls inside tool calls" in report.warnings()[0]
    assert prepare_dataset(load_preference_data(rows), tokenizer)[1].warnings() == []


def test_streams_of_rows_keep_their_own_nulls():
    rows = [
        {"prompt": [user("q")], "chosen": [call("f", a=None)], "rejected": [call("f", a=1)]},
        {"prompt": [user("r")], "chosen": [call("g", b="z")], "rejected": [says("no")]},
    ]
    tokenizer = words()
    plain = IterableDataset.from_generator(lambda: iter(rows))
    listed = load_preference_data(rows).to_iterable_dataset()
    for data in (plain, plain.map(lambda row: row), listed.map(lambda row: row)):
        for row, got in zip(rows, prepare_dataset(data, tokenizer)[0], strict=True):
            text = tokenizer.decode(got["prompt_ids"] + got["chosen_ids"])
            assert text == rendered(row, "chosen", tokenizer)


@pytest.mark.parametrize("first", [0, 1])
def test_streams_whose_rows_have_other_columns(first):
    rows = [TOOLS[0], TOOLS[1]][:: 1 - 2 * first]  # without tools, with tools
    data, tokenizer = IterableDataset.from_generator(lambda: iter(rows)), words()
    expected = [rendered(row, key, tokenizer) for key in ("chosen", "rejected") for row in rows]
    for row, got in zip(rows, prepare_dataset(data, tokenizer)[0], strict=True):
        text = tokenizer.decode(got["prompt_ids"] + got["chosen_ids"])
        assert text == rendered(row, "chosen", tokenizer)
    answers = prepare_unpaired_dataset(data, tokenizer)[0]
    found = [tokenizer.decode(got["prompt_ids"] + got["completion_ids"]) for got in answers]
    assert found == expected
    short = [tiny.rows(1)[0], {"prompt": "w1", "chosen": "w2"}][:: 1 - 2 * first]
    data = IterableDataset.from_generator(lambda: iter(short))
    with pytest.raises(ValueError, match=f"row {1 - first}: rejected is missing"):
        list(prepare_dataset(data, tokenizer)[0])


@pytest.mark.parametrize(
    ("one", "other"), [({"v": 1}, {"v": True}), ({"v": 1}, {"v": 1.0}), ({"a": 1, "b": 2},) * 2]
)
def test_values_that_python_calls_equal_are_not_identical(one, other):
    other = dict(reversed(other.items()))
    tokenizer, keys = words(), ("chosen", "rejected")
    single = {"prompt": [user("q")], "chosen": [call("f", **one)], "rejected": [call("f", **other)]}
    later = {"chosen": [user("q"), call("f", **one), user("r"), says("a")]}
    later["rejected"] = [user("q"), call("f", **other), user("r"), says("b")]
    for row in (single, later):
        (got,) = prepare_dataset(load_preference_data([row]), tokenizer)[0]
        for key in keys:
            text = tokenizer.decode(got["prompt_ids"] + got[f"{key}_ids"])
            assert text == rendered({"prompt": [], **row}, key, tokenizer)


def test_columns_that_json_cannot_hold_are_no_obstacle():
    rows = [{**row, "meta": {"at": date(2026, 1, i + 1)}} for i, row in enumerate(tiny.rows(2))]
    data = load_preference_data(rows)
    assert data[1]["meta"] == {"at": date(2026, 1, 2)}
    assert len(prepare_dataset(data, tiny.tokenizer())[0]) == 2


def test_an_empty_cell_of_tools_is_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('system,prompt,chosen,rejected,tools\n,a,b,c,\n,a,b,c,"[{""name"": ""f""}]"\n')
    template = "{{ 'with' if tools else 'without' }} " + CHATML
    data = load_preference_data(path)
    tokenizer = words(template)
    out = prepare_dataset(data, tokenizer)[0]
    starts = [tokenizer.decode(ids).split()[0] for ids in out["prompt_ids"][:]]
    assert starts == ["without", "with"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**TOOLS[0], "tools": [{"name": "\ud83d"}]}], "row 0 has the lone surrogate U.D83D"),
        ([{**TOOLS[0], "tools": "[{"}], "row 0: tools is text that is not JSON"),
        ([TOOLS[0], {**TOOLS[1], "tools": ['{"a"']}], r"row 1: tools\[0\] is text that is not"),
        ([{**TOOLS[0], "tools": '{"a": 1}'}], "row 0: tools is a dict; expected a list"),
        ([{**TOOLS[0], "tools": "[3]"}], "row 0: tools has a int; expected JSON schemas"),
        ([{**TOOLS[0], "chat_template_kwargs": "{"}], "row 0: chat_template_kwargs is text that"),
        ([{**TOOLS[0], "chat_template_kwargs": "[1]"}], "row 0: chat_template_kwargs is a list; "),
        ([TOOLS[0], {**TOOLS[0], "rejected": []}], "row 1: rejected is an empty conversation"),
        ([TOOLS[0], {**TOOLS[0], "prompt": []}], "row 1: the chat template fails on an empty conv"),
        (
            [TOOLS[0], {**TOOLS[0], "chosen": [says("cut \ud83d")]}],
            "row 1 has the lone surrogate U.D83D",
        ),
    ],
)
def test_errors_of_libraries_below_name_the_row_and_the_file(tmp_path, rows, message):
    template = "{{ messages[0].role }}" + SHOWN
    with pytest.raises(ValueError, match=f"^train data: {message}"):
        prepare_dataset(load_preference_data(rows), words(template))
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"^some.jsonl: train data: {message}"):
        prepare_dataset(load_preference_data(path), words(template))


def test_a_lone_surrogate_in_a_text_names_row_and_file(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    rows.append({**rows[0], "prompt": "cut \ud83d"})
    with pytest.raises(ValueError, match="data: row 1: prompt has the lone surrogate U.D83D"):
        load_preference_data(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="a.jsonl: row 1: prompt has the lone surrogate"):
        load_preference_data(tmp_path / "a.jsonl")
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="row 1 has the lone surrogate"):
        list(prepare_dataset(stream, words())[0])
    answers = [{"prompt": "a", "completion": "b \udc00", "label": True}]
    with pytest.raises(ValueError, match="row 0: completion has the lone surrogate U.DC00"):
        load_preference_data(answers)


def test_the_callers_own_row_numbers_are_named():
    rows = [{"prompt": [user("a")], "chosen": [], "rejected": [says("b")], "row": 17}]
    with pytest.raises(ValueError, match="row 17: chosen is an empty conversation"):
        prepare_dataset(load_preference_data(rows), words())
    pairs = [{**row, "row": 7 + i} for i, row in enumerate(tiny.rows(3))]
    data, _ = prepare_dataset(load_preference_data(pairs), tiny.tokenizer())
    assert data["row"][:] == [7, 8, 9]


# ---- special tokens that a text already holds ----

CHATML = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


def special(prefix, suffix="", **tokens):
    """A tokenizer that puts these special tokens around each text."""
    tokenizer = words(CHATML)
    names = [t for t in (prefix + " " + suffix).split()]
    tokenizer.add_special_tokens(tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, "<|im_end|>"]})
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(), special_tokens=pairs
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prefix", "suffix", "tokens"),
    [
        ("<s>", "", {"bos_token": "<s>", "eos_token": "<|im_end|>"}),
        ("<s>", "</s>", {"bos_token": "<s>", "eos_token": "</s>"}),
        ("[gMASK] <sop>", "", {"eos_token": "<|im_end|>"}),
        ("", "</s>", {"eos_token": "</s>"}),
        ("", "", {"eos_token": "<|end_of_text|>"}),
    ],
)
def test_rendered_text_is_tokenised_as_the_template_does(prefix, suffix, tokens):
    tokenizer = special(prefix, suffix, **tokens)
    if prefix == "[gMASK] <sop>":
        tokenizer.chat_template = "[gMASK]<sop>" + CHATML
    chat = {"prompt": [user("hi")], "chosen": [says("yes")], "rejected": [says("no")]}
    prompt = tokenizer.apply_chat_template(chat["prompt"], tokenize=False, add_generation_prompt=1)
    text = {"prompt": prompt}
    for key in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(chat["prompt"] + chat[key], tokenize=False)
        text[key] = whole.removeprefix(prompt)
    expected = prepare_dataset(load_preference_data([chat]), tokenizer)[0]
    got, report = prepare_dataset(load_preference_data([text]), tokenizer)
    assert got.to_list() == expected.to_list() and report.warnings() == []
    single = [{"prompt": prompt, "completion": text["chosen"], "label": True}]
    (row,) = prepare_unpaired_dataset(load_preference_data(single), tokenizer)[0]
    assert row["prompt_ids"] == expected[0]["prompt_ids"]
    assert row["completion_ids"] == expected[0]["chosen_ids"]


def test_plain_text_gets_its_special_tokens_once():
    apart = special("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    one = special("</s>", bos_token="</s>", eos_token="</s>")  # as GPT-2's
    for tokenizer in (apart, one):
        rows = [{"prompt": "a b", "chosen": " c", "rejected": " d</s>"}]
        (row,), report = prepare_dataset(load_preference_data(rows), tokenizer)
        start = tokenizer.bos_token + "a b"
        assert tokenizer.decode(row["prompt_ids"]) == start and report.warnings() == []
        assert tokenizer.decode(row["chosen_ids"]) == " c</s>"
        assert tokenizer.decode(row["rejected_ids"]) == " d</s>"


# ---- a prompt that ends with a begun turn ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_begun_turn_is_continued(stream):
    tokenizer = words(CHATML)
    prompt = [user("poem"), says("Roses are")]
    rows = [{"prompt": prompt, "chosen": [says(" red")], "rejected": [says(" tables"), user("?")]}]
    data = load_preference_data(rows * 2)
    data = data.to_iterable_dataset() if stream else data
    row = next(iter(prepare_dataset(data, tokenizer)[0]))
    assert tokenizer.decode(row["prompt_ids"]) == "user\npoem<|im_end|>\nassistant\nRoses are"
    assert tokenizer.decode(row["chosen_ids"]) == " red<|im_end|>\n"
    assert tokenizer.decode(row["rejected_ids"]) == " tables<|im_end|>\nuser\n?<|im_end|>\n"
    answers = next(iter(prepare_unpaired_dataset(data, tokenizer)[0]))
    assert answers["prompt_ids"] == row["prompt_ids"]
    assert answers["completion_ids"] == row["chosen_ids"]


def test_begun_turns_of_other_forms():
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = words(template)

    def tokens(prompt, chosen):
        rows = [{"prompt": prompt, "chosen": [chosen], "rejected": [says("Z")]}]
        (row,) = prepare_dataset(load_preference_data(rows), tokenizer)[0]
        return tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["chosen_ids"])

    parts = [{"type": "text", "text": "A"}]
    spaced = [{"type": "text", "text": " B"}]
    assert tokens([user("q"), says(parts)], says(spaced)) == ("<user>q</s><assistant>A", " B</s>")
    assert tokens([user("q"), says(parts)], says("B")) == ("<user>q</s><assistant>A", "B</s>")
    assert tokens([user("q"), says("A")], says(parts)) == ("<user>q</s><assistant>A", "A</s>")
    assert tokens([user("q"), says("")], says("B")) == ("<user>q</s><assistant>", "B</s>")
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert tokens([user("q"), thought], says("B")) == ("<user>q</s><assistant>[hm", "]B</s>")


THINKING = (  # thoughts in a text are put in a form of their own, and left out of earlier turns
    "{% for m in messages %}<{{ m.role }}>{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>"
    "{{ parts[0].replace('<think>', '').strip() if parts[1:] }}</think>{% endif %}"
    "{{ parts[-1].strip() }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "begun", "answer", "expected"),
    [
        (THINKING, says("<think>\nhm"), " so\n</think>\nB", ("<think>hm", " so</think>B</s>")),
        (THINKING, says("<think>hm</think>A"), "B", ("<think>hm</think>A", "B</s>")),
        (THINKING, says("A"), "B", ("<think></think>A", "B</s>")),
        # Where the template has no thoughts, nothing of the turn is there yet.
        (CHATML, {**says(""), "reasoning_content": "hm"}, "B", ("\n", "B<|im_end|>\n")),
        (CHATML, {**says("A"), "reasoning_content": "hm"}, "B", ("\nA", "B<|im_end|>\n")),
    ],
)
def test_begun_turns_of_thinking_models(template, begun, answer, expected):
    tokenizer = words(template)
    pair = {
        "prompt": [user("q"), begun],
        "chosen": [says(answer)],
        "rejected": [says(answer + "Z")],
    }
    (row,), report = prepare_dataset(load_preference_data([pair]), tokenizer)
    start, end = tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["chosen_ids"])
    assert start.rpartition("assistant")[2].removeprefix(">") == expected[0]
    assert end == expected[1] and report.warnings() == []
    # The answer goes on after the turn, so that it is an earlier one.
    pair["chosen"] = [says(answer), user("r"), says("C")]
    single = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}]
    (row,) = prepare_unpaired_dataset(load_preference_data(single), tokenizer)[0]
    joined = {**begun, "content": begun["content"] + answer}
    whole = [user("q"), joined, *pair["chosen"][1:]]
    text = tokenizer.decode(row["prompt_ids"] + row["completion_ids"])
    assert text == tokenizer.apply_chat_template(whole, tokenize=False)


def test_turns_that_are_not_begun():
    tokenizer = words(CHATML)

    def prompt_of(prompt, first):
        rows = [{"prompt": prompt, "chosen": [first, says("a")], "rejected": [first, says("b")]}]
        (row,) = prepare_dataset(load_preference_data(rows), tokenizer)[0]
        return tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["chosen_ids"])

    # The answers go on with the user or a tool: the assistant's turn before them is complete.
    before, after = prompt_of([user("q"), says("A")], user("r"))
    assert before.endswith("assistant\nA<|im_end|>\n") and after.startswith("user\nr<|im_end|>")
    done = {**call("f"), "content": "calling"}
    before, after = prompt_of([user("q"), done], says("r"))
    assert before.endswith("calling<|im_end|>\nassistant\n") and after.startswith("r<|im_end|>")
