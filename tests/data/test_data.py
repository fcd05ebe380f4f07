"""Reading, tokenising and batching preference data."""

import gzip
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("hypothesis")

import tiny  # noqa: E402
from datasets import Dataset, IterableDataset  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastpref.data import PreferenceCollator, extract_prompt, load_preference_data, prepare_dataset  # noqa: E402

ROWS = [
    {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"},
    {"prompt": "w6 ", "chosen": "w7", "rejected": "w8 w9 w10"},
]
CHAT = tiny.rows(3, chat=True)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    from datasets import disable_progress_bars

    disable_progress_bars()


def prepared(rows, tokenizer=None, **kwargs):
    dataset = load_preference_data(rows)
    return prepare_dataset(dataset, tokenizer or tiny.tokenizer(), **kwargs)


# ---- reading ----


def write(tmp_path, kind, rows):
    path = tmp_path / f"data.{kind}"
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        table = Dataset.from_list(
            [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows]
        )
        table.to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_every_file_format_reads_the_same(tmp_path, kind, rows):
    assert load_preference_data(write(tmp_path, kind, rows)).to_list() == rows


def test_json_lines_in_a_json_file(tmp_path):
    path = write(tmp_path, "jsonl", ROWS).rename(tmp_path / "lines.json")
    assert load_preference_data(str(path)).to_list() == ROWS


def test_saved_directory_and_ready_data_sets(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    assert load_preference_data(tmp_path / "saved").to_list() == ROWS
    assert load_preference_data(data) is data
    stream = data.to_iterable_dataset()
    assert load_preference_data(stream) is stream


def test_hub_name_is_loaded_by_datasets(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **kw: asked.append((name, kw)) or "loaded"
    )
    assert load_preference_data("someone/pairs", split="train[:3]") == "loaded"
    assert asked == [("someone/pairs", {"split": "train[:3]", "streaming": False})]


def test_tools_and_template_options_are_kept_as_they_are():
    rows = [dict(CHAT[0], tools=[{"a": 1}]), dict(CHAT[1], chat_template_kwargs={"deep": True})]
    data = load_preference_data(rows)
    assert json.loads(data[0]["tools"]) == [{"a": 1}] and data[1]["tools"] is None
    assert json.loads(data[1]["chat_template_kwargs"]) == {"deep": True}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("dir/gone/deep", None, "does not exist"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1', "line 3 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a JSON list; expected an object"),
        ("a.json", '[{"a": 1},\n oops]', "line 2 is not JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "[3]", "row 0 is a int; expected a dict"),
        ("a.csv", "prompt,chosen,rejected\na,b\n", "line 2 has 2 fields instead of the header's 3"),
        ("a.csv", "prompt,chosen,rejected\n", "has no rows"),
        ("a.parquet", "x", "is not a Parquet file"),
        ("a.jsonl.gz", "x", "is not a complete gzip file"),
        ("a.xlsx", "x", "has no known ending"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": [1]}\n', "row 1: prompt is a list but in row 0"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": null}\n',
            "row 1: prompt is missing; all",
        ),
        ("a.jsonl", '{"other": "a"}\n{"prompt": "a"}\n', "row 0: prompt is missing; all rows must"),
        (
            "a.csv",
            '{"prompt": "a", "chosen": "b"}\n',
            "line 1 is JSON; expected CSV",
        ),
        ("a.csv", '[{"prompt": 1}]', "line 1 is JSON; expected CSV"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_preference_data(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize(
    "start, message",
    [
        (b"PAR1\0\xf4", "is a Parquet file; expected a name that ends in .parquet"),
        (
            gzip.compress(b"{}", mtime=0),
            "is compressed with gzip; expected a name that ends in .gz",
        ),
        (b"PK\3\4\xff", "is a ZIP archive or a spreadsheet; expected text"),
        ("{}".encode("utf-16"), "line 1 is UTF-16 text; expected UTF-8"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says(tmp_path, ending, start, message):
    (tmp_path / f"a.{ending}").write_bytes(start)
    with pytest.raises(ValueError, match=message):
        load_preference_data(tmp_path / f"a.{ending}")


def test_not_utf8_and_wrong_types(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_preference_data(tmp_path / "a.jsonl")
    for bad in (3, {"prompt": []}):
        with pytest.raises(ValueError, match="expected a path"):
            load_preference_data(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a saved data set"):
        load_preference_data(tmp_path / "empty")


# ---- tokenising ----


def test_text_gets_eos_once():
    rows = [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3 </s>"}]
    data, report = prepared(rows)
    tok = tiny.tokenizer()
    assert tok.decode(data[0]["prompt_ids"]) == "w1"
    assert tok.decode(data[0]["chosen_ids"]) == "w2 </s>"
    assert tok.decode(data[0]["rejected_ids"]) == "w3 </s>"
    assert data.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]
    assert (report.rows, report.kept, report.warnings()) == (1, 1, [])


def test_chat_gets_no_eos_beyond_the_template():
    data, _ = prepared(CHAT)
    tok = tiny.tokenizer()
    row = data[0]
    text = CHAT[0]["prompt"][0]["content"]
    assert tok.decode(row["prompt_ids"]) == f"<user> {text} </s> <assistant>"
    assert tok.decode(row["chosen_ids"]) == CHAT[0]["chosen"][0]["content"] + " </s>"


def test_implicit_prompt_equals_explicit_prompt():
    explicit, _ = prepared(ROWS)
    implicit, _ = prepared(
        [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in ROWS]
    )
    assert [r["prompt_ids"] for r in implicit] == [r["prompt_ids"] for r in explicit]
    chat, _ = prepared(CHAT)
    both, _ = prepared(
        [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in CHAT]
    )
    assert both.to_list() == chat.to_list()


def test_extract_prompt_gives_a_space_to_the_answers():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert extract_prompt(row) == {
        "prompt": "The sky is", "chosen": " blue.", "rejected": " green."
    }  # fmt: skip
    assert extract_prompt({"chosen": "ab", "rejected": "abc"})["prompt"] == "a"
    assert extract_prompt({"chosen": "x ", "rejected": "y"})["prompt"] == ""


def test_split_where_the_tokens_diverge():
    # Alone the prompt ends in an assistant header that this template drops when an answer follows.
    template = tiny.TEMPLATE.replace("<assistant> ", "<system> ")
    data, report = prepared(CHAT, tiny.tokenizer())
    changed = tiny.tokenizer()
    changed.chat_template = template
    other, report = prepared(CHAT, changed)
    assert other[0]["prompt_ids"] == data[0]["prompt_ids"][:-1]
    assert other[0]["chosen_ids"][:1] == data[0]["prompt_ids"][-1:]
    assert report.not_prefix == 3 and "not a prefix" in report.warnings()[0]


def test_token_ids_are_taken_as_they_are_and_preparing_twice_changes_nothing():
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "weight": 2}]
    data, _ = prepare_dataset(load_preference_data(rows))
    assert data.to_list() == [{**rows[0], "weight": 2.0, "row": 0}]
    again, _ = prepare_dataset(data)
    assert again is data


def test_identical_and_long_rows_are_dropped_and_counted():
    long = {"prompt": "w1 " * 20, "chosen": "w2", "rejected": "w3"}
    cut = {"prompt": "w1 ", "chosen": "w2 " * 20, "rejected": "w3"}
    same = {"prompt": "w1 ", "chosen": "w2", "rejected": "w2"}
    data, report = prepared([same, ROWS[0], long, cut, same], max_length=10)
    assert data["row"][:] == [1, 3]
    assert (report.rows, report.kept) == (5, 2)
    assert (report.identical, report.too_long, report.truncated) == (2, 1, 1)
    first, second, third = report.warnings()
    assert "2 of 5 rows were dropped" in first and "(rows 0, 4)" in first
    assert "1 of 5 rows were dropped" in second and "max_length=10" in second
    assert "(rows 3)" in third
    kept, report = prepared([long], max_length=10, truncation_mode="keep_end")
    assert len(kept) == 1 and report.too_long == 0
    with pytest.raises(ValueError, match="none of 2 rows .* in 1 chosen and rejected"):
        prepared([same, long], max_length=10)
    with pytest.raises(ValueError, match="none of 1 rows"):
        prepared([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}])


def test_pairs_are_compared_as_they_are_trained_on():
    eos = {"prompt": "w1 ", "chosen": "w2", "rejected": "w2 </s>"}
    end = {"prompt": "w1 ", "chosen": "w2 " * 9 + "w3", "rejected": "w2 " * 9 + "w4"}
    data, report = prepared([eos, ROWS[0], end], max_length=8)
    assert data["row"][:] == [1] and report.identical == 2 and report.truncated == 0
    assert "identical once cut at max_length=8 tokens (rows 0, 2)" in report.warnings()[0]
    data, report = prepared([eos, end], max_length=None)
    assert data["row"][:] == [1] and "are identical (rows 0)" in report.warnings()[0]
    start = {"prompt": "w1 ", "chosen": "w3" + " w2" * 9, "rejected": "w4" + " w2" * 9}
    _, report = prepared([start, ROWS[0]], max_length=8, truncation_mode="keep_end")
    assert report.identical == 1


def test_rows_without_a_label_are_dropped_and_counted():
    rows = [
        {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]},
        {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": []},
    ]
    data, report = prepared(rows)
    assert data["row"][:] == [1] and report.unlabelled == 1
    assert "1 of 2 rows were dropped because no answer token" in report.warnings()[0]
    with pytest.raises(ValueError, match="in 1 no answer token follows another token"):
        prepared(rows[:1])


def test_token_ids_that_the_model_does_not_have():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [199]}]
    prepared(rows, vocab_size=200)
    with pytest.raises(ValueError, match="row 0: rejected_ids has the token id 199; .* 0 to 198"):
        prepared(rows, vocab_size=199)
    with pytest.raises(ValueError, match="row 0: prompt_ids has the token id -1; expected"):
        prepared([{**rows[0], "prompt_ids": [-1]}])
    with pytest.raises(ValueError, match="row 0: chosen_ids has the token id"):
        prepared(ROWS, vocab_size=9)


def test_streams_are_prepared_lazily_with_the_same_result():
    rows = [*ROWS, dict(ROWS[0], chosen="w5")]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    lazy, report = prepare_dataset(stream, tiny.tokenizer())
    assert isinstance(lazy, IterableDataset) and report.rows is None
    assert list(lazy) == prepared(rows)[0].to_list() and len(list(lazy)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "column 'rejected' is missing; found columns"),
        ([{"text": "a"}], "column 'chosen' is missing"),
        ([{"prompt_ids": [1], "chosen_ids": [1]}], "column 'rejected_ids' is missing"),
        ([dict(ROWS[0], image="x")], "has images"),
        ([dict(ROWS[0], ref_chosen_logps=1.0)], "ref_chosen_logps but not the other"),
        ([dict(ROWS[0], margin=1.0), dict(ROWS[0], margin=None)], "row 1: margin is None"),
        ([dict(ROWS[0], weight=float("nan"))], "row 0: weight is nan; expected a finite number"),
        ([dict(CHAT[0], prompt=3)], "row 0: prompt is a int; expected prompt, chosen and"),
        ([dict(CHAT[0], chosen="a")], "row 0: chosen is a str; expected prompt, chosen and"),
        ([{"prompt_ids": [1], "chosen_ids": ["x"], "rejected_ids": ["y"]}], "row 0: chosen_ids"),
        ([{"chosen": "a", "rejected": ["b"]}], "row 0: chosen is a str and rejected is a list"),
        ([{"chosen": "", "rejected": "b"}], "row 0: chosen or rejected is empty"),
    ],
)
def test_bad_rows_get_one_sentence(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        prepared(rows)
    assert "\n" not in str(error.value)


def test_a_missing_value_names_its_row():
    with pytest.raises(ValueError, match="row 1: chosen is missing"):
        prepare_dataset(
            Dataset.from_dict(
                {"prompt": ["a", "b"], "chosen": ["c", None], "rejected": ["d", "e"]}
            ),
            tiny.tokenizer(),
        )


def test_tokenizers_that_lack_something():
    tok = tiny.tokenizer()
    tok.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prepared(CHAT, tok)
    with pytest.raises(ValueError, match="no EOS token"):
        prepared(ROWS, tiny.tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        prepare_dataset(load_preference_data(ROWS))
    with pytest.raises(ValueError, match="truncation_mode is 'middle'"):
        prepared(ROWS, truncation_mode="middle")


# ---- batching ----

EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "row": 7},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11], "row": 9},
]


def test_batch_layout():
    batch = PreferenceCollator(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]
    ]  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4, 4]
    assert batch["completion_mask"].tolist() == [
        [0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]
    ]  # fmt: skip
    n = -100
    assert batch["labels"].tolist() == [
        [n, n, 4, 5, n], [n, 9, n, n, n], [n, n, 6, n, n], [n, 10, 11, n, n]
    ]  # fmt: skip
    assert batch["token_indices"].tolist() == [2, 3, 6, 12, 16, 17]
    assert batch["rows"].tolist() == [7, 9]


