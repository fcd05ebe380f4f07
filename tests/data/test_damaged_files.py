"""Files that are damaged or malformed: one sentence that names the file and its line or row."""

import gzip
import json
import os
import stat

import pytest

pytest.importorskip("datasets")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import tiny  # noqa: E402
from datasets import Dataset, DatasetDict, load_from_disk  # noqa: E402

from fastpref.data import load_preference_data, prepare_dataset  # noqa: E402

ROW = {"prompt": "w1 ", "chosen": "w2 w3", "rejected": "w4"}
LINE = json.dumps(ROW).encode() + b"\n"
HEADER = b"prompt,chosen,rejected\n"

MALFORMED = {
    "utf8.jsonl": (LINE * 2 + b'{"prompt": "\xff"}\n' + LINE, "line 3 is not UTF-8.*byte 0xff at"),
    "utf8.json": (b'[\n{"prompt": "\xe9"}]', "line 2 is not UTF-8 text: byte 0xe9"),
    "utf8.csv": (HEADER + b"a,b,\xc3\x28\n", "line 2 is not UTF-8"),
    "deep.jsonl": (LINE + b"[" * 100_000 + b"]" * 100_000, "line 2 is nested too deeply"),
    "deep.json": (b"[" * 100_000, "line 1 is nested too deeply"),
    "huge.jsonl": (LINE + b'{"prompt": ' + b"9" * 5000 + b"}", "line 2 has a number that cannot"),
    "cut.jsonl": (LINE + LINE[:20], "line 2 is not JSON"),
    "null.jsonl": (LINE + b"null\n", "line 2 is a JSON NoneType; expected an object"),
    "zeros.jsonl": (LINE + b"\0" * 50, "line 2 is not JSON"),
    "cut.json": (b"[\n" + LINE + b",", "line 3 is not JSON"),
    "quote.csv": (HEADER + b'a,b,c\na,"b,c\na,b,c\n', "starts in line 3 has a quote that is never"),
    "quotes.csv": (HEADER + b'a,"b"x,c\n', "starts in line 2 is not CSV"),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", "has the column 'chosen' more than once"),
    "fields.csv": (HEADER + b"a,b\n", "line 2 has 2 fields instead of the header's 3"),
    "more.csv": (HEADER + b"a,b,c,d\n", "line 2 has 4 fields"),
    "header.csv": (HEADER, "has no rows"),
    "gz.jsonl.gz": (gzip.compress(LINE * 2000)[:200], "not a complete gzip.*after line"),
    "plain.jsonl.gz": (LINE, "not a complete gzip"),
    "magic.parquet": (b"PAR1" + b"\0" * 50, "is not a Parquet file"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name):
    contents, message = MALFORMED[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message) as error:
        load_preference_data(str(tmp_path / name))
    text = str(error.value)
    assert name in text and "\n" not in text and len(text) < 400


def test_a_flipped_byte_in_a_gzip_file(tmp_path):
    data = bytearray(gzip.compress(b"".join(
        json.dumps({**ROW, "prompt": f"w{i} {os.urandom(8).hex()}"}).encode() + b"\n"
        for i in range(3000)
    )))  # fmt: skip
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match="a.jsonl.gz.*line"):
        load_preference_data(str(tmp_path / "a.jsonl.gz"))


def table(n):
    columns = {k: [f"{v}{i} " + "x" * 50 for i in range(n)] for k, v in ROW.items()}
    return pa.table(columns)


def test_a_damaged_page_of_parquet_names_its_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(3000), path, row_group_size=1000, compression="snappy")
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[offset : offset + 400] = b"\xff" * 400
    path.write_bytes(data)
    with pytest.raises(ValueError, match="row group 1, rows 1000 to 1999, cannot be read"):
        load_preference_data(str(path))


def test_text_of_parquet_that_is_not_utf8_names_its_row(tmp_path):
    bad = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    pq.write_table(
        pa.table({"prompt": text, "chosen": text, "rejected": text}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="row 1: prompt is not UTF-8 text"):
        load_preference_data(str(tmp_path / "a.parquet"))


def test_a_cut_arrow_file_is_named(tmp_path):
    Dataset.from_list([ROW] * 2000).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="saved is a saved data set that cannot be read: "):
        load_preference_data(str(tmp_path / "saved"))


# ---- rows ----

