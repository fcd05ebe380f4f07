"""Training with FSDP2 on two and three processes is training on one."""

import process_group
import pytest
import torch

pytest.importorskip("transformers")

import sharded_runs  # noqa: E402

# Of four steps: a pass over 30 rows has five, so that the third step has one alone.
MICRO_BATCHES = 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with torch.random.fork_rng():
        return sharded_runs.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder):
    cases = list(sharded_runs.CASES)
    return process_group.run(sharded_runs.sharded, 2, folder / "group", str(folder), cases)


def assert_near(found, expected, tolerance):
    assert len(found) == len(expected) == 4
    for line, one in zip(found, expected, strict=True):
        assert line == pytest.approx(one, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", sharded_runs.CASES)
def test_two_processes_train_as_one(two, whole, name):
    """With accumulation; the gradients are clipped, and their norm is that of the whole."""
    figures, saved = whole[name]
    tolerance = 2e-2 if name == "bf16" else 2e-4
    for process in two:
        assert_near(process[name]["figures"], figures, tolerance)
        assert process[name]["weights"].keys() == saved.keys()
        for key, value in saved.items():
            assert process[name]["weights"][key] == pytest.approx(value, rel=1e-2, abs=2e-2), key


@pytest.mark.parametrize("name", sharded_runs.CASES)
def test_the_head_is_gathered_once(two, name):
    """Once in a micro-batch for each model that has one, and not again in the backward pass."""
    models = 1 if name == "lora" else 2  # an adapter's reference shares the policy's head
    for process in two:
        assert process[name]["gathers"] == models * MICRO_BATCHES
        assert process[name]["in parts"] == [True] * models


@pytest.mark.parametrize("name", sharded_runs.CASES)
def test_gradients_of_earlier_micro_batches(two, name):
    """They are whole and in the dtype of the products, or with sync_each_batch shards in fp32."""
    dtype = "torch.bfloat16" if name == "bf16" else "torch.float32"
    for process in two:
        assert process[name]["whole gradients"] == [[name != "synced"], [dtype]]


def test_a_run_goes_on_on_another_number_of_processes(two, whole, folder):
    figures = whole["untied"][0]
    for found in process_group.run(
        sharded_runs.resumed, 3, folder / "three", str(folder), "untied"
    ):
        assert_near(found, figures, 2e-4)