def test_truncation_padding_and_numbers():
    start = PreferenceCollator(0, max_length=3)(EXAMPLES)
    assert start["input_ids"].shape == (4, 3)
    assert start["labels"].tolist()[0] == [-100, -100, -100]  # its whole answer is cut away
    end = PreferenceCollator(0, max_length=2, truncation_mode="keep_end")(EXAMPLES)
    assert end["input_ids"].tolist()[0] == [4, 5]
    # The first token has no hidden state before it, so it has no label, but it is in the mask.
    assert end["labels"].tolist()[0] == [5, -100] and end["completion_mask"].tolist()[0] == [1, 1]
    numbers = {"weight": 2, "margin": 0.5, "ref_chosen_logps": -1, "ref_rejected_logps": -2}
    batch = PreferenceCollator(0, pad_to_multiple_of=8)([{**e, **numbers} for e in EXAMPLES])
    assert batch["input_ids"].shape == (4, 8)
    for key, value in numbers.items():
        assert batch[key].dtype == torch.float32 and batch[key].tolist() == [value, value]


def test_a_batch_without_any_answer_left():
    batch = PreferenceCollator(0, max_length=2)(EXAMPLES)
    assert batch["token_indices"].numel() == 0 and (batch["labels"] == -100).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*(st.lists(st.integers(3, 99), max_size=7) for _ in range(3))),
        min_size=1,
        max_size=4,
    ),
    st.one_of(st.none(), st.integers(2, 9)),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_labels_agree_with_the_completion_mask(rows, max_length, mode):
    examples = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), r, strict=True)) for r in rows
    ]
    batch = PreferenceCollator(0, max_length, mode)(examples)
    ids, mask = batch["input_ids"], batch["completion_mask"]
    expected = torch.full_like(ids, -100)
    expected[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    assert torch.equal(batch["labels"], expected)
    flat = expected.flatten()
    assert torch.equal(batch["token_indices"], (flat != -100).nonzero()[:, 0])
    assert torch.equal(flat[batch["token_indices"]], flat[flat != -100])
    assert max_length is None or ids.shape[1] <= max_length


def test_the_same_batches_as_trl():
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    for mode in ("keep_start", "keep_end"):
        for length in (None, 3, 4):
            mine = PreferenceCollator(0, length, mode)(EXAMPLES)
            theirs = DataCollatorForPreference(0, length, mode)(EXAMPLES)
            for key, value in theirs.items():
                assert torch.equal(mine[key], value)