ROWS = {
    "surrogate": ({"prompt": "\ud800"}, "row 1: prompt has the lone surrogate"),
    "tools": ({"tools": "[{"}, "row 1: tools is text that is not JSON"),
    "deep tools": ({"tools": "[" * 100_000}, "row 1: tools is JSON that cannot be read"),
    "tool text": ({"tools": '["a"]'}, r"row 1: tools\[0\] is text that is not JSON"),
    "tools that are no list": ({"tools": '{"a": 1}'}, "row 1: tools is a dict; expected a list"),
    "tools of numbers": ({"tools": "[3]"}, "row 1: tools has a int; expected JSON schemas"),
    "tools with a huge number": (
        {"tools": f'[{{"a": {"9" * 5000}}}]'},
        "row 1: tools is JSON that cannot be read",
    ),
    "template": (
        {"chat_template_kwargs": {"chat_template": "mine"}},
        "row 1: chat_template_kwargs has 'chat_template', which data must not set",
    ),
    "weight": ({"weight": -1.0}, "row 1: weight is -1.0; expected a number that is not negative"),
    "infinite": ({"weight": float("inf")}, "row 1: weight is inf; expected a finite number"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path, name):
    changes, message = ROWS[name]
    rows = [{**row, **dict.fromkeys(changes)} for row in tiny.rows(3, chat="tool" in str(changes))]
    for row in rows:
        if "weight" in row:
            row["weight"] = 1.0
    if "chat_template_kwargs" in changes:
        rows = [{**row, "chat_template_kwargs": None} for row in tiny.rows(3, chat=True)]
    if "prompt" in changes:
        rows = tiny.rows(3)
    rows[1].update(changes)
    with pytest.raises(ValueError, match=message):
        prepare_dataset(load_preference_data(rows), tiny.tokenizer(), max_length=64)


def deep():
    value = 1
    for _ in range(2000):
        value = {"a": value}
    return value


def user(content):
    return [{"role": "user", "content": content}]


VALUES = {
    "surrogate in a message": ({"prompt": user("a\ud800")}, "row 1 has the lone surrogate U.D800"),
    "surrogate in an answer": (
        {"chosen": [{"role": "assistant", "content": "\udfff"}]},
        "row 1 has the lone surrogate U.DFFF",
    ),
    "surrogate in a role": (
        {"prompt": [{"role": "\ud800", "content": "w1"}]},
        "row 1 has the lone",
    ),
    "deep message": ({"prompt": user(deep())}, "row 1: prompt is not JSON: maximum recursion"),
    "deep options": ({"chat_template_kwargs": deep()}, "row 1: chat_template_kwargs is not JSON"),
    "deep schemas": ({"tools": [deep()]}, "row 1: tools is not JSON: maximum recursion"),
    "bytes as tools": ({"tools": b"[{"}, "row 1: tools is not JSON"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_no_text_can_hold_is_named(name):
    changes, message = VALUES[name]
    rows = tiny.rows(3, chat=True)
    if not {"prompt", "chosen"} & set(changes):
        rows = [{**row, **dict.fromkeys(changes)} for row in rows]
    rows[1].update(changes)
    with pytest.raises(ValueError, match=message) as error:
        prepare_dataset(load_preference_data(rows), tiny.tokenizer(), max_length=64)
    assert "\n" not in str(error.value)


def test_a_surrogate_in_the_name_of_a_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**ROW, "more\ud800": "x"}) + "\n")
    message = r"a.jsonl: the column name 'more\\ud800' has the lone surrogate U\+D800"
    with pytest.raises(ValueError, match=message):
        load_preference_data(str(tmp_path / "a.jsonl"))


# ---- what is not written, and not kept ----


def test_nothing_is_written_beside_the_users_data(tmp_path):
    folder = tmp_path / "saved"
    Dataset.from_list(tiny.rows(8)).save_to_disk(str(folder))
    before = sorted(p.name for p in folder.iterdir())
    for path in (folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    for source in (str(folder), load_from_disk(str(folder))):
        data = load_preference_data(source).shuffle(seed=1)
        prepared, report = prepare_dataset(data, tiny.tokenizer(), max_length=64)
        assert report.kept == 8 and len(prepared) == 8
        parts = data.train_test_split(0.25, seed=0)
        assert len(parts["test"]) == 2
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_line_of_50_megabytes(tmp_path):
    import resource

    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + json.dumps({**ROW, "chosen": "w1 " * 16_700_000}).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = load_preference_data(str(path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(data) == 2 and len(data[1]["chosen"]) == 50_100_000
    assert grown * 1024 < 8 * path.stat().st_size


def test_repeated_columns_and_unknown_types_of_parquet(tmp_path):
    names = ["prompt", "prompt", "chosen", "rejected"]
    columns = [pa.array(["a"])] * 4
    pq.write_table(pa.table(columns, names=names), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="twice.parquet: has the column 'prompt' more than once"):
        load_preference_data(tmp_path / "twice.parquet")
    pairs = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    table = pa.table([*columns[:3], pairs], names=["prompt", "chosen", "rejected", "m"])
    pq.write_table(table, tmp_path / "map.parquet")
    with pytest.raises(ValueError, match=r"map.parquet: .*map<string, int64 \('m'\)>"):
        load_preference_data(tmp_path / "map.parquet")


def test_a_lone_surrogate_in_a_columns_name(tmp_path):
    path = tmp_path / "name.jsonl"
    path.write_text(json.dumps({**ROW, "\ud800": 1}))
    with pytest.raises(ValueError, match="name.jsonl: the column name .* lone surrogate U\\+D800"):
        load_preference_data(path)


def test_saved_data_that_lacks_a_split_or_a_file_or_has_a_flipped_byte(tmp_path):
    data = Dataset.from_list([ROW] * 2)
    DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"holds the splits \['test'\] and no 'train'"):
        load_preference_data(tmp_path / "splits")
    data.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"w2 w3", b"w2 \xff3"))
    with pytest.raises(ValueError, match="saved: row 0: chosen is not UTF-8 text"):
        load_preference_data(tmp_path / "saved")
    file.unlink()
    with pytest.raises(ValueError, match="saved data set that lacks a file.*arrow"):
        load_preference_data(tmp_path / "saved")


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_data_set_does_not_matter(form):
    data = tiny.data(4, chat=True)
    plain, _ = prepare_dataset(data, tiny.tokenizer(), max_length=64)
    formatted, _ = prepare_dataset(
        load_preference_data(data.with_format(form)), tiny.tokenizer(), max_length=64
    )
    assert formatted[:] == plain[:]
