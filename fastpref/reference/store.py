"""`ReferenceStore`: a directory of a reference's token log-probabilities, keyed by content.

    store.json           the identity of the reference, with a checksum
    parts/HASH.parquet   sequences: key, log-probs of the labelled tokens; HASH is of the file
    damaged/             parts that were not as they were written
    .lock                held by the run that writes

A part is written beside its place, synchronised to the disk and renamed. So a run that is killed
leaves whole parts, and two runs that write the same sequences leave both, of which one is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from fastpref.reference.identity import identity_differences
from fastpref.reference.keys import KEY, KEY_BYTES, among
from fastpref.reference.part_writer import PartWriter
from fastpref.storage import disk_errors, sync_directory, write_json

STORE_FILE = "store.json"
VERSION = 1
READ_ROWS = 4096  # sequences that are in memory at a time
_OWN = {STORE_FILE, f".{STORE_FILE}.new", "parts", "damaged", ".lock"}
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logps", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _checksum(value: dict[str, Any]) -> str:
    """The checksum of a store file, which covers everything in it but the checksum."""
    content = {key: entry for key, entry in value.items() if key != "sha256"}
    return _sha256(json.dumps(content, sort_keys=True).encode())


def _mark(identity: dict[str, Any]) -> str:
    return _sha256(json.dumps(identity, sort_keys=True).encode())


class ReferenceStore:
    """The token log-probs of one reference in a directory.

    The keys of all sequences are in memory, 16 bytes each; log-probs are read part by part.

    Args:
        path: the directory.
        identity: `describe_reference` of the present reference.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        # Absolute, so that it stays where it is when the working directory changes.
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self.parts = self.path / "parts"
        self.identity = json.loads(json.dumps(identity))  # with JSON's types, as it is read back
        self._mark = _mark(self.identity)
        self._keys: dict[str, np.ndarray] = {}  # of each part that is whole, by the part's name
        self._sorted = np.empty(0, KEY)
        self._lock: FileLock | None = None

    @property
    def sequences(self) -> int:
        """How many sequences the store has."""
        return len(self._sorted)

    # ---- the directory ----

    def check(self) -> dict[str, Any] | None:
        """The identity that the store was written with, or None if there is no store.

        It is the present reference's, but may have less of its config; see `adopt`.

        Raises:
            ValueError: it is of another reference, damaged, or the directory holds something else.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise ValueError(f"reference store {self.path} is a file; expected a directory")
        file = self.path / STORE_FILE
        if not file.exists():
            others = sorted(p.name for p in self.path.iterdir() if p.name not in _OWN)
            if others:
                raise ValueError(
                    f"reference store {self.path} has no {STORE_FILE} and holds {others[0]!r}; "
                    "expected a store, or a directory that is new or empty"
                )
            return None
        stored: dict[str, Any] = _read_store_file(file)["identity"]
        differing = identity_differences(stored, self.identity)
        if differing or {**stored, "config": None} != {**self.identity, "config": None}:
            raise ValueError(
                f"reference store {self.path} is of another reference: "
                f"{'; '.join(differing) or 'its identity is another'}; run with the reference that "
                "it was written with, or choose another directory"
            )
        return stored

    def adopt(self, written: dict[str, Any] | None) -> None:
        """Read and write parts that have the mark of the identity that `check` has found."""
        if written is not None:
            self._mark = _mark(written)

    def create(self) -> dict[str, Any]:
        """Make the directory, unless the store exists. Only the process with the lock calls this.

        Returns:
            The identity that the store was written with.

        Raises:
            StorageError: the directory cannot be written.
            ValueError: as `check`.
        """
        written = self.check()
        if written is not None:
            return written
        with disk_errors(f"reference store {self.path} cannot be written"):
            self.parts.mkdir(parents=True, exist_ok=True)
            value = {"version": VERSION, "identity": self.identity}
            try:
                write_json(self.path / STORE_FILE, {**value, "sha256": _checksum(value)})
            except FileNotFoundError:  # another run has made the same file, without a lock
                if not (written := self.check()):
                    raise
                return written
        return self.identity

    def try_lock(self) -> bool:
        """Take the lock of the run that writes; False if another run has it.

        The lock ends with the process, however that ends.
        """
        with disk_errors(f"reference store {self.path} cannot be locked"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                return False
        self._lock = lock
        return True

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def tidy(self, damaged: list[str]) -> None:
        """Remove what dead runs began, and move damaged parts away; only with the lock.

        Args:
            damaged: names of parts.
        """
        with disk_errors(f"reference store {self.path} cannot be written"):
            for path in self.parts.glob(".*.new"):
                path.unlink(missing_ok=True)
            for name in damaged:
                (self.path / "damaged").mkdir(exist_ok=True)
                if (self.parts / name).exists():
                    os.replace(self.parts / name, self.path / "damaged" / name)

    # ---- reading ----

    def refresh(self) -> dict[str, str]:
        """Read the keys of parts that were not there before.

        Every part is checked against the hash in its name. Each process of a run calls this.

        Returns:
            The names of damaged parts with the reason; what they held is missing.
        """
        damaged = {}
        names = sorted(p.name for p in self.parts.glob("*.parquet")) if self.parts.is_dir() else []
        for name in names:
            if name in self._keys:
                continue
            try:
                self._keys[name] = self._read_keys(name)
            except FileNotFoundError:  # moved away by another run, as damaged
                continue
            except (ValueError, OSError, pa.ArrowException) as error:
                damaged[name] = str(error).splitlines()[0]
        if self._keys:
            self._sorted = np.unique(np.concatenate([*self._keys.values()]))
        return damaged

    def _read_keys(self, name: str) -> np.ndarray:
        data = (self.parts / name).read_bytes()
        if _sha256(data) != name.removesuffix(".parquet"):
            raise ValueError("its contents are not those that were written")
        file = pq.ParquetFile(pa.BufferReader(data))
        mark = (file.schema_arrow.metadata or {}).get(b"reference", b"").decode()
        if mark != self._mark:
            raise ValueError("it is of another reference")
        return _key_array(file.read(["key"]).column("key"))

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys, of any shape, the store does not have: bool, of that shape."""
        return ~among(keys, self._sorted)

    def entries(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The stored sequences of some keys, a few thousand at a time, in the parts' order.

        Args:
            keys: [n] of `KEY`, which may have equal ones.

        Yields:
            Where in keys the sequences are, [m] int64; the first log-prob of each, [m + 1] int64,
            with the end of the last; and the log-probs, float32. Each position comes once.

        Raises:
            ValueError: a key that the store does not have.
        """
        unique, inverse = np.unique(keys, return_inverse=True)
        order = np.argsort(inverse.reshape(-1), kind="stable")
        firsts = np.searchsorted(inverse.reshape(-1)[order], np.arange(len(unique) + 1))
        missing = np.ones(len(unique), bool)
        for name, part_keys in self._keys.items():
            if not missing.any():
                return
            if not among(part_keys, unique).any():
                continue
            with pq.ParquetFile(self.parts / name, memory_map=True) as file:
                for batch in file.iter_batches(READ_ROWS):
                    batch_keys = _key_array(batch.column("key"))
                    places = np.searchsorted(unique, batch_keys).clip(max=len(unique) - 1)
                    hit = (unique[places] == batch_keys) & missing[places]
                    rows, first = np.unique(places[hit], return_index=True)
                    rows_of_batch = np.flatnonzero(hit)[first]  # of equal keys the first
                    missing[rows] = False
                    if not len(rows):
                        continue
                    logps = batch.column("logps").take(pa.array(rows_of_batch))
                    offsets = logps.offsets.to_numpy().astype(np.int64)
                    values = logps.values.to_numpy()
                    repeats = firsts[rows + 1] - firsts[rows]
                    if (repeats == 1).all():
                        yield order[firsts[rows]], offsets, values
                        continue
                    yield _repeated(order, firsts, rows, offsets, values)
        if missing.any():
            raise ValueError(
                f"reference store {self.path} lacks {int(missing.sum())} of {len(unique)} sequences"
            )

    def token_logps(self, keys: np.ndarray) -> list[np.ndarray]:
        """The log-probs of the labelled tokens of each key's sequence, float32 arrays.

        Raises:
            ValueError: as `entries`.
        """
        out = [np.empty(0, np.float32)] * len(keys)
        for places, offsets, values in self.entries(keys):
            for place, start, stop in zip(places, offsets[:-1], offsets[1:], strict=True):
                out[place] = values[start:stop].copy()
        return out

    def sums(
        self, keys: np.ndarray, shared: np.ndarray | None = None, ld_alpha: float = 1.0
    ) -> np.ndarray:
        """The log-prob of each key's sequence in nats, [n] float32.

        Args:
            keys: [n] of `KEY`.
            shared: [n] the length of the pair's shorter answer, for LD-DPO; else None.
            ld_alpha: weight of the tokens beyond it.

        Raises:
            ValueError: as `entries`.
        """
        out = np.empty(len(keys), np.float32)
        for places, offsets, values in self.entries(keys):
            running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
            total = running[offsets[1:]] - running[offsets[:-1]]
            if shared is not None:
                ends = np.minimum(offsets[:-1] + shared[places], offsets[1:])
                head = running[ends] - running[offsets[:-1]]
                total = head + ld_alpha * (total - head)
            out[places] = total
        return out

    def writer(self) -> PartWriter:
        """A writer of new sequences, for one process of the run that has the lock."""
        return PartWriter(self.write)

    def write(self, keys: list[np.ndarray], counts: list[np.ndarray], values: list) -> None:
        """Write a part: keys, labelled tokens per sequence, and their log-probs."""
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
        lists = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(np.concatenate(values)), type=_SCHEMA.field("logps").type
        )
        data = pa.py_buffer(np.concatenate(keys).tobytes())
        size = len(offsets) - 1
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), size, [None, data])
        schema = _SCHEMA.with_metadata({"reference": self._mark, "version": str(VERSION)})
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.Table.from_arrays([column, lists], schema=schema),
            sink,
            compression="none",  # random numbers
            use_dictionary=False,
            write_statistics=False,
            row_group_size=READ_ROWS,
        )
        text = sink.getvalue().to_pybytes()
        target = self.parts / f"{_sha256(text)}.parquet"
        beside = self.parts / f".{uuid.uuid4().hex}.new"
        with disk_errors(f"reference store {self.path} could not be extended"):
            try:
                with open(beside, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, target)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            sync_directory(self.parts)


def _read_store_file(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
        version = value["version"]
        intact = value["sha256"] == _checksum(value) and isinstance(value["identity"], dict)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__})") from error
    if version != VERSION:
        raise ValueError(f"{file} has version {version}, and this fastpref reads {VERSION}")
    if not intact:
        raise ValueError(f"{file} is damaged: its checksum is another")
    return value


def _key_array(column: Any) -> np.ndarray:
    """A column of fixed-size binary values as an array of `KEY`."""
    if isinstance(column, pa.ChunkedArray):
        arrays = [_key_array(chunk) for chunk in column.chunks]
        return np.concatenate(arrays) if arrays else np.empty(0, KEY)
    data = np.frombuffer(column.buffers()[1], np.uint8)
    start = column.offset * KEY_BYTES
    return data[start : start + len(column) * KEY_BYTES].copy().view(KEY)


def _repeated(
    order: np.ndarray, firsts: np.ndarray, rows: np.ndarray, offsets: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`ReferenceStore.entries` of sequences that are at several positions of keys."""
    places, pieces = [], []
    for i, row in enumerate(rows):
        positions = order[firsts[row] : firsts[row + 1]]
        places.append(positions)
        pieces += [values[offsets[i] : offsets[i + 1]]] * len(positions)
    ends = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return np.concatenate(places), ends, np.concatenate(pieces)
