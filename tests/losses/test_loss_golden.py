"""The losses against tests/golden/losses.json, which TRL's own code wrote."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch
from paths import GOLDEN, ROOT

from fastpref import LossOptions, kto_loss, reward_loss, sequence_logps
from fastpref.fused.pair_loss import PairInputs, prepare_loss
from fastpref.logps.forward import TokenStats
from fastpref.losses.tokens import ld_sequence_logps

FILE = GOLDEN / "losses.json"
GOLDEN = json.loads(FILE.read_text("utf-8"))
CASES = GOLDEN["cases"]


def name(case):
    return "-".join([case["group"], *(str(v) for v in case["options"].values())])


@pytest.fixture
def given():
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN["inputs"].items()}
    given["desirable"] = given["desirable"].bool()
    given["kept"] = given.pop("completion_mask")[:, 1:].bool()
    given["labels"] = torch.where(given["kept"], 0, -100)
    return given


def pair_loss(options, given, logps):
    options, labels = LossOptions(**options), given["labels"]
    reference = given["ref_token_logps"]
    if options.reference == "none":
        sums = None
    elif options.ld_alpha is None:
        sums = sequence_logps(reference, labels)
    else:
        sums = ld_sequence_logps(reference, labels, options.ld_alpha)
    prepared = prepare_loss(labels, options, PairInputs(sums), has_reference=sums is not None)
    statistic = given["log_sum_sq_probs"].to(logps.dtype)
    logps = logps.masked_fill(~given["kept"], 0.0)  # as the head gives them
    return prepared.loss_from_logps(TokenStats(logps, log_sum_sq_probs=statistic)).loss


def unpaired_loss(options, given, logps):
    sums, reference = (
        sequence_logps(t, given["labels"]) for t in (logps, given["ref_token_logps"])
    )
    if options["loss_type"] == "kto":
        options = {**options, **{key: given[key] for key in ("kl_logps", "ref_kl_logps")}}
    return kto_loss(sums, reference.to(sums.dtype), given["desirable"], **options).loss


def scores_loss(options, given, scores):
    margin = given["margin"] if "margin" in options else None
    options = {k: v for k, v in options.items() if k != "margin"}
    return reward_loss(*scores.split(len(given["margin"])), margin, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_trl(case, dtype, given):
    function = {"kto": unpaired_loss, "reward": scores_loss}.get(case["group"], pair_loss)
    leaf = given["scores" if case["group"] == "reward" else "token_logps"].to(dtype)
    leaf.requires_grad_()
    loss = function(case["options"], given, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    # TRL computes exo_pair's target, and the cases that say so, in float32.
    wide = dtype == torch.float64 and case["dtype"] == "float64"
    wide = wide and "exo_pair" not in name(case)
    close = dict(rtol=1e-10, atol=1e-10) if wide else dict(rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(loss.double().item(), case["loss"], **close)
    torch.testing.assert_close(gradient.double(), expected, **close)
    if case["group"] != "reward":
        assert not gradient[~given["kept"]].any()


@pytest.mark.slow
def test_the_file_is_what_trl_says():
    """The script, run again with the TRL that is installed, gives the numbers of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", exc_type=ImportError)
        if trl.__version__ != GOLDEN["trl"]:
            pytest.skip(f"TRL {trl.__version__}; the file is from {GOLDEN['trl']}")
        path = ROOT / "scripts" / "make_golden_losses.py"
        spec = importlib.util.spec_from_file_location("make_golden_losses", path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        fresh = script.compute()
    assert len(fresh["cases"]) == len(CASES)
    for key, values in GOLDEN["inputs"].items():
        torch.testing.assert_close(torch.tensor(fresh["inputs"][key]), torch.tensor(values))
    for a, b in zip(fresh["cases"], CASES, strict=True):
        assert a["options"] == b["options"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        torch.testing.assert_close(
            torch.tensor(a["gradient"]), torch.tensor(b["gradient"]), rtol=1e-5, atol=1e-6
        )
