"""Outcomes of compilers, kept in the user's cache by what they were made from.

    found = outcomes.once("fold.cu sm_90", [command, *sources], make)

`make()` runs once for the same inputs, whichever process of the tests comes first. The others wait
for it and read the result. The clones of a user share the outcomes, as they share pip's: those of
an unchanged source take a compiler a third of the time of all tests.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _folder() -> Path:
    """Of the user, or of the clone where the user's cache cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref" / "tests"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ROOT / "build" / "outcomes"
    return cache if os.access(cache, os.W_OK) else ROOT / "build" / "outcomes"


FOLDER = _folder()
KEPT = 6  # of each name, so that clones with different sources do not undo each other's


def once(
    name: str,
    inputs: Sequence[object],
    make: Callable[[], Any],
    failed: Callable[[Any], bool] = lambda found: False,
) -> Any:
    """`make()`, as JSON gives it back. An outcome that `failed` is not kept.

    inputs: all that the outcome depends on; a Path stands for the file's bytes.
    """

    def write(path: Path) -> bool:
        found = make()
        path.write_bytes(gzip.compress(json.dumps(found).encode(), 1))
        return not failed(found)

    with kept(name, "json.gz", inputs, write) as path:
        return json.loads(gzip.decompress(path.read_bytes()))


@contextlib.contextmanager
def kept(
    name: str, ending: str, inputs: Sequence[object], write: Callable[[Path], bool]
) -> Iterator[Path]:
    """A file that `write(path)` makes once for the same inputs; it stays while the context lasts.

    write: returns whether the file is kept for others.
    """
    path = FOLDER / f"{name}.{_digest(inputs)}.{ending}"
    with _one_at_a_time(FOLDER / f"{name}.lock"):
        stays = path.exists()
        if stays:
            path.touch()  # what was asked for last is the last to go
        else:
            part = FOLDER / f"{name}.part"
            stays = write(part)
            os.replace(part, path)
            alike = sorted(FOLDER.glob(f"{name}.*.{ending}"), key=lambda p: p.stat().st_mtime)
            for old in alike[:-KEPT]:
                old.unlink()
        try:
            yield path
        finally:
            if not stays:
                path.unlink()


def _digest(inputs: Sequence[object]) -> str:
    """The same in each clone, whose folder and environment are left out of paths."""
    hashed = hashlib.sha256()
    for each in inputs:
        if isinstance(each, Path):
            hashed.update(each.read_bytes())
        else:
            text = repr(each).replace(sys.prefix, "").replace(str(ROOT), "")
            hashed.update(text.encode())
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
