"""Checks of the rows' tokens: beginnings and ends, templates, truncation, lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastpref.data.row_tokens import RowTokenizer, template_options
from fastpref.data.tokenise import common_prefix
from fastpref.quality.findings import Finding, of_rows, share

LONGER_WINS = 0.7  # share of pairs from which on length is said to give the answer away
_LEAST = 100  # pairs below which nothing is said of length
_LEAST_TEXT = 12  # characters of a message that is looked for in a rendered conversation
BINS = 40  # of the histograms of token counts
_SIDES = ("chosen", "rejected")
BATCH = 8  # pairs in the batches whose padding is counted


class Tokens:
    """Collects the token checks of pairs.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens of prompt and answer at which they are cut; None: nowhere.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.encode = RowTokenizer(tokenizer, _SIDES)
        self.lengths: list[tuple[int, int, int]] = []  # tokens of prompt, chosen and rejected
        self._rows: defaultdict[str, list[int]] = defaultdict(list)
        self._total = 0
        self._answer_tokens = self._lost_tokens = 0  # of all answers, and what is cut of them
        self._ends = {i for i in map(_id_of(tokenizer), self.encode.ends) if i is not None}
        self._blank: dict[int, bool] = {}

    def add(self, number: int, row: Mapping[str, Any], where: str) -> None:
        """Look at a row, which has prompt, chosen and rejected.

        Raises:
            ValueError: text or messages on which the tokenizer or the chat template fails.
        """
        self._total += 1
        prompt, *whole = self.encode(row, where)
        start = min(common_prefix(prompt, ids) for ids in whole)
        if start < len(prompt):
            self._rows["not_prefix"].append(number)
        answers = [ids[start:] for ids in whole]
        self.lengths.append((start, len(answers[0]), len(answers[1])))
        for side, ids in zip(_SIDES, answers, strict=True):
            self._ends_of(number, side, ids)
        self._begins(number, whole[0], answers)
        self._cut(number, start, [len(ids) for ids in answers])
        if not isinstance(row["prompt"], str):
            self._turns(number, row, where)

    def _begins(self, number: int, ids: list[int], answers: list[list[int]]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is None or bos in self._ends:  # GPT-2's BOS is its EOS
            return
        if ids[:2] == [bos, bos]:
            self._rows["bos_doubled"].append(number)
        for side, answer in zip(_SIDES, answers, strict=True):
            if bos in answer:
                self._rows[f"bos_inside_{side}"].append(number)

    def _ends_of(self, number: int, side: str, ids: list[int]) -> None:
        last = len(ids) - 1
        while last > 0 and self._is_blank(ids[last]):
            last -= 1
        if last < 0 or ids[last] not in self._ends:
            self._rows[f"no_end_{side}"].append(number)
        elif last > 0 and ids[last - 1] in self._ends:
            self._rows[f"end_doubled_{side}"].append(number)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def _cut(self, number: int, prompt: int, answers: list[int]) -> None:
        limit = self.max_length
        if limit is None:
            return
        if prompt >= limit:
            self._rows["prompt_too_long"].append(number)
            return
        cut = [prompt + length > limit for length in answers]
        kept_lengths = [min(length, limit - prompt) for length in answers]
        self._answer_tokens += sum(answers)
        self._lost_tokens += sum(answers) - sum(kept_lengths)
        if cut[0] and cut[1]:
            self._rows["cut_both"].append(number)
        elif cut[0] or cut[1]:
            self._rows[f"cut_{_SIDES[cut[1]]}"].append(number)
        if min(kept_lengths) < 2:
            self._rows["too_short"].append(number)

    def _turns(self, number: int, row: Mapping[str, Any], where: str) -> None:
        """Whether the template renders each message once."""
        options = template_options(row, where)
        for side in _SIDES:
            messages = [*row["prompt"], *row[side]]
            texts = [m["content"] for m in messages if isinstance(m.get("content"), str)]
            texts = [" ".join(text.split()) for text in texts]
            try:
                rendered = self.tokenizer.apply_chat_template(messages, **options, tokenize=False)
            except Exception:  # the tokens of the row were made from the same messages
                return
            rendered, content = " ".join(rendered.split()), "\n".join(texts)
            for text in texts:
                if len(text) < _LEAST_TEXT:
                    continue
                expected, count = content.count(text), rendered.count(text)
                if count < expected:
                    self._rows["turn_dropped"].append(number)
                elif count > expected:
                    self._rows["turn_doubled"].append(number)

    # ---- what was found ----

    def findings(self) -> list[Finding]:
        """What was found."""
        total, rows = self._total, self._rows
        if not total:
            return []
        cut = f"max_length={self.max_length} tokens"
        out: list[Finding] = []

        def add(check: str, level: str, what: str, advice: str, drops: bool = False) -> None:
            out.extend(of_rows(check, level, rows[check], total, what, advice, drops=drops))

        def add_by_side(check: str, level: str, what: str, advice: str) -> None:
            sides = {side: rows[f"{check}_{side}"] for side in _SIDES}
            counts = {side: len(numbers) for side, numbers in sides.items()}
            both = [number for numbers in sides.values() for number in numbers]
            what += f" (chosen: {counts['chosen']}, rejected: {counts['rejected']})"
            out.extend(of_rows(check, level, both, total, what, advice, values=counts))

        add(
            "not_prefix",
            "warning",
            "have a prompt whose tokens are no prefix of prompt and answer, so the answer starts "
            "earlier",
            "end prompts before a space, or see how the chat template treats the last turn",
        )
        add(
            "turn_dropped",
            "error",
            "have a message that the chat template leaves out",
            "use a template that shows every turn (thoughts and system messages above all)",
        )
        add(
            "turn_doubled",
            "error",
            "have a message that the chat template shows twice",
            "see whether the prompt stands in the answers as well",
        )
        add("bos_doubled", "error", "start with two BOS tokens", "remove BOS from the texts")
        add_by_side(
            "bos_inside",
            "error",
            "have a BOS token inside an answer",
            "give the turns as messages, or remove the marks from the text",
        )
        add_by_side(
            "end_doubled",
            "error",
            "have an answer that ends with two end tokens",
            "remove one from the texts",
        )
        out += self._missing_ends()
        add(
            "prompt_too_long",
            "error",
            f"have a prompt that alone reaches {cut} and are dropped",
            "raise max_length, or shorten the prompts",
            True,
        )
        add(
            "too_short",
            "warning",
            "have an answer of fewer than two tokens"
            + (f" within {cut}" if self.max_length else ""),
            "raise max_length if they are cut",
        )
        return out + self._truncated(cut) + self._length_bias()

    def _truncated(self, cut: str) -> list[Finding]:
        rows = {which: self._rows[f"cut_{which}"] for which in (*_SIDES, "both")}
        values: dict[str, Any] = {which: len(numbers) for which, numbers in rows.items()}
        if not (count := sum(values.values())):
            return []
        lost = self._lost_tokens / self._answer_tokens
        return [
            Finding(
                "truncated",
                "warning" if count > 0.01 * self._total else "note",
                f"{share(count, self._total)} are cut at {cut}: {values['chosen']} in the chosen "
                f"answer alone, {values['rejected']} in the rejected one alone, {values['both']} "
                f"in both; {100 * lost:.2g} % of the answers' tokens are lost",
                "raise max_length; where one answer is cut, its missing end is what is taught",
                tuple(sorted(number for numbers in rows.values() for number in numbers)),
                {**values, "lost_tokens": self._lost_tokens},
            )
        ]

    def _missing_ends(self) -> list[Finding]:
        total = self._total
        sides = {side: set(self._rows[f"no_end_{side}"]) for side in _SIDES}
        counts = {side: len(rows) for side, rows in sides.items()}
        rows = sides["chosen"] | sides["rejected"]
        if not rows:
            return []
        uneven = abs(counts["chosen"] - counts["rejected"]) > 0.01 * total
        return of_rows(
            "end_missing",
            "error" if uneven or counts["chosen"] else "warning",
            [*rows],
            total,
            f"have an answer without an end token (chosen: {counts['chosen']}, rejected: "
            f"{counts['rejected']})",
            "a model trained on them does not learn to stop: see that the template ends the "
            "assistant's turn",
            values=counts,
        )

    def _length_bias(self) -> list[Finding]:
        values = self._length_figures()
        wins, r2 = values["longer_wins"], values["r2"]
        if self._total < _LEAST or max(wins, 1 - wins) < LONGER_WINS:
            return []
        which, rate = ("longer", wins) if wins > 0.5 else ("shorter", 1 - wins)
        return [
            Finding(
                "length_bias",
                "warning",
                f"the {which} answer is the chosen one in {100 * rate:.0f} % of pairs (R^2 of the "
                f"preference on the length difference: {r2:.2f})",
                "a model can learn length instead of quality: consider ld_alpha, a loss with mean "
                "log-probs (simpo, ipo), or pairs of like lengths",
                values=values,
            )
        ]

    def _length_figures(self) -> dict[str, float]:
        lengths = np.array(self.lengths, dtype=float)
        difference = lengths[:, 1] - lengths[:, 2]
        wins = float((difference > 0).mean() + 0.5 * (difference == 0).mean())
        return {"longer_wins": round(wins, 4), "r2": round(_correlation(difference), 4)}

    def figures(self, vocab_size: int) -> dict[str, Any]:
        """Token counts, length bias, padding of batches, and the memory of eager logits."""
        if not self.lengths:
            return {}
        lengths = np.array(self.lengths)
        if self.max_length is not None:
            room = np.maximum(self.max_length - lengths[:, :1], 0)
            lengths[:, 1:] = np.minimum(lengths[:, 1:], room)
            lengths[:, 0] = np.minimum(lengths[:, 0], self.max_length)
        columns = dict(zip(("prompt", "chosen", "rejected"), lengths.T, strict=True))
        columns["pair"] = 2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]
        points = (50, 90, 99, 100)
        out: dict[str, Any] = {
            name: dict(zip(("p50", "p90", "p99", "max"), _percentiles(v, points), strict=True))
            for name, v in columns.items()
        }
        rows = lengths[:, :1] + lengths[:, 1:]
        order = np.random.default_rng(0).permutation(len(rows))
        whole = order[: len(order) // BATCH * BATCH] if len(order) >= BATCH else order
        batches = rows[whole].reshape(-1, min(BATCH, len(order)) * 2)
        padded = float(batches.max(1).sum()) * batches.shape[1]
        out["padding"] = round(1 - float(batches.sum()) / padded, 4) if padded else 0.0
        out["shared_prompt"] = round(float(lengths[:, 0].sum() / max(columns["pair"].sum(), 1)), 4)
        out["eager_logits_bytes"] = int(2 * BATCH * rows.max() * vocab_size * 4)
        out["length_bias"] = self._length_figures()
        logits = batches.max(1).astype(float) * batches.shape[1] * vocab_size * 4
        counts_of_batches, byte_edges = np.histogram(logits, BINS, (0, max(logits.max(), 1.0)))
        out["eager_logits_histogram"] = {
            "edges": byte_edges.tolist(),
            "batches": counts_of_batches.tolist(),
        }
        edges = np.unique(np.linspace(0, rows.max() + 1, BINS + 1).astype(int))
        counts = {name: columns[name] for name in ("prompt", "chosen", "rejected")}
        out["histogram"] = {
            "edges": edges.tolist(),
            **{name: np.histogram(v, edges)[0].tolist() for name, v in counts.items()},
        }
        return out


def _correlation(differences: np.ndarray) -> float:
    """R^2 of "first is preferred" on a difference, each pair counted both ways round."""
    squares = float(np.square(differences).mean())
    return float(differences.mean()) ** 2 / squares if squares > 0 else 0.0


def _percentiles(values: np.ndarray, points: tuple[int, ...]) -> list[int]:
    return [int(v) for v in np.percentile(values, points)]


def _id_of(tokenizer: Any) -> Any:
    return lambda token: None if token is None else tokenizer.convert_tokens_to_ids(token)
