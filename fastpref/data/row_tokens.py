"""The tokens of one row of preference data: its prompt, and its prompt with each answer.

Used through `fastpref.data`. Tokenisation, end-of-sequence and prompts follow TRL 1.16, with two
differences: special tokens that a text already holds are not added again, and a prompt that ends
with a begun assistant message is continued.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastpref.data.columns import check_encodable, describe, is_messages

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # a message's text beside its content
_MARK = "\ue0f2\ue0f3"  # characters without a meaning, so that no text has them


class RowTokenizer:
    """Tokenises rows that `arrange` has made: all text, or all lists of messages.

    Args:
        tokenizer: a transformers tokenizer.
        answers: the names of the answers, such as chosen and rejected.
    """

    def __init__(self, tokenizer: Any, answers: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.prefix, self.suffix = _affixes(tokenizer)
        self.ends = _end_tokens(tokenizer)

    def __call__(self, row: Mapping[str, Any], where: str) -> list[list[int]]:
        """The tokens of the prompt, and of the prompt with each answer.

        Raises:
            ValueError: the row, or the tokenizer, is not fit for that; the message starts with
                where if it is the row.
        """
        keys = ("prompt", *self.answers)
        values = [row[key] for key in keys]
        if all(isinstance(value, str) for value in values):
            return self._texts(values[0], values[1:], where)
        for key, value in zip(keys, values, strict=True):
            if not is_messages(value):
                raise ValueError(
                    f"{where}: {key} is {describe(value)}; expected {self._names()} to be all "
                    "strings or all lists of messages with role and content"
                )
            if key != "prompt" and not value:
                raise ValueError(f"{where}: {key} is an empty conversation; expected a message")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "the data is conversational but the tokenizer has no chat template; set "
                f"tokenizer.chat_template or give {self._names()} as strings"
            )
        return self._conversations(values[0], values[1:], template_options(row, where), where)

    def _names(self) -> str:
        return f"{', '.join(('prompt', *self.answers[:-1]))} and {self.answers[-1]}"

    # ---- text ----

    def _texts(self, prompt: str, answers: list[str], where: str) -> list[list[int]]:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ValueError("the tokenizer has no EOS token, which must end plain-text answers")
        answers = [a if self._is_ended(a) else a + eos for a in answers]
        return [self._encode(text, where) for text in (prompt, *(prompt + a for a in answers))]

    def _is_ended(self, answer: str) -> bool:
        """Whether a template has ended the turn: with EOS or a token like it, then white space."""
        return answer.rstrip().endswith(self.ends)

    def _encode(self, text: str, where: str) -> list[int]:
        """The text's tokens, with what the tokenizer puts in front, once, and nothing behind."""
        try:
            ids = list(self.tokenizer(text=text)["input_ids"])
        except Exception as error:  # of a library below, which knows no row
            check_encodable(text, where)
            raise ValueError(f"{where}: the tokenizer fails: {_sentence(error)}") from error
        size = len(self.prefix)
        if self.suffix and ids[-len(self.suffix) :] == self.suffix:
            ids = ids[: -len(self.suffix)]
        if size and ids[: 2 * size] == self.prefix * 2:
            ids = ids[size:]
        return ids

    # ---- messages ----

    def _conversations(
        self, prompt: list, answers: list[list], options: dict[str, Any], where: str
    ) -> list[list[int]]:
        if prompt and all(_continues(prompt[-1], answer[0]) for answer in answers):
            whole = [_continued(prompt, answer) for answer in answers]
            first = self._begun(prompt, answers[0], options, where)
        else:
            turn = all(answer[0]["role"] not in ("user", "system", "tool") for answer in answers)
            start = {"add_generation_prompt": True} if turn else {}
            whole = [prompt + answer for answer in answers]
            first = self._apply(prompt, {**start, **options}, where)
        return [first, *(self._apply(messages, options, where) for messages in whole)]

    def _begun(self, prompt: list, answer: list, options: dict[str, Any], where: str) -> list[int]:
        """The tokens up to where the answer goes on with the prompt's last message.

        A template may render a message by what follows in it or after it (one with thoughts, say),
        so the place is marked in the text of the whole. A template that leaves out the beginning
        leaves the start of the turn.
        """
        for marked in _marked(prompt[-1]):
            messages = _continued([*prompt[:-1], marked], answer)
            text = self._apply(messages, options, where, tokenize=False)
            before, found, _ = text.partition(_MARK)
            if found:
                return list(self.tokenizer(text=before, add_special_tokens=False)["input_ids"])
        return self._apply(prompt[:-1], {"add_generation_prompt": True, **options}, where)

    def _apply(
        self, messages: list, options: dict[str, Any], where: str, tokenize: bool = True
    ) -> Any:
        """The tokens of a conversation, or its text."""
        try:
            out = self.tokenizer.apply_chat_template(
                messages, **options, tokenize=tokenize, return_dict=tokenize
            )
        except Exception as error:  # of a template, or of a library below, which know no row
            given = [messages, options]
            check_encodable(json.dumps(given, ensure_ascii=False, default=str), where)
            what = "an empty conversation" if not messages else "this conversation"
            raise ValueError(
                f"{where}: the chat template fails on {what}: {_sentence(error)}"
            ) from error
        return list(out["input_ids"]) if tokenize else out


