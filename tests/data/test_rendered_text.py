"""How text and chat templates become tokens: special tokens and begun turns."""

import pytest

pytest.importorskip("transformers")

from chat_texts import CHATML, call, says, user, words  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from fastpref.data import load_preference_data, prepare_dataset  # noqa: E402
from fastpref.data.unpaired import prepare_unpaired_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


# ---- special tokens that a text already holds ----


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
