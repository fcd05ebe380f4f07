"""check_data finds each planted fault in clean data, with its rows, and nothing in clean data."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from support import tiny

from fastpref.quality import check_data, write_fixed
from fastpref.quality.fix import fixed_path
from fastpref.quality.near import Sketches

ROWS = 240
PLANTED = [7, 100, 203]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def clean(seed=0, rows=ROWS):
    """Conversations whose answers have the same words and lengths on both sides."""
    draw = random.Random(seed)

    def words(n):
        return " ".join(draw.choice(tiny.WORDS) for _ in range(n))

    def answer():
        return [{"role": "assistant", "content": words(draw.randint(8, 20))}]

    return [
        {
            "prompt": [{"role": "user", "content": words(draw.randint(6, 12))}],
            "chosen": answer(),
            "rejected": answer(),
        }
        for _ in range(rows)
    ]


def as_text(rows):
    keys = ("prompt", "chosen", "rejected")
    return [{key: " " + row[key][0]["content"] for key in keys} for row in rows]


def content(row, key, change):
    row[key] = [{**row[key][0], "content": change(row[key][0]["content"])}]


def found(quality):
    return {finding.check: finding for finding in quality.findings}


@pytest.mark.parametrize("form", [lambda rows: rows, as_text], ids=["messages", "text"])
def test_clean_data_has_no_findings(form, tokenizer):
    quality = check_data(form(clean()), tokenizer, eval_data=form(clean(1, 50)))
    assert quality.findings == [] and quality.worst() is None
    assert quality.rows == {"train": ROWS, "eval": 50} and quality.sampled == ROWS
    assert quality.figures["chosen"]["p50"] > 8


def empty(rows, i):
    content(rows[i], "rejected", lambda _: "  ")


def identical(rows, i):
    rows[i]["rejected"] = rows[i]["chosen"]


def alike(rows, i):
    content(rows[i], "rejected", lambda _: rows[i]["chosen"][0]["content"].upper() + " .")


def duplicate(rows, i):
    rows[i] = rows[i - 1]


def contradictory(rows, i):
    before = rows[i - 1]
    rows[i] = {**before, "chosen": before["rejected"], "rejected": before["chosen"]}


def near_duplicate(rows, i):
    rows[i] = json.loads(json.dumps(rows[i - 1]))
    content(rows[i], "chosen", lambda text: text + " w1")


def turn(rows, i):
    content(rows[i], "chosen", lambda text: f"{text}\n\nHuman: {text}")


def two_ends(rows, i):
    content(rows[i], "chosen", lambda text: f"{text} </s>")


def no_prompt(rows, i):
    content(rows[i], "prompt", lambda _: "")


def long_prompt(rows, i):
    content(rows[i], "prompt", lambda text: " ".join([text] * 20))


def one_side_cut(rows, i):
    content(rows[i], "chosen", lambda text: " ".join([text] * 12))


def short(rows, i):
    content(rows[i], "prompt", lambda _: " ".join(["w1"] * 60))


PLANTS = {
    "empty_answer": empty,
    "identical": identical,
    "alike": alike,
    "duplicate": duplicate,
    "contradictory": contradictory,
    "near_duplicate": near_duplicate,
    "turns_in_answer": turn,
    "end_doubled": two_ends,
    "empty_prompt": no_prompt,
    "prompt_too_long": long_prompt,
    "truncated": one_side_cut,
    "too_short": short,
}


@pytest.mark.parametrize("check", PLANTS)
def test_a_planted_fault_is_found_with_its_rows(check, tokenizer):
    rows = clean()
    for i in PLANTED:
        PLANTS[check](rows, i)
    quality = check_data(rows, tokenizer, max_length=64)
    finding = found(quality)[check]
    expected = PLANTED
    if check == "contradictory":
        expected = sorted(PLANTED + [i - 1 for i in PLANTED])
    assert list(finding.rows) == expected
    assert "(1.2 %)" in finding.message or check == "contradictory"
    assert quality.as_dict()["findings"] and json.dumps(quality.as_dict())


def template(change):
    out = tiny.tokenizer()
    out.chat_template = change(tiny.TEMPLATE)
    return out


@pytest.mark.parametrize(
    "check, change",
    [
        ("turn_dropped", lambda t: "{% set messages = messages[-1:] %}" + t),
        ("turn_doubled", lambda t: t.replace("m['content']", "m['content'] + ' ' + m['content']")),
        ("end_missing", lambda t: t.replace(" </s>", "")),
    ],
)
def test_a_template_that_spoils_the_rows_is_found(check, change):
    finding = found(check_data(clean(), template(change)))[check]
    assert finding.level == "error" and len(finding.rows) == ROWS


def test_an_end_on_one_side_alone_is_an_error(tokenizer):
    ending = template(
        lambda t: t.replace(" </s>", "{% if 'w7' not in m['content'] %} </s>{% endif %}")
    )
    rows = clean()
    for row in rows:
        for key in ("prompt", "chosen"):
            content(row, key, lambda text: text.replace("w7", "w8"))
        content(row, "rejected", lambda text: text + " w7")
    finding = found(check_data(rows, ending))["end_missing"]
    assert finding.level == "error" and finding.values == {"chosen": 0, "rejected": ROWS}


def test_a_bos_token_twice_or_inside_an_answer_is_found():
    tokenizer = tiny.tokenizer(bos_token="<user>")
    rows = as_text(clean())
    for row in rows:
        row["prompt"] = "<user> <user>" + row["prompt"]
    rows[3]["chosen"] += " <user> w1"
    checks = found(check_data(rows, tokenizer))
    assert len(checks["bos_doubled"].rows) == ROWS and checks["bos_inside"].rows == (3,)


def test_length_that_gives_the_answer_away_is_found(tokenizer):
    rows = clean()
    for i, row in enumerate(rows):
        if i % 5:
            content(row, "chosen", lambda text: f"{text} {text}")
    finding = found(check_data(rows, tokenizer))["length_bias"]
    assert finding.values["longer_wins"] > 0.8 and 0 < finding.values["r2"] < 1


def test_words_that_give_the_answer_away_are_found():
    rows = clean()
    for row in rows:
        content(row, "chosen", lambda text: f"{text} Certainly")
    finding = found(check_data(rows))["separable"]
    assert "certainly" in finding.values["words"] and finding.values["accuracy"] > 0.95


def test_rows_of_the_training_data_in_held_out_data_are_found(tokenizer):
    train, held_out = clean(), clean(1, 60)
    held_out[5] = train[17]
    held_out[6] = {**held_out[6], "prompt": train[18]["prompt"]}
    held_out[7] = json.loads(json.dumps(train[19]))
    content(held_out[7], "prompt", lambda text: "w2 " + text)
    checks = found(check_data(train, tokenizer, eval_data=held_out))
    rows = {name: checks[name].rows for name in ("leaked_pair", "leaked_prompt", "nearly_leaked")}
    assert rows == {"leaked_pair": (5,), "leaked_prompt": (6,), "nearly_leaked": (7,)}
    assert all(checks[name].data == "eval" for name in rows)


def test_columns_that_nothing_reads_are_named(tokenizer):
    rows = [{**row, "source": "web"} for row in clean()]
    finding = found(check_data(rows, tokenizer))["unread_columns"]
    assert finding.level == "note" and finding.values == {"columns": ["source"]}


def test_a_sample_is_tokenised_and_all_rows_are_read(tokenizer):
    rows = clean()
    identical(rows, 100)
    quality = check_data(rows, tokenizer, sample_rows=10)
    assert quality.sampled <= 10 and found(quality)["identical"].rows == (100,)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a", "completion": "b", "label": True}], "single answers"),
        ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], "token ids"),
        ([{"prompt": "a", "chosen": "b"}], "column 'rejected' is missing"),
        ([{"prompt": "a", "chosen": 3, "rejected": "c"}], "row 0: chosen is a int; expected a str"),
        ([{"prompt": "a", "chosen": [1], "rejected": ["c"]}], "row 0: chosen is a list; expected"),
    ],
)
def test_other_data_is_refused(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        check_data(rows)
    if "row 0" in message:
        with pytest.raises(ValueError, match="row 0: chosen is a"):
            check_data(rows, tokenizer)


def test_clean_data_has_the_figures_of_bias_and_of_eager_logits(tokenizer):
    figures = check_data(clean(), tokenizer).figures
    assert 0.3 < figures["separability"] < 0.7
    assert 0.4 < figures["length_bias"]["longer_wins"] < 0.6 and figures["length_bias"]["r2"] < 0.1
    batches = figures["eager_logits_histogram"]
    assert sum(batches["batches"]) == ROWS // 8
    assert batches["edges"][-1] == figures["eager_logits_bytes"]
    assert list(check_data(clean()).figures) == ["separability"]


def test_what_is_cut_and_what_ends_twice_is_told_by_side(tokenizer):
    rows = clean()
    for i in range(6):
        one_side_cut(rows, i)
    content(rows[9], "rejected", lambda text: " ".join([text] * 12))
    for key in ("chosen", "rejected"):
        content(rows[8], key, lambda text: " ".join([text] * 12))
    for i in (20, 21):
        content(rows[i], "rejected", lambda text: f"{text} </s>")
    checks = found(check_data(rows, tokenizer, max_length=64))
    cut = checks["truncated"]
    assert {k: cut.values[k] for k in ("chosen", "rejected", "both")} == {
        "chosen": 6, "rejected": 1, "both": 1,
    }  # fmt: skip
    assert "6 in the chosen answer alone, 1 in the rejected one alone, 1 in both" in cut.message
    assert cut.values["lost_tokens"] > 6 * 30
    assert checks["end_doubled"].values == {"chosen": 0, "rejected": 2}


def test_progress_is_a_line_in_a_log_file(monkeypatch, capsys):
    from fastpref import progress

    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    check_data(clean(rows=3), show_progress=True)
    assert "Checking train data: 3 of 3 rows (100%)" in capsys.readouterr().err
    check_data(clean(rows=3))
    assert "Checking" not in capsys.readouterr().err


def test_the_fixed_file_lacks_what_should_not_be_trained_on(tmp_path, tokenizer):
    rows = clean(rows=150)
    empty(rows, 3)
    identical(rows, 40)
    duplicate(rows, 60)
    contradictory(rows, 80)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    quality = check_data(path, tokenizer)
    target, dropped = write_fixed(path, quality.findings, fixed_path(path))
    kept = [json.loads(line) for line in target.read_text().splitlines()]
    assert target == tmp_path / "pairs.clean.jsonl" and path.read_bytes() == before
    assert dropped == 5 and kept == [r for i, r in enumerate(rows) if i not in {3, 40, 60, 79, 80}]
    assert [f for f in check_data(target, tokenizer).findings if f.level == "error"] == []
    with pytest.raises(ValueError, match="exists already"):
        write_fixed(path, quality.findings, target)


def test_near_texts_are_told_from_others_of_the_same_words():
    draw = random.Random(3)
    sketches, texts = Sketches(), [" ".join(draw.choices(tiny.WORDS, k=200)) for _ in range(50)]
    texts.append(texts[10].replace(texts[10].split()[50], "other"))
    texts.append(" ".join(sorted(texts[11].split())))
    for i, text in enumerate(texts):
        sketches.add(i, text)
    assert sketches.near(excluded=set()) == [50]