def template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's tools and chat_template_kwargs, as arguments of `apply_chat_template`."""
    tools = _decoded(row.get("tools"), f"{where}: tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise ValueError(f"{where}: tools is {describe(tools)}; expected a list of schemas")
        tools = [_decoded(tool, f"{where}: tools[{i}]") for i, tool in enumerate(tools)]
        odd = next((tool for tool in tools if not isinstance(tool, dict)), None)
        if odd is not None:
            raise ValueError(f"{where}: tools has {describe(odd)}; expected JSON schemas")
    key = "chat_template_kwargs"
    options = _decoded(row.get(key), f"{where}: {key}") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where}: {key} is {describe(options)}; expected a dict")
    return {"tools": tools, **{k: v for k, v in options.items() if v is not None}}


def _decoded(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():  # as a table without null, such as CSV, says that there is nothing
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is text that is not JSON ({error.msg})") from None


def _affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts in front of a text and behind it."""
    whole = list(tokenizer(text="a")["input_ids"])
    bare = list(tokenizer(text="a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens that may end an answer: EOS, and a template's own, such as <|eot_id|>."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special and str(token) in template}
    return (tokenizer.eos_token, *(special - {tokenizer.bos_token}))  # GPT-2's BOS is its EOS


def _continues(last: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether a prompt's last message is the begun one that the answer's first one goes on with."""
    finished = last["role"] in ("user", "system", "tool") or last.get("tool_calls")
    return last["role"] == first["role"] and not finished


def _joined(begun: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """One message of its beginning and its end."""
    out = {**begun, **rest}
    for key in ("content", *_THOUGHTS):
        parts = [m[key] for m in (begun, rest) if m.get(key)]
        if len(parts) == 2:
            out[key] = _joined_content(*parts)
        elif parts:
            out[key] = parts[0]
    return out


def _joined_content(begun: Any, rest: Any) -> Any:
    """One content of two; where they meet, two parts of text become one, as nothing parts them."""
    if isinstance(begun, str) and isinstance(rest, str):
        return begun + rest
    begun, rest = (
        [{"type": "text", "text": value}] if isinstance(value, str) else list(value)
        for value in (begun, rest)
    )
    last, first = begun[-1], rest[0]
    if all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in (last, first)):
        return [*begun[:-1], {**last, "text": last["text"] + first["text"]}, *rest[1:]]
    return begun + rest


def _continued(prompt: list, answer: list) -> list:
    return [*prompt[:-1], _joined(prompt[-1], answer[0]), *answer[1:]]


def _marked(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The message with a mark at its end: after its content, or else after its thoughts."""
    if not message.get("content"):
        for key in (key for key in _THOUGHTS if message.get(key)):
            yield {**message, key: _joined_content(message[key], _MARK)}
    yield {**message, "content": _joined_content(message.get("content") or "", _MARK)}


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
