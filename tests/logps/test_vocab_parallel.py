"""A head whose vocabulary is divided among processes, against float64."""

import process_group
import pytest
import torch
import vocab_parallel_cases

from fastpref.logps.vocab_parallel import VocabParallelWeight


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes")
@pytest.mark.parametrize("processes", [2, 3])
def test_a_divided_head_is_the_whole_one(processes, tmp_path):
    process_group.run(vocab_parallel_cases.every_case, processes, tmp_path / "group", processes)


def test_a_weight_without_processes_is_refused():
    with pytest.raises(ValueError, match="^group: torch.distributed is not initialised"):
        VocabParallelWeight(torch.zeros(3, 2), 0, 3)
