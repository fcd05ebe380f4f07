"""Heads whose weight is a DTensor: FSDP2's shards and tensor parallelism's."""

import process_group
import pytest

pytest.importorskip("transformers")

import parallel_cases  # noqa: E402


@pytest.mark.parametrize("processes", [2, 3])
def test_a_divided_head_trains_as_the_whole_one(processes, tmp_path):
    folder = tmp_path / "model"
    parallel_cases.saved_model(folder)
    found = process_group.run(parallel_cases.every_case, processes, tmp_path / "group", str(folder))
    rows = [process[0] for process in found]
    assert rows == ([[6, 2], [5, 2]] if processes == 2 else [[4, 2], [4, 2], [3, 0]])
    assert found[0][1] == ("DTensor" if processes == 2 else None)
