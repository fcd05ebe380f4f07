"""How benchmarks/columns_training.py judges a run, and the filter of blocks of columns.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def save(folder, name, shift):
    from safetensors.torch import save_file

    weights = {"model.layers.0.up.weight": torch.zeros(2, 3), "lm_head.weight": torch.zeros(4, 3)}
    save_file({key: w + shift for key, w in weights.items()}, str(folder / name))


def test_distances_are_shares_of_the_way(benchmarks, tmp_path):
    from columns_training import weights_distance

    save(tmp_path, "exact.before", 0.0)
    save(tmp_path, "exact", 1.0)
    save(tmp_path, "columns", 1.25)
    assert weights_distance(tmp_path, "columns") == {"body": 0.25, "head": 0.25}


@pytest.fixture
def runs(benchmarks, monkeypatch, tmp_path):
    """The requests of runs with known weights: columns are 1 % off, bf16 D is 2 % off."""
    import columns_training

    asked = []

    class Run:
        def __init__(self, script, name, request):
            asked.append(request)

        def finish(self):
            request = asked[-1]
            columns, rounded = request["fastpref_options"], request["rounded_d"]
            off = 0.01 if columns else 0.02 if rounded else 0.0
            if request["keep_data"]:
                Path(request["keep_data"]).mkdir()
            save(tmp_path, kept := request["keep_weights"], 1.0 + off)
            save(tmp_path, kept + ".before", 0.0)
            log = [{"step": 1, "loss": 0.5 + off, "rewards/margins": 1.0}]
            after = {"rewards/accuracies": 0.5, "rewards/margins": 2.0 + off / 100}
            return {"log": log, "held_out_after": after}

    monkeypatch.setattr(columns_training, "Run", Run)
    return asked


def test_each_way_of_training_is_judged_once(runs, tmp_path, capsys):
    import columns_training

    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = tmp_path / "pairs.jsonl"
    lines = [json.dumps(pair | {"prompt": f"p{i}"}) for i in range(6)]
    data.write_text("\n".join(lines))
    options = ["--model", "m", "--data", str(data), "--output", str(tmp_path / "found.json")]
    options += ["--steps", "2", "--held-out", "2", "--losses", "ipo"]
    columns_training.main(options)
    assert [r["lora"] for r in runs] == [0, 0, 0, 16, 16, 16]
    assert [bool(r["fastpref_options"]) for r in runs] == [False, True, False] * 2
    assert [r["rounded_d"] for r in runs] == [False, False, True] * 2
    assert (
        {r["loss"] for r in runs} == {"ipo"} and runs[0]["keep_data"] and not runs[1]["keep_data"]
    )
    found = json.loads((tmp_path / "found.json").read_text())
    judged = found["against exact"]["IPO, LoRA"]["columns"]
    assert judged["weights"]["body"] == pytest.approx(0.01, rel=1e-4)
    assert judged["margin, relative difference"] == pytest.approx(5e-5)
    assert all(target["met"] for target in found["targets"]) and len(found["targets"]) == 4
    assert (tmp_path / "found.png").stat().st_size > 1000
    columns_training.main(options)  # all are there
    assert len(runs) == 6
    assert "IPO, LoRA, columns" in capsys.readouterr().out


def test_derivatives_are_rounded(benchmarks, monkeypatch):
    from lib import train_worker

    from fastpref.backends import eager

    monkeypatch.setattr(eager, "project", eager.project)  # put back afterwards
    monkeypatch.setattr(eager, "outer", eager.outer)
    assert train_worker.round_derivatives() == "eager"
    d, weight, out = torch.rand(3, 5), torch.rand(5, 2), torch.empty(3, 2)
    eager.project(d, weight, out)
    torch.testing.assert_close(out, d.bfloat16().float() @ weight)
    outer = torch.empty(5, 2)
    eager.outer(d, x := torch.rand(3, 2), outer)
    torch.testing.assert_close(outer, d.bfloat16().float().t() @ x)


def test_a_filter_of_blocks(benchmarks):
    from columns import filtered_d

    hidden, weight = torch.randn(300, 8), torch.randn(500, 8) * 2
    found = filtered_d(hidden, torch.randint(500, (300,)), weight)
    kept, errors = ([f[key] for f in found] for key in ("kept", "error of u"))
    assert kept == sorted(kept) and 0 < kept[0] <= kept[-1] <= 1
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
