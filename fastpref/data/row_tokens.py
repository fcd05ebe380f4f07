"""`RowTokenizer`: the tokens of a row's prompt, and of its prompt with each answer.

Used through `fastpref.data`. Tokenisation, end-of-sequence and prompts follow TRL 1.16, with two
differences. Special tokens that a text already contains are not added again. A prompt that ends
with an unfinished assistant message is continued by the answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastpref.data.columns import check_encodable, describe, is_messages

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message's reasoning
_MARK = "\ue0f2\ue0f3"  # private-use characters, which texts do not contain


class RowTokenizer:
    """Tokenises the rows that `arrange` returns, which are all text or all lists of messages.

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
        """The token ids of the prompt, and those of the prompt with each answer.

        Args:
            row: has prompt and the answers.
            where: the start of error messages about the row.

        Raises:
            ValueError: a row of mixed types, an empty answer, text or messages on which tokenizer
                or chat template fail, a tokenizer without EOS or chat template.
        """
        keys = ("prompt", *self.answers)
        values = [row[key] for key in keys]
        if all(isinstance(value, str) for value in values):
            return self._texts(values[0], values[1:], where)
        # A number beside two strings is what is wrong with the row, and not the strings.
        pairs = zip(keys, values, strict=True)
        order = sorted(pairs, key=lambda item: isinstance(item[1], (str, list)))
        for key, value in order:
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
        """Whether a text ends with EOS or a template's end-of-turn token, then white space."""
        return answer.rstrip().endswith(self.ends)

    def _encode(self, text: str, where: str) -> list[int]:
        """The text's tokens, with the tokenizer's special tokens in front but not behind.

        The ones in front are not doubled if the text contains them.
        """
        try:
            ids = list(self.tokenizer(text=text)["input_ids"])
        except Exception as error:  # the tokenizer's errors do not name the row
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
            first = self._unfinished_prompt(prompt, answers[0], options, where)
        else:
            replies = all(answer[0]["role"] not in ("user", "system", "tool") for answer in answers)
            start = {"add_generation_prompt": True} if replies else {}
            whole = [prompt + answer for answer in answers]
            first = self._apply(prompt, {**start, **options}, where)
        return [first, *(self._apply(messages, options, where) for messages in whole)]

    def _unfinished_prompt(
        self, prompt: list, answer: list, options: dict[str, Any], where: str
    ) -> list[int]:
        """The tokens of a prompt whose last message the answer continues.

        How a template renders a message may depend on its later parts and on later messages, such
        as one with thoughts. So the whole conversation is rendered, with a mark at the end of the
        prompt. If the template drops the marked text, the prompt ends at the start of the turn.
        """
        for marked in _marked(prompt[-1]):
            messages = _continued([*prompt[:-1], marked], answer)
            text = self._apply(messages, options, where, tokenize=False)
            before, mark, _ = text.partition(_MARK)
            if mark:
                return list(self.tokenizer(text=before, add_special_tokens=False)["input_ids"])
        return self._apply(prompt[:-1], {"add_generation_prompt": True, **options}, where)

    def _apply(
        self, messages: list, options: dict[str, Any], where: str, tokenize: bool = True
    ) -> Any:
        """The tokens of a conversation; its text with tokenize=False."""
        try:
            out = self.tokenizer.apply_chat_template(
                messages, **options, tokenize=tokenize, return_dict=tokenize
            )
        except Exception as error:  # errors of a template or tokenizer do not name the row
            arguments = json.dumps([messages, options], ensure_ascii=False, default=str)
            check_encodable(arguments, where)
            conversation = "an empty conversation" if not messages else "this conversation"
            raise ValueError(
                f"{where}: the chat template fails on {conversation}: {_sentence(error)}"
            ) from error
        return list(out["input_ids"]) if tokenize else out


# Arguments of `apply_chat_template` that a row of data must not set: the template itself above all.
_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


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
    reserved = sorted(_TEMPLATE_ARGUMENTS & set(options))
    if reserved:
        raise ValueError(
            f"{where}: {key} has {reserved[0]!r}, which data must not set; expected variables of "
            "the chat template"
        )
    return {"tools": tools, **{k: v for k, v in options.items() if v is not None}}


def _decoded(value: Any, what: str) -> Any:
    """A value that may be JSON text, as an object; `what` names it in errors."""
    if not isinstance(value, str):
        return value
    if not value.strip():  # CSV, which has no null, has an empty text instead
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is text that is not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        raise ValueError(f"{what} is JSON that cannot be read ({error})") from None


def _affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds in front of a text and behind it."""
    whole = list(tokenizer(text="a")["input_ids"])
    bare = list(tokenizer(text="a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens that may end an answer: EOS, and a template's, such as <|eot_id|>."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special and str(token) in template}
    return (tokenizer.eos_token, *(special - {tokenizer.bos_token}))  # GPT-2's BOS is its EOS


def _continues(last: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether the answer's first message continues the prompt's last one, of the same role."""
    finished = last["role"] in ("user", "system", "tool") or last.get("tool_calls")
    return last["role"] == first["role"] and not finished


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One message from two: first, continued by second."""
    out = {**first, **second}
    for key in ("content", *_THOUGHTS):
        parts = [m[key] for m in (first, second) if m.get(key)]
        if len(parts) == 2:
            out[key] = _joined_content(*parts)
        elif parts:
            out[key] = parts[0]
    return out


def _joined_content(first: Any, second: Any) -> Any:
    """One content from two, each text or a list of parts.

    If the last part of first and the first part of second are text, they become one part.
    """
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    first, second = (
        [{"type": "text", "text": value}] if isinstance(value, str) else list(value)
        for value in (first, second)
    )
    left, right = first[-1], second[0]
    if all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in (left, right)):
        return [*first[:-1], {**left, "text": left["text"] + right["text"]}, *second[1:]]
    return first + second


def _continued(prompt: list, answer: list) -> list:
    """The conversation in which the answer's first message continues the prompt's last."""
    return [*prompt[:-1], _joined(prompt[-1], answer[0]), *answer[1:]]


def _marked(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of the message with a mark at the end of its thoughts, then of its content.

    A message with content has the last of these alone.
    """
    if not message.get("content"):
        for key in (key for key in _THOUGHTS if message.get(key)):
            yield {**message, key: _joined_content(message[key], _MARK)}
    yield {**message, "content": _joined_content(message.get("content") or "", _MARK)}


def _sentence(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
