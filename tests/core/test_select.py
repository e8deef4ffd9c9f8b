from itertools import combinations

import pytest
import torch

from topi_core.select import select


def smallest_subset(influence, tau):
    """Brute force over all subsets: the least number of tokens that hold the share."""
    goal = tau * sum(influence)
    for count in range(len(influence) + 1):
        if any(sum(some) >= goal for some in combinations(influence, count)):
            return count
    return len(influence)


@pytest.mark.parametrize("tau", [0, 0.25, 0.5, 0.85, 0.99, 1])
def test_select_is_the_smallest_subset(tau):
    generator = torch.Generator().manual_seed(int(100 * tau))
    rows = torch.randint(1, 60, (20, 9), generator=generator).double()  # integers: sums are exact
    selection = select(rows, tau)
    for row, count, mask in zip(rows.tolist(), selection.counts, selection.mask(), strict=True):
        assert count == smallest_subset(row, tau) == int(mask.sum())
        held = sum(v for v, kept in zip(row, mask.tolist(), strict=True) if kept)
        assert held >= tau * sum(row)


def test_kept_indices_ascend_and_rows_are_filled_up_by_influence():
    selection = select(torch.tensor([[1.0, 9, 2, 3], [5.0, 5, 5, 5]]), 0.6)
    assert selection.counts == (1, 3)
    assert selection.kept().tolist() == [[1, 2, 3], [0, 1, 2]]
    assert selection.mask().tolist() == [[False, True, False, False], [True, True, True, False]]


def test_ties_keep_the_order_of_the_sequence():
    assert select(torch.ones(1, 64), 0.25).kept().tolist() == [list(range(16))]


def test_tau_one_keeps_tokens_without_influence():
    assert select(torch.tensor([[0.0, 1, 0]]), 1.0).counts == (3,)


def test_bounds():
    influence = torch.rand(3, 10)
    assert select(influence, 0.0, min_keep=0.25).counts == (3, 3, 3)
    assert select(influence, 1.0, max_keep=0.55).counts == (5, 5, 5)
    assert select(influence[:, :9], 0.1, min_keep=0.5, max_keep=0.5).counts == (5, 5, 5)


def test_no_number_keeps_everything():
    assert select(torch.tensor([[1.0, float("nan"), 2]]), 0.5).counts == (3,)
