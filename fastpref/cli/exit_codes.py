"""The exit statuses of the command line, for scripts and schedulers."""

from __future__ import annotations

from pathlib import Path

DONE, OURS, INPUT, NOT_FINITE, STORAGE, RESUMABLE, FINDINGS = 0, 1, 2, 3, 4, 5, 6
CTRL_C, SIGTERM = 130, 143

HELP = """Exit status: 0 done; 1 a fault of fastpref; 2 the input, or too little memory for it; 3 a
loss, gradient or weight that is not finite; 4 the disk; 5 interrupted and resumable, as by a
process that was lost; 6 findings of check-data or verify, a plan that does not fit, a regression
or a wrong result of bench; 130 Ctrl-C; 143 SIGTERM."""

# Errors of the input: their message explains them.
_INPUT_ERRORS = (ValueError, OSError, ImportError, ArithmeticError)
# Parts of the message of an allocation that failed, on a CPU or a GPU.
_NO_MEMORY = ("out of memory", "allocate memory", "unable to allocate")
# Parts of the message of a process that waited for another one which died.
_LOST = ("connection closed by peer", "connection reset by peer", "nccl", "gloo", "socket timeout")


def no_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def exit_code(error: BaseException, output: Path | None = None) -> int:
    """The exit status for an error.

    Args:
        output: the output directory of the command, which may hold a checkpoint.
    """
    from fastpref.storage import StorageError, is_of_disk
    from fastpref.trainer.manifest import MANIFEST, checkpoints
    from fastpref.trainer.metrics import NonFiniteLossError

    if isinstance(error, NonFiniteLossError):
        return NOT_FINITE
    if isinstance(error, StorageError) or is_of_disk(error):
        return STORAGE
    if isinstance(error, _INPUT_ERRORS) or no_memory(error):
        return INPUT
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST):
        saved = checkpoints(output) if output is not None else iter(())
        if any((path / MANIFEST).is_file() for _, path in saved):
            return RESUMABLE
    return OURS
