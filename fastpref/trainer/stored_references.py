"""The trainers' side of a `ReferenceStore`: what it lacks is computed, the rest is read."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastpref.reference.identity import describe_reference, identity_differences
from fastpref.reference.keys import DataKeys, data_keys, labelled, sequence_keys
from fastpref.reference.model import Reference
from fastpref.reference.precompute import check_has_length, extend_store
from fastpref.reference.store import ReferenceStore
from fastpref.trainer.division import engine_dtype, trained_form
from fastpref.trainer.ending import EndingTrainer

logger = logging.getLogger("fastpref")
WAIT_SECONDS = 1.0  # between two tries to get the lock
VISIBLE_SECONDS = 30.0  # after which a file that another process wrote is said to be missing
SPOT_ROWS = 3
# The mean difference, in nats a token, that rounding explains: other batches, other devices.
SPOT_TOLERANCE, SPOT_TOLERANCE_16_BIT = 0.01, 0.1


class StoringTrainer(EndingTrainer):
    """The part of a trainer that reads the reference's log-probs from a store, and extends it.

    Attributes:
        reference_store: the store of `args.reference_store`, or None.
    """

    ld_alpha: float | None
    data_collator: Any
    _padded_collator: Any = None  # the collator of separate rows, where batches have others
    reference_store: ReferenceStore | None = None
    _spot_checked = False
    _is_set_up = False  # whether the trainer is made, so that the user may have changed the model

    def open_store(self, model: Any, adapter: bool) -> None:
        """Set up `args.reference_store` before the reference is wrapped for several processes.

        Args:
            model, adapter: as in `Reference`.

        Raises:
            ValueError: the store is of another reference, or the weights are in shards.
        """
        args = self.args
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
        if engine_dtype(self.accelerator) is not None:
            dtype = "none"  # the weights have it, and there is no autocast

        def describe() -> dict[str, Any]:
            with trained_form(model, self.accelerator) as trained:
                return describe_reference(
                    trained, adapter=adapter, compute_dtype=dtype, precision=args.precision
                )

        self._describe = describe
        store = ReferenceStore(str(args.reference_store), self.on_first(self._describe))
        store.adopt(self.on_first(store.check))
        self.reference_store = store
        self._damaged: dict[str, str] = {}

    @property
    def padded_collator(self) -> Any:
        """The collator of separate rows, whose tokens identify an entry of the store."""
        return self._padded_collator or self.data_collator

    def with_stored(self, dataset: Any, name: str, reference: Reference | None, size: int) -> Any:
        """Prepared data with the columns of the reference's log-probs, from the store.

        Args:
            name: what progress and errors call the data.
            reference: computes what the store lacks; None: the data stays as it is if the store
                lacks any of it.
            size: rows per batch and process.
        """
        store, args = self.reference_store, self.args
        assert store is not None
        check_has_length(dataset, "reference_store")
        quiet = bool(args.disable_tqdm) or not self.is_world_process_zero()
        dataset_keys = data_keys(
            dataset, self.padded_collator, self.reference_parts, name=name, disable_tqdm=quiet
        )
        rows = self._lacking(dataset_keys)
        if len(rows) and reference is None:
            return dataset
        if reference is not None and len(rows) < len(dataset_keys.keys) and not self._spot_checked:
            present = np.setdiff1d(np.arange(len(dataset_keys.keys)), rows)
            self._spot_check(dataset, present, dataset_keys.lengths[present], reference)
        if len(rows):
            assert reference is not None
            if self._is_set_up:
                self.on_first(self._check_unchanged)
            with self._writing():
                rows = self._lacking(dataset_keys)  # another run may have written them
                self._say_what_is_there(len(dataset_keys.keys), len(rows), name)
                if len(rows):
                    extend_store(
                        store,
                        dataset.select(rows),
                        dataset_keys.select(rows),
                        self._token_logps(reference),
                        self.reference_parts,
                        self.data_collator,
                        self.accelerator,
                        batch_size=size,
                        name=name,
                        num_workers=args.dataloader_num_workers,
                        disable_tqdm=quiet,
                    )
                self.finish_batches()
                self.accelerator.wait_for_everyone()
            self._wait_until_visible(dataset_keys)
        return self._with_sums(dataset, dataset_keys)

    def _token_logps(self, reference: Reference) -> Any:
        def token_logps(batch: dict[str, Any]) -> torch.Tensor:
            self.end_before_batch()
            return reference.token_logps(batch)

        return token_logps

    def _with_sums(self, dataset: Any, dataset_keys: DataKeys) -> Any:
        assert self.reference_store is not None
        shared = None
        if self.ld_alpha is not None:
            shared = np.repeat(dataset_keys.tokens.min(1), dataset_keys.tokens.shape[1])
        alpha = 1.0 if self.ld_alpha is None else self.ld_alpha
        sums = self.reference_store.sums(dataset_keys.keys.reshape(-1), shared, alpha).reshape(
            dataset_keys.keys.shape
        )
        for i, column in enumerate(self.reference_columns()):
            dataset = dataset.add_column(column, sums[:, i])
        return dataset

    # ---- what the store has ----

    def _refresh(self) -> None:
        store = self.reference_store
        assert store is not None
        for name, reason in store.refresh().items():
            if name not in self._damaged and self.is_world_process_zero():
                logger.warning(
                    f"reference store {store.path}: part {name[:12]}... is left out, since "
                    f"{reason}; its sequences are computed again where they are needed"
                )
            self._damaged[name] = reason

    def _lacking(self, dataset_keys: DataKeys) -> np.ndarray:
        """The rows, without repetitions, that have a sequence which the store lacks."""
        assert self.reference_store is not None
        self._refresh()
        store = self.reference_store

        def rows() -> np.ndarray:
            lacking = np.flatnonzero(store.missing(dataset_keys.keys.reshape(-1)))
            _, firsts = np.unique(dataset_keys.keys.reshape(-1)[lacking], return_index=True)
            return np.unique(lacking[firsts] // dataset_keys.keys.shape[1])

        return self.on_first(rows)  # a shared file system may show files late to some processes

    def _say_what_is_there(self, rows: int, lacking: int, name: str) -> None:
        store = self.reference_store
        assert store is not None
        if 0 < lacking < rows and self.is_world_process_zero():
            logger.warning(
                f"reference store {store.path} lacks sequences of {lacking} of {rows} rows "
                f"of {name} data, which are computed now"
            )

    def _wait_until_visible(self, dataset_keys: DataKeys) -> None:
        """Read what all processes have written; ValueError if this process cannot see it."""
        store = self.reference_store
        assert store is not None
        deadline = time.monotonic() + VISIBLE_SECONDS
        self._refresh()
        while store.missing(dataset_keys.keys).any():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"reference store {store.path}: process {self.args.process_index} does "
                    "not see all that the processes of this run have written; expected a directory "
                    "that all of them share"
                )
            time.sleep(WAIT_SECONDS)
            self._refresh()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the store's lock, for which another run is waited for."""
        store = self.reference_store
        assert store is not None
        waits = False
        # Every try is one of all processes, so that none waits in a collective until it times out.
        while not self.on_first(store.try_lock):
            if not waits and self.is_world_process_zero():
                logger.warning(
                    f"reference store {store.path} is being written by another run, whose end this "
                    "run waits for"
                )
            waits = True
            self.end_before_batch()
            time.sleep(WAIT_SECONDS)
        try:
            store.adopt(self.on_first(self._begin_writing))
            yield
        finally:
            store.release()

    def _begin_writing(self) -> dict[str, Any]:
        assert self.reference_store is not None
        written = self.reference_store.create()
        self.reference_store.tidy(list(self._damaged))
        return written

    # ---- whether it fits ----

    def _check_unchanged(self) -> None:
        """Raise ValueError if the reference is no longer the one that the store is of."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # the weights are in shards now
            return
        assert self.reference_store is not None
        present = json.loads(json.dumps(self._describe()))
        changes = identity_differences(self.reference_store.identity, present)
        if changes:
            raise ValueError(
                f"reference store {self.reference_store.path} lacks rows of this data, and the "
                f"reference has changed since the trainer was made: {'; '.join(changes)}; expected "
                "a trainer that is made with this data"
            )

    def _spot_check(
        self, dataset: Any, rows: np.ndarray, lengths: np.ndarray, reference: Reference
    ) -> None:
        """Compute a few stored rows again. ValueError if they differ by more than rounding.

        The longest row is one of them, since sliding windows and scaled positions change long rows
        alone.
        """
        store = self.reference_store
        assert store is not None
        draw = np.random.default_rng(self.args.seed)
        longest = int(np.argmax(lengths))
        others = np.delete(rows, longest)
        drawn = draw.choice(others, min(SPOT_ROWS - 1, len(others)), replace=False)
        chosen = np.sort(np.append(drawn, rows[longest]))
        batch: Any = self._prepare_inputs(self.padded_collator([dataset[int(i)] for i in chosen]))
        total, tokens = 0.0, 0
        for part in self.reference_parts(batch):
            present = labelled(part, reference.token_logps(part))
            stored = np.concatenate(store.token_logps(sequence_keys(part)[0]))
            total += float(np.abs(present.astype(np.float64) - stored).sum())
            tokens += len(present)
        mean = torch.tensor([total / max(tokens, 1)], device=self.accelerator.device)
        difference = float(self.accelerator.gather(mean).max())
        computed, weights = (str(store.identity[f"{n} dtype"]) for n in ("compute", "weights'"))
        is_full = computed == "none" and {*weights.split(", ")} <= {"float32", "float64"}
        allowed = SPOT_TOLERANCE if is_full else SPOT_TOLERANCE_16_BIT
        if not difference <= allowed:
            numbers = ", ".join(str(dataset[int(i)].get("row", i)) for i in chosen)
            raise ValueError(
                f"reference store {store.path} does not fit this run: rows {numbers}, computed "
                f"again, differ by {difference:.3g} nats a token, and rounding explains "
                f"{allowed:g}. The reference's weights and config are those of the store, so that "
                "its code has changed (positions, attention, precision), or its config and the "
                "store is of a version that kept none; choose another directory"
            )
        self._spot_checked = True

    # ---- defined by a subclass ----

    def reference_columns(self) -> tuple[str, ...]:
        """The columns of reference log-probs."""
        raise NotImplementedError

    def reference_parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The batches of sequences that the reference is asked for, in the order of the columns."""
        return [batch]
