"""The command line: `fastpref train`, `check-data`, `verify`, `profile`, `plan` and others.

An error ends with one sentence on stderr, or with a traceback under `--debug`, and with an exit
status of `fastpref.cli.exit_codes`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]

import torch

from fastpref import backends
from fastpref.backends.huge_pages import TORCH_SETTING
from fastpref.cli import doctor, exit_codes

NEEDED = ("transformers", "accelerate", "datasets", "peft", "typer", "rich", "matplotlib")
_TRAIN = ("train", "demo", "precompute")
MOST = 2**31 - 1  # of a whole number; a seed has a limit of its own
app: Any = None  # the typer application; None where typer is not installed


def main() -> None:
    """Entry point of the `fastpref` command."""
    if sys.argv[1:2] and sys.argv[1] in _TRAIN:  # a trainer would set it too late
        os.environ.setdefault(TORCH_SETTING, "1")
    for stream in (sys.stdout, sys.stderr):  # a log file's encoding may lack a word of the data
        # A file that has become a pipe, which has no position.
        with contextlib.suppress(OSError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    if app is not None:
        app(prog_name="fastpref")
    elif sys.argv[1:2] == ["doctor"]:  # it works where only torch is installed
        doctor.run(as_json="--json" in sys.argv[2:])
    else:
        print(missing_packages(), file=sys.stderr)
        sys.exit(2)


def missing_packages() -> str | None:
    """One sentence that says what to install; None if nothing is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return None
    return f"fastpref: {', '.join(missing)} not installed; run: pip install 'fastpref[train]'"


def sentence(error: BaseException) -> str:
    """The message of an error on one line; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def speaker() -> str:
    """The start of an error message: "fastpref", and the process's rank unless that is 0."""
    rank = os.environ.get("RANK", "0")
    return "fastpref" if rank == "0" else f"fastpref (process {rank})"


def check_backend() -> None:
    """Raise if FASTPREF_BACKEND names a backend that cannot run where this process will train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends.choose(device, torch.float32)


def check_numbers(options: dict[str, Any]) -> None:
    """Raise ValueError for a whole number that libraries below could not hold."""
    for name, value in options.items():
        if name != "seed" and isinstance(value, int) and value > MOST:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}; expected at most {MOST}")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors turned into one sentence on stderr and an exit status."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        if missing := missing_packages():
            typer.echo(missing, err=True)
            raise typer.Exit(2)
        try:
            check_numbers(options)
            check_backend()  # before anything is loaded
        except (RuntimeError, ValueError) as error:
            typer.echo(f"{speaker()}: {sentence(error)}", err=True)
            raise typer.Exit(exit_codes.INPUT) from None
        try:
            command(**options)
        except KeyboardInterrupt as error:
            typer.echo(f"{speaker()}: {str(error) or 'interrupted'}", err=True)
            raise typer.Exit(exit_codes.CTRL_C) from None
        except SystemExit as error:
            if error.code != exit_codes.SIGTERM:
                raise
            typer.echo(f"{speaker()}: {error}", err=True)
            raise typer.Exit(exit_codes.SIGTERM) from None
        except typer.Exit:
            raise
        except Exception as error:
            if options["debug"]:
                raise
            text, code = sentence(error), exit_codes.exit_code(error, options.get("output"))
            if code == exit_codes.OURS:
                if not isinstance(error, RuntimeError):
                    text = f"{type(error).__name__}: {text}"  # a KeyError's message is its key
                text += " (--debug shows the traceback)"
            elif exit_codes.no_memory(error):
                text += "; fastpref plan --why-oom says what takes less memory"
            elif code == exit_codes.RESUMABLE:
                text = f"another process of this run was lost ({text})"
                text += "; --resume latest goes on from the newest complete checkpoint"
            typer.echo(f"{speaker()}: {text}", err=True)
            raise typer.Exit(code) from None

    return run


def _build() -> Any:
    from fastpref.cli import bench, check_data, demo, plan, precompute, profile, train, verify

    application = typer.Typer(
        help="Preference optimisation (DPO, IPO) without logits.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    application.command("train", epilog=exit_codes.HELP)(guarded(train.command))
    application.command("check-data", epilog=exit_codes.HELP)(guarded(check_data.command))
    application.command("verify", epilog=exit_codes.HELP)(guarded(verify.command))
    application.command("precompute", epilog=exit_codes.HELP)(guarded(precompute.command))
    application.command("profile", epilog=exit_codes.HELP)(guarded(profile.command))
    application.command("plan", epilog=exit_codes.HELP)(guarded(plan.command))
    application.command("bench", epilog=exit_codes.HELP)(guarded(bench.command))
    application.command("demo", epilog=exit_codes.HELP)(guarded(demo.command))

    @application.command("doctor")
    def doctor_command(
        as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
    ) -> None:
        """Show versions, CPU features, devices, and which backends work and why not."""
        doctor.run(as_json=as_json)

    return application


if typer is not None:
    app = _build()
