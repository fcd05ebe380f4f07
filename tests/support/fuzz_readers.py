"""Fuzzing of the data readers: bytes of a file become tokens, or one error that names the place.

With atheris installed, `python tests/support/fuzz_readers.py FOLDER SECONDS` runs libFuzzer on the
package's bytecode. Without it the mutator below does, which keeps inputs that reach new lines.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz")
# Where a fault is: a line, a row, the names of the columns, or the whole file.
_PLACE = re.compile(
    r"\bline \d|\brow \d|\brows \d|column|header|has no rows|is empty|is (not )?a Parquet file|"
    r"is compressed with gzip|is a ZIP archive|its contents cannot be read|of \d+ rows|data has "
)
_MOST_BYTES = 20_000
_PAIR = {"prompt": "w1 ", "chosen": "w2 w3", "rejected": "w4"}
_CHAT = {
    "prompt": [{"role": "user", "content": "w1"}],
    "chosen": [{"role": "assistant", "content": "w2"}],
    "rejected": [{"role": "assistant", "content": "w3", "tool_calls": [{"type": "function"}]}],
    "tools": '[{"type": "function", "function": {"name": "f"}}]',
    "chat_template_kwargs": {"a": 1},
}
_ANSWER = {"prompt": "w1", "completion": "w2 w3", "label": True, "weight": 0.5}
_IDS = {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11], "margin": 0.5}
_REFERENCE = {**_PAIR, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0, "soft_label": 0.9}
WORDS = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"1e999", b"-1", b"\n",
    b"\r\n", b"\\ud800", b"\\u0000", b"\xff", b"\xef\xbb\xbf", b"\0", b'""', b"[]", b"{}",
    b"prompt", b"chosen", b"rejected", b"completion", b"label", b"weight", b"margin", b"system",
    b"context", b"images", b"tools", b"role", b"content", b"from", b"value", b"messages",
    b"prompt_ids", b"chosen_ids", b"soft_label", b"ref_chosen_logps", b"ref_rejected_logps",
    b"chat_template_kwargs", b"chat_template", b"name", b"tool_calls", b"9" * 400,
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    """Inputs that are right, of each ending and layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for row in (_PAIR, _CHAT, _ANSWER, _IDS, _REFERENCE):
        lines = "".join(json.dumps(row) + "\n" for _ in range(2)).encode()
        yield b"\0" + lines
        yield b"\1" + json.dumps([row, row]).encode()
        yield b"\4" + gzip.compress(lines, mtime=0)
        header = ",".join(row)
        cells = ",".join('"' + json.dumps(v).replace('"', '""') + '"' for v in row.values())
        yield b"\2" + f"{header}\n{cells}\n{cells}\n".encode()
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([row, row]), sink, compression="none")
        yield b"\3" + sink.getvalue()


# Inputs that once ended in something other than an error that names the place.
CRASHED = {
    "a null character in a column's name": b'\2prompt,ck\0n_ids,rejected\n"[7]","[9]","[1]"\n',
    "a huge token id": b'\0{"prompt_ids": [18014398509481995], "chosen_ids": [9], '
    b'"rejected_ids": [1]}',
    "the same as single answers": b'\5{"prompt_ids": [1], "chosen_ids": [1e9], '
    b'"rejected_ids": [1]}',
    "token ids that are text": b'\2prompt_ids,chosen_ids,rejected_ids\n"[7]","[9]","[1 11]"\n',
}


