"""The part of a trainer that saves and resumes: complete checkpoints, and one run per directory."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from fastpref.heads.reading import unwrap
from fastpref.storage import (
    StorageError,
    check_room,
    disk_problem,
    sync_directory,
)
from fastpref.trainer.ending import DueEvaluation, EndingTrainer, raise_ended
from fastpref.trainer.identity import (
    describe_run,
    differences,
    fingerprint,
    untrained_weights,
    why_never,
)
from fastpref.trainer.manifest import (
    check_state,
    newest_complete,
    next_number,
    problem_with,
    read_manifest,
    remove_checkpoint,
    rotate,
    write_manifest,
)
from fastpref.trainer.output_directory import OutputDirectory
from fastpref.trainer.pickles import readable, readable_weights
from fastpref.trainer.saving import SavingTrainer
from fastpref.trainer.signals import RunEnded, SignalCallback, name_of

logger = logging.getLogger("fastpref")
_STAGING = ".saving"  # where a checkpoint is written before it takes its name


class CheckpointingTrainer(SavingTrainer, EndingTrainer):
    """A trainer whose checkpoints are complete or absent. Its output directory belongs to one run.

    Attributes:
        output_directory: the directory of `args.output_dir`, which a run holds while it trains.
    """

    precompute: bool  # whether the reference's log-probs are computed ahead of the training
    _loss_options: Any
    _weights: dict[str, str | None]
    _run: dict[str, Any] | None = None  # what this run is
    _saved: tuple[int, int] | None = None  # of the newest checkpoint: which training, which step
    _trainings = 0
    _earlier_loss = 0.0  # sum over the steps before the checkpoint that this run resumes from
    _staging: Path | None = None
    _limit: int | None = None  # save_total_limit

    def start_checkpoints(self, reference: Any) -> None:
        """Called once, before the first step.

        Args:
            reference: the model that reference log-probs come from, unless it is the policy
                without its adapter; None if they are in the data or the loss needs none.
        """
        self._weights = untrained_weights(self.model, reference)
        self.output_directory = OutputDirectory(str(self.args.output_dir))
        self._signals = SignalCallback(saves=True)
        if self.args.handle_signals:
            self.add_callback(self._signals)
        self.add_callback(DueEvaluation(self))

    # ---- a run ----

    def run_training(self, resume: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`transformers.Trainer.train`, in a directory that is this run's while it trains.

        Args:
            resume: a checkpoint's directory; True or "latest": the newest complete one; "auto": the
                same, or a new run if there is none; None or False: a new run.
        """
        self._run = self.describe_run()
        self._trainings += 1
        first = self.args.should_save
        if first:
            self.on_first(self.output_directory.hold)
        else:
            self.on_first(None)
        try:
            checkpoint = self.on_first(lambda: self._start_of(resume))
            self._signals.reset()
            if self.args.handle_signals:
                timeout = self.args.ddp_timeout_delta
                self._signals.install(self.args.world_size, timeout=timeout)
            with self._own_rotation(), self.beside_other_trainings():
                out = super().train(checkpoint, *args, **kwargs)
        except RunEnded:  # in an evaluation that a callback has started
            self._raise_if_ended()
            raise
        finally:
            self._signals.remove()
            self.output_directory.release()
        self._raise_if_ended()
        self.check_same_weights()
        mean = out.metrics.get("train_loss", out.training_loss)  # as `log` has it
        return TrainOutput(out.global_step, mean, out.metrics)

    @contextmanager
    def _own_rotation(self) -> Iterator[None]:
        """`rotate` alone deletes checkpoints.

        With save_total_limit=1 transformers would end by deleting the newest one, if the best one
        is older: a run that was ended would go on from the best one.
        """
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = self._limit

    def _start_of(self, resume: str | bool | None) -> str | None:
        """The checkpoint that a run starts from, checked; None for a new run."""
        output = self.output_directory
        path: Path | None = None
        if resume is True or resume in ("latest", "auto"):
            path, passed_over = newest_complete(output.path)
            for sentence in passed_over:
                logger.warning(sentence)
            if path is None and resume != "auto":
                raise ValueError(f"there is no complete checkpoint in {output.path}")
        elif resume:
            path = Path(str(resume))
            self._check_complete(path)
        if path is None:
            self._begin()
        else:
            self._check_same_run(path)
            path = path.resolve()  # a link may name it
            if path.parent == output.path.resolve():
                path = output.path / path.name
                output.go_on()
            else:
                self._begin()
            logger.warning(f"continuing from {path}")
        shutil.rmtree(output.path / _STAGING, ignore_errors=True)
        if self.args.save_strategy != "no":
            check_room(output.path, self.checkpoint_bytes())
        return None if path is None else str(path)

    def _begin(self) -> None:
        """Start a new run in the output directory."""
        output, overwrite = self.output_directory, bool(self.args.overwrite_output_dir)
        if overwrite:
            config = getattr(unwrap(self.model), "config", None)
            output.check_not_source(getattr(config, "_name_or_path", ""))
        removed = output.begin(overwrite)
        if removed:
            logger.warning(f"{output.path}: removed another run's {', '.join(removed)}")

    def _check_complete(self, path: Path) -> None:
        problem = problem_with(path)
        if problem is None:
            return
        other, _ = newest_complete(path.parent)
        instead = "" if other is None else f"; {other} is complete"
        raise ValueError(f"cannot continue from {path}: {problem}{instead}")

    def _check_same_run(self, path: Path) -> None:
        """Raise ValueError unless a checkpoint can be continued by this run."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
                if not (path / name).is_file():
                    raise ValueError(
                        f"cannot continue from {path}: it has no {name}; a checkpoint that was "
                        "saved with save_only_model=True is a model, not a run"
                    )
        check_state(path / "trainer_state.json")
        assert self._run is not None
        saved = read_manifest(path)["run"]
        if never := why_never(saved, self._run):
            raise ValueError(
                f"{path} was saved by another run: {'; '.join(never)}; what it holds does not fit "
                "this run, not even with resume_anyway"
            )
        changes = differences(saved, self._run)
        if not changes:
            return
        text = f"{path} was saved by another run: {'; '.join(changes)}"
        if not self.args.resume_anyway:
            raise ValueError(
                f"{text}. Continue with what it was saved with, or say resume_anyway=True "
                "(--resume-anyway)"
            )
        logger.warning(f"{text}; continuing all the same")

    def checkpoint_bytes(self) -> int:
        """The approximate bytes of a checkpoint: weights, and AdamW's states of trained ones."""
        model: Any = self.model
        weights = trained = 0
        for p in model.parameters():
            size = p.numel() * p.element_size()
            trained += size if p.requires_grad else 0
            weights += size
        saved = trained if getattr(model, "peft_config", None) else weights
        return saved + 2 * trained + (1 << 20)

    def describe_run(self) -> dict[str, Any]:
        """What this run is, as a checkpoint's manifest keeps it."""
        data = self.on_first(lambda: fingerprint(self._identity_data()))
        return describe_run(self.args, self.model, data, self._loss_options, self._weights)

    def _identity_data(self) -> Any:
        """The training data without log-probs of the reference that the run has computed itself."""
        data: Any = self.train_dataset
        columns = getattr(data, "column_names", None) or []
        computed = [name for name in self.reference_columns() if name in columns]
        return data.remove_columns(computed) if self.precompute and computed else data

    def _raise_if_ended(self) -> None:
        number = self._signals.received
        if number is None:
            return
        newest, _ = newest_complete(self.output_directory.path)
        state = f"{self.state.global_step} of {self.state.max_steps} steps are done"
        message = f"{name_of(number)} ended the run: {state}"
        if newest is not None:
            message += (
                f" and {newest} is saved; resume_from_checkpoint=True (--resume latest) goes on"
            )
        raise_ended(number, message)

    # ---- steps that earlier runs made ----

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        passes, batches = super()._init_training_state(*args, **kwargs)
        values = [*args, *kwargs.values()]  # the checkpoint's folder is the only string
        self.resumed_from = next((v for v in values if isinstance(v, str)), None)
        self._find_best(self.resumed_from)
        callbacks: Any = self.state.stateful_callbacks or {}
        saved = callbacks.get(self.STATE_KEY, {})
        self._earlier_loss = saved.get("loss_sum", 0.0)
        self.evaluation_is_due = saved.get("evaluation_is_due", False)
        if self.state.global_step >= self.state.max_steps > 0:
            done = f"{self.state.global_step} of {self.state.max_steps} steps"
            logger.warning(f"this run is finished, with {done}: there is nothing left to train")
            return sys.maxsize, 0  # no pass is left
        return passes, batches

    def _find_best(self, checkpoint: str | None) -> None:
        """Look for the best checkpoint beside the one that is resumed.

        A checkpoint's state has the path that the best one had when the state was saved. The
        directory may have been moved since, or the path may be relative to another working
        directory.
        """
        if checkpoint is None or not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
            return
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.best_model_checkpoint:
            moved = Path(checkpoint).parent / Path(state.best_model_checkpoint).name
            if moved.is_dir():
                self.state.best_model_checkpoint = str(moved)

    STATE_KEY = "fastpref"  # in trainer_state.json, under stateful_callbacks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`; train_loss is the mean over all steps of a resumed run."""
        steps = self.state.global_step
        if "train_loss" in logs and steps:
            steps_here = steps - getattr(self, "_initial_global_step", 0)
            logs["train_loss"] = (
                self._earlier_loss + logs["train_loss"] * max(steps_here, 0.001)
            ) / steps
        super().log(logs, start_time)

    def _loss_sum_so_far(self) -> float:
        pending = getattr(self, "_tr_loss", None)
        if pending is not None:
            pending = self.accelerator.gather(pending.detach().reshape(1)).mean().item()
        return self._earlier_loss + getattr(self, "_total_loss_scalar", 0.0) + (pending or 0.0)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._signals.received is not None:  # the run is to end soon
            return
        with readable_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if getattr(self.accelerator, "scaler", None) is not None:  # with fp16
            with readable(checkpoint, "scaler.pt"):
                super()._load_scaler(checkpoint)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        directory = super()._get_output_dir(trial)
        is_own = directory == self.args.output_dir  # not that of a trial of a search
        return str(self.output_directory.path) if is_own else directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside the others and give it its name when it is complete."""
        mark = self._trainings, self.state.global_step
        if self._saved == mark:  # a pass and the run can end with the same step
            return
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        state: Any = self.state.stateful_callbacks
        saved = state.setdefault(self.STATE_KEY, {})
        saved["loss_sum"] = self._loss_sum_so_far()
        saved["evaluation_is_due"] = self.evaluation_is_due
        best = self.state.best_model_checkpoint
        try:
            with self._staged(run / _STAGING), self._not_pushed():
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                is_best = self.state.best_model_checkpoint != best
                if is_best:  # on every process, by the name that it will have
                    self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self._finish(run, name, is_best)
        except Exception as error:
            problem = disk_problem(error)
            shutil.rmtree(run / _STAGING, ignore_errors=True)
            if problem is None:
                raise
            raise StorageError(self._lost(run, name, problem)) from error
        self.accelerator.wait_for_everyone()
        self._saved = mark
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    @contextmanager
    def _staged(self, folder: Path) -> Iterator[None]:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = folder
        try:
            yield
        finally:
            self._staging = None

    def _finish(self, run: Path, name: str, is_best: bool) -> None:
        staged, final = run / _STAGING / name, run / name
        if is_best:
            self.state.save_to_json(str(staged / "trainer_state.json"))
        assert self._run is not None
        run_facts = {**self._run, "processes": self.args.world_size}
        write_manifest(staged, self.state.global_step, run_facts, next_number(run))
        if os.path.lexists(final):
            remove_checkpoint(final)
        os.rename(staged, final)
        sync_directory(run)
        shutil.rmtree(run / _STAGING, ignore_errors=True)
        protected = self.state.best_model_checkpoint
        rotate(run, self._limit, Path(protected) if protected else None)

    def _lost(self, run: Path, name: str, problem: str) -> str:
        newest, _ = newest_complete(run)
        if newest is not None and newest.name == name:  # only what follows has failed
            return f"{run}: {problem}, after {newest} was saved; --resume latest continues from it"
        safe = "no checkpoint was saved before it"
        if newest is not None:
            safe = f"{newest} is complete; --resume latest continues from it"
        return f"{name} could not be saved in {run}: {problem}; {safe}"

    # ---- what a trainer says ----

    def reference_columns(self) -> tuple[str, ...]:
        """The columns that reference log-probs are in."""
        raise NotImplementedError
