"""Two processes find what one finds: evaluation, references, predictions, and the rows of a resumed
run."""

import numpy as np
import process_group
import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
import two_processes  # noqa: E402
from test_evaluation import UNSTABLE, assert_alike  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes has found."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    path = tmp_path_factory.mktemp("two")
    return process_group.run(two_processes.found, 2, path / "group", str(path))


def test_an_evaluation_before_the_training_leaves_the_processes_in_step(found):
    """For every way in which a reference can be had, and with the best checkpoint's weights at the
    end; the trainer itself compares the weights."""
    one, two = (each["agreed"] for each in found)
    assert one == two and len(one) == 5


def stable(metrics):
    return {k: v for k, v in metrics.items() if not any(word in k for word in UNSTABLE)}


@pytest.mark.parametrize("case", ["pairs 1", "pairs 2", "pairs 7", "answers 7"])
def test_evaluation_figures(found, tmp_path, case):
    kind, n = case.split()
    data = two_processes.ROWS[kind](int(n), seed=9)
    one = two_processes.evaluated(tmp_path, kind, data)
    names = [name for name in found[0]["evaluations"] if name.startswith(case)]
    assert len(names) >= (5 if n == "7" else 1)
    for name in names:
        assert_alike([stable(one), *(stable(each["evaluations"][name]) for each in found)])


def test_references(found, tmp_path):
    one = two_processes.references(tmp_path)
    for each in found:
        assert each["references"] == [pytest.approx(row, rel=1e-5) for row in one]


def test_references_in_a_store(found, tmp_path):
    """Each process has computed at most the two new rows, and checked three of the old ones."""
    one = two_processes.references(tmp_path)
    for each in found:
        assert each["stored"]["references"] == [pytest.approx(row, rel=1e-5) for row in one]
        assert 3 * 2 < each["stored"]["asked"] <= (3 + 2) * 2


def test_packing(found, tmp_path):
    """Processes with different numbers of parts take the steps of one process."""
    one = two_processes.packed_runs(tmp_path, processes=1)
    for name, figures in one.items():
        assert [each["packed"][name] for each in found] == [pytest.approx(figures, rel=1e-5)] * 2


def test_predictions(found, tmp_path):
    """Seven rows in batches of two on two processes: the last batch is filled up."""
    one = two_processes.predictions(tmp_path)
    assert set(one) == {"pairs", "pairs stream", "answers", "answers stream"}
    for name, rows in one.items():
        assert len(rows) == 7
        np.testing.assert_allclose(found[0]["predictions"][name], rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["map", "stream", "dispatched map", "dispatched stream"])
def test_rows_of_a_run_that_resumes_in_its_second_pass(found, name):
    whole = [each["rows"][f"{name} whole"] for each in found]
    for each, rows in zip(found, whole, strict=True):
        assert len(rows) == 5 and each["rows"][f"{name} resumed"] == rows[3:]
    first = [row for rows in whole for step in rows[:2] for row in step]
    assert sorted(first) == list(range(8))
