"""The head: DPO loss, forward and backward, from hidden states to gradients, against the peers.

`python benchmarks/head.py --help` has the options, which fastpref/bench/arguments.py reads.
`fastpref bench` is the same measurement for an installed package.
"""

from pathlib import Path

from fastpref.bench.arguments import main

if __name__ == "__main__":
    main(folder=Path(__file__).resolve().parent / "results")