class Target:
    """Reads an input: its first byte chooses the file's ending and its use, the others are the
    file."""

    def __init__(self) -> None:
        import datasets
        import tiny

        datasets.disable_progress_bars()
        datasets.disable_caching()
        logging.disable(logging.WARNING)
        self.tokenizer = tiny.tokenizer()
        self._folder = tempfile.TemporaryDirectory()

    def read(self, data: bytes) -> str:
        """Read an input: "" or the error.

        Raises:
            Exception: whatever is no ValueError in one sentence that names file, line or row.
        """
        from fastpref.data import load_preference_data, prepare_dataset
        from fastpref.data.columns import PAIRS, UNPAIRED
        from fastpref.data.unpaired import prepare_unpaired_dataset, unpair

        if not data:
            return ""
        ending = ENDINGS[data[0] % len(ENDINGS)]
        path = Path(self._folder.name) / f"data{ending}"
        path.write_bytes(data[1 : _MOST_BYTES + 1])
        try:
            loaded = load_preference_data(str(path))
            own = {*UNPAIRED.answers, *UNPAIRED.ids} - {*PAIRS.answers, *PAIRS.ids}
            single = own & set(loaded.column_names)
            if not single and data[0] // len(ENDINGS) % 2:  # pairs as single answers
                loaded, single = unpair(loaded), True
            prepare = prepare_unpaired_dataset if single else prepare_dataset
            prepared, _ = prepare(loaded, self.tokenizer, max_length=32)
            list(prepared)
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            text = str(error)
            named = path.name in text and _PLACE.search(text)
            if "\n" in text or not named:
                raise AssertionError(f"not a sentence with a place: {text!r}") from error
            return text
        return ""


def mutated(draw: random.Random, corpus: list[bytes]) -> bytes:
    """An input made from one of the corpus, by up to four changes."""
    data = bytearray(draw.choice(corpus))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        change = draw.randrange(7)
        if change == 0 and data:
            data[at % len(data)] = draw.randrange(256)
        elif change == 1:
            data[at:at] = draw.choice(WORDS)
        elif change == 2:
            del data[at : at + draw.choice((1, 2, 8, 64))]
        elif change == 3:
            stop = at + draw.choice((1, 4, 32, 128))
            data[at:at] = data[at:stop]
        elif change == 4:
            other = draw.choice(corpus)
            begin = draw.randrange(len(other) + 1)
            data[at:] = other[begin:]
        elif change == 5:
            word = draw.choice(WORDS)
            data[at : at + len(word)] = word
        elif data:
            data[0] = draw.randrange(2 * len(ENDINGS))
    return bytes(data[: _MOST_BYTES + 1])


def fuzz(seconds: float, seed: int, start: list[bytes]) -> dict[str, Any]:
    """Fuzz for a time with the mutator.

    Returns:
        The number of inputs, of lines of the package that were reached, and the inputs that
        crashed with their errors, one for each kind.
    """
    import fastpref.data

    folder = str(Path(fastpref.data.__file__).parent)
    reached: set[tuple[str, int, int]] = set()
    before = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Callable | None:
        return trace_lines if frame.f_code.co_filename.startswith(folder) else None

    def trace_lines(frame: FrameType, event: str, argument: Any) -> Callable:
        nonlocal before
        if event == "line":
            reached.add((frame.f_code.co_filename, before, frame.f_lineno))
            before = frame.f_lineno
        return trace_lines

    target, draw, corpus = Target(), random.Random(seed), list(start)
    crashes: dict[str, bytes] = {}
    end, inputs = time.monotonic() + seconds, 0
    queue = list(start)
    while time.monotonic() < end:
        data = queue.pop() if queue else mutated(draw, corpus)
        known, inputs = len(reached), inputs + 1
        sys.settrace(trace)
        try:
            target.read(data)
        except Exception as error:
            crashes.setdefault(f"{type(error).__name__}: {str(error)[:60]}", data)
        finally:
            sys.settrace(None)
        if len(reached) > known:
            corpus.append(data)
    return {"inputs": inputs, "reached": len(reached), "corpus": len(corpus), "crashes": crashes}


def main() -> None:
    """libFuzzer for a time; its crashes are written to the folder as crash-*."""
    import atheris

    folder, seconds = Path(sys.argv[1]), sys.argv[2]
    with atheris.instrument_imports(include=["fastpref.data"]):
        import fastpref.data  # noqa: F401
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(seeds()):
        (folder / "corpus" / f"seed-{i}").write_bytes(data)
    words = "".join('"' + "".join(f"\\x{byte:02x}" for byte in word[:60]) + '"\n' for word in WORDS)
    (folder / "words").write_text(words)
    target = Target()
    options = [
        str(folder / "corpus"), f"-max_total_time={seconds}", f"-dict={folder / 'words'}",
        f"-artifact_prefix={folder}/", "-max_len=20000", "-timeout=60", "-rss_limit_mb=4096",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], target.read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
