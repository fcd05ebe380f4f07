"""Parts of a batch, and batches of equally many tokens."""

from __future__ import annotations

import random

import pytest

from fastpref.data.packing import PARTS, SHARES, BalancedSampler, PartsCollator, balanced, divide

_DRAW = random.Random(1)
SIZES = [_DRAW.randint(1, 50) for _ in range(60)]


@pytest.mark.parametrize("most", [1, 30, 50, 120, 10_000])
def test_every_item_is_in_one_group_of_at_most_so_much(most):
    groups = divide(SIZES, most)
    assert sorted(i for group in groups for i in group) == list(range(len(SIZES)))
    assert all(sum(SIZES[i] for i in group) <= most or len(group) == 1 for group in groups)
    assert groups == divide(SIZES, most)
    if most >= 50:
        assert len(groups) <= 1.2 * sum(SIZES) / most + 1
    assert divide([], most) == []


def test_parts_of_a_batch():
    collator = PartsCollator(lambda rows: {"rows": rows}, lambda row: row["n"], 10)
    rows = [{"n": n} for n in (9, 5, 20, 4, 1)]
    batch = collator(rows)
    assert [part["rows"] for part in batch[PARTS]] == [
        [{"n": 9}, {"n": 1}], [{"n": 5}, {"n": 4}], [{"n": 20}],
    ]  # fmt: skip
    assert batch[SHARES] == [0.4, 0.4, 0.2]
    assert collator(rows[3:]) == {"rows": rows[3:]}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_get_equally_many_tokens(processes):
    order = list(range(len(SIZES)))
    random.Random(0).shuffle(order)
    found = list(BalancedSampler(order, SIZES, 4, processes))
    step = 4 * processes
    for i in range(0, len(SIZES), step):
        assert sorted(found[i : i + step]) == sorted(order[i : i + step])

    def spread(rows):
        """The sum, over full steps, of the difference between the processes' tokens."""
        whole = range(0, len(rows) - step + 1, step)
        sums = [
            [sum(SIZES[row] for row in rows[at : at + 4]) for at in range(i, i + step, 4)]
            for i in whole
        ]
        return sum(max(s) - min(s) for s in sums)

    assert spread(found) < spread(order) / 3
    assert found == list(BalancedSampler(order, SIZES, 4, processes))


def test_bins_of_a_capacity():
    groups, largest = balanced([9, 1, 1, 1], 2, 2)
    assert groups == [[0, 3], [1, 2]] and largest == 10
