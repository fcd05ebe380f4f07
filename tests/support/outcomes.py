"""Outcomes of compilers, kept in build/outcomes by what they were made from.

    found = outcomes.once("fold.cu sm_90", [command, *sources], make)

`make()` runs once for the same inputs, whichever process of the tests comes first. The others wait
for it and read the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "outcomes"


def once(
    name: str,
    inputs: Sequence[object],
    make: Callable[[], Any],
    failed: Callable[[Any], bool] = lambda found: False,
) -> Any:
    """`make()`, as JSON gives it back. An outcome that `failed` is not kept.

    inputs: all that the outcome depends on; a Path stands for the file's bytes.
    """
    kept = FOLDER / f"{name}.{_digest(inputs)}.json"
    with _one_at_a_time(FOLDER / f"{name}.lock"):
        if kept.exists():
            return json.loads(kept.read_text())
        found = make()
        text = json.dumps(found)
        if not failed(found):
            for old in FOLDER.glob(f"{name}.*.json"):  # of other inputs
                old.unlink()
            part = kept.with_suffix(".part")
            part.write_text(text)
            os.replace(part, kept)
    return json.loads(text)


def _digest(inputs: Sequence[object]) -> str:
    hashed = hashlib.sha256()
    for each in inputs:
        hashed.update(each.read_bytes() if isinstance(each, Path) else repr(each).encode())
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Among processes."""
    import fcntl  # not on Windows, where no module may fail to import

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
