"""What a training step takes with fastpref, with eager logits and with TRL: the figures of
docs/profile.md.

    python benchmarks/training_profile.py --model DIR --data FILE [--output profile]

It is `fastpref profile` with its defaults, on a model and data of one's own. Writes a JSON to
benchmarks/results/, without the memory over time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from lib import profile_report, results

from fastpref.profiling import profile_training


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory of a model with its tokenizer")
    parser.add_argument("--name", help="the model's name on the page; the directory's by default")
    parser.add_argument("--data", required=True, help="pairs, as fastpref profile reads them")
    parser.add_argument("--sides", default="fastpref,eager,trl", help="what is measured")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each side")
    parser.add_argument("--output", default="profile", help="name of the file in results/, or path")
    args = parser.parse_args(argv)

    def hear(side: str, message: dict[str, Any]) -> None:
        if "step" in message:
            print(
                f"{side}: step {message['step']} of {message['of']}, {message['seconds']:.2f} s",
                file=sys.stderr,
                flush=True,
            )

    machine, begun = results.machine(), time.perf_counter()
    profile = profile_training(
        args.model,
        args.data,
        sides=args.sides.split(","),
        max_length=args.max_length,
        steps=args.steps,
        hear=hear,
    )
    found = profile.as_dict()
    for side in found["sides"]:
        del side["timeline"]
    found["settings"]["model"] = args.name or Path(args.model).name
    for batches in (found["batches"]["timed"], found["batches"]["longest"]):
        for batch in batches:
            del batch["lengths"]
    found = {
        "benchmark": "training_profile: fastpref profile with its defaults",
        "machine": machine,
        "wall_s": round(time.perf_counter() - begun, 1),
        **found,
    }
    results.write_json(results.results_path(args.output), found)
    print(profile_report.tables(found))


if __name__ == "__main__":
    main()
