"""The probe: seconds of a few layers' steps, from which those of all follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from support import tiny

from fastpref.planning import StepOptions, plan_training, probe
from fastpref.planning.probe import probe_layers, probe_steps
from fastpref.planning.times import Rates, StepTime

BATCHES = [[(4, 6, 5)], [(3, 8, 4)]]
THIS_CPU = Rates("this CPU", 1e10, 1e10, 1e10, 1e10, 1e-5, measured=True)


def config(layers, **kwargs):
    found = tiny.model().config
    return type(found)(**{**found.to_dict(), "num_hidden_layers": layers, **kwargs})


def test_models_differ_by_a_period_of_the_kinds_of_layers():
    assert probe_layers(config(8)) == (1, 2) and probe_layers(config(2)) is None
    kinds = (["sliding_attention"] * 2 + ["full_attention"]) * 3
    changed = config(9)
    changed.layer_types = kinds
    assert probe_layers(changed) == (1, 4)
    experts = config(9)
    experts.mlp_layer_types = ["dense"] + ["sparse"] * 8
    assert probe_layers(experts) == (1, 2)
    experts.mlp_layer_types = ["dense"] * 3 + ["sparse"] * 6  # two models of dense layers alone
    assert probe_layers(experts) is None


def test_phases_are_linear_in_layers_but_the_head(monkeypatch):
    def measured(config, batches, options):
        layers = config.num_hidden_layers
        one = dict.fromkeys(probe._PHASES, 0.5)
        one |= {"body forward": 1 + 2 * layers, "optimiser": 3 * layers, "head": 7 + layers % 2}
        return [one for _ in batches]

    monkeypatch.setattr(probe, "_measure", measured)
    steps = probe_steps(config(10), BATCHES, StepOptions())
    # The phase "reference" is a part of the forward pass, "data" of the rest.
    assert steps == [StepTime(21.5, 7.5, 0.5, 30.0, 1.0)] * 2


@pytest.mark.parametrize(
    "options",
    [
        StepOptions(),
        StepOptions(method="lora", reference="adapter", gradient_checkpointing=False),
        StepOptions(head="eager", reference="model"),
    ],
    ids=["full", "lora", "eager"],
)
def test_real_steps_are_timed_and_nothing_else_changes(options, capfd):
    short = config(2)
    state = torch.random.get_rng_state()
    steps = probe_steps(short, BATCHES, options)
    assert len(steps) == 2 and all(0 < step.total < 60 for step in steps)
    assert all(min(step.body_forward, step.head, step.optimiser) > 0 for step in steps)
    assert torch.equal(torch.random.get_rng_state(), state)
    out, err = capfd.readouterr()
    assert out == "" and "Tokenising" not in err


def test_what_needs_a_gpu_is_refused():
    for options in (StepOptions(device="cuda"), StepOptions(method="qlora")):
        with pytest.raises(ValueError, match="options: got device"):
            probe_steps(config(2), BATCHES, options)
    with pytest.raises(ValueError, match="probe: got True"):
        plan_training(config(2), memory=2**30, rates=replace(THIS_CPU, measured=False), probe=True)


def test_a_plan_takes_the_probes_seconds(monkeypatch):
    from fastpref.planning import estimate

    given = {"memory": 2**33, "batch_size": 2, "max_length": 32, "table": False}
    step = StepTime(1.0, 2.0, 3.0, 4.0, 0.5)
    monkeypatch.setattr(estimate, "probe_steps", lambda c, batches, o: [step] * len(batches))
    plan = plan_training(config(2), rates=THIS_CPU, probe=True, **given)
    found = plan.asked.seconds
    # All pairs are as long as max_length, so that each micro-batch takes what the probe's does.
    assert plan.probed and found.total == pytest.approx(4 + plan.asked.accumulation * 6.5)
    assert not plan_training(config(2), rates=THIS_CPU, **given).probed
    # A probe of more than a minute is left out.
    slow = replace(THIS_CPU, flops=1.0)
    assert not plan_training(config(2), rates=slow, probe=True, **given).probed
