"""Options that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from fastpref.cli.losses import LOSS_HELP, OPTION_HELP, PAIR_LOSS_HELP, PAIR_OPTION_HELP
from fastpref.cli.train_options import CpuLinear, Precision

Data = Annotated[
    str,
    typer.Option(
        help="Preference pairs, or labelled answers: .jsonl, .json, .csv, .parquet or a hub name."
    ),
]
Pairs = Annotated[
    str, typer.Option(help="Preference pairs: .jsonl, .json, .csv, .parquet or a hub name.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pairs or answers per device.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")]
LogitsPrecision = Annotated[Precision, typer.Option(help="Logits in fp32 (exact) or bf16 (fast).")]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--fp32", help="Mixed bf16 or plain fp32; by default what the machine is fast at."
    ),
]
LinearProduct = Annotated[
    CpuLinear,
    typer.Option(
        help="Whose matrix product the model's Linear layers take on a CPU; auto: fastpref's "
        "where it is at least 1.2 times as fast as torch's."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
]
Loss = Annotated[str, typer.Option(help=LOSS_HELP)]
LossOptions = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help=OPTION_HELP)]
PairLoss = Annotated[str, typer.Option(help=PAIR_LOSS_HELP)]
PairLossOptions = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help=PAIR_OPTION_HELP)
]
Beta = Annotated[float, typer.Option(help="Strength of the pull to the reference.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")]
