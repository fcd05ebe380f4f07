"""How rows become tokens: free-form dicts and errors."""

import json
from datetime import date

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from chat_texts import CHATML, SHOWN, call, says, user, words  # noqa: E402
from datasets import Dataset, IterableDataset  # noqa: E402

from fastpref.data import load_preference_data, prepare_dataset  # noqa: E402
from fastpref.data.free_form import FreeForm  # noqa: E402
from fastpref.data.unpaired import prepare_unpaired_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


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
