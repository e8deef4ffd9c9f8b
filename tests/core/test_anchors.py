"""Which step a call belongs to, and which steps are anchors."""

import pytest

from topi_core.config import AnchorSettings, Settings
from topi_core.schedule import Schedule, step_of

SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.1, 0.0)
LINEAR = tuple(1 - i / 20 for i in range(21))


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.95, 0), (0.9, 1), (0.7000000001, 2), (0.5, 2), (0.1, 4), (0.05, 4), (0.0, 4), (2.0, 0)],
)
def test_step_is_the_position_of_sigma(sigma, step):
    assert step_of(sigma, SIGMAS) == step
    assert step_of(-sigma, [-s for s in SIGMAS]) == step  # a schedule that runs backwards


def test_single_sigma():
    assert step_of(1.0, (1.0,)) == 0


def anchors(schedule, computed):
    last, found = None, []
    for step in computed:
        if step >= schedule.first_anchor and schedule.due(step, last):
            last = step
            found.append(step)
    return found


def test_even_spacing_is_eq_11():
    for interval, first in ((1, 0), (4, 0), (6, 3), (10, 3), (50, 0)):
        even = Schedule(LINEAR, interval, first)
        assert even.anchors == tuple(i for i in range(20) if i >= first and (i - first) % interval == 0)
        assert anchors(even, range(20)) == list(even.anchors)


def test_a_missed_anchor_happens_at_the_next_computed_step():
    assert anchors(Schedule(LINEAR, 5), [0, 1, 2, 7, 8, 9, 10, 11]) == [0, 7, 10]
    assert anchors(Schedule(LINEAR, 5), [3, 4, 5]) == [3, 5]  # a window that opens late
    by_sigma = Schedule(tuple(1.5 * s / (1 + 0.5 * s) for s in LINEAR), 4, spacing="sigma")
    second, third = by_sigma.anchors[1:3]
    assert anchors(by_sigma, [0, second - 1, second + 1, second + 2, third]) == [0, second + 1, third]


def test_to_have_looked_ahead_is_no_way_back():
    schedule = Schedule(LINEAR, 5)
    ahead = [i + j for i in range(18) for j in range(3)]  # as heunpp2 calls the model: i, i + 1, i + 2
    assert anchors(schedule, ahead) == [0, 5, 10, 15]
    assert anchors(schedule, [*range(10), *range(3, 20)]) == [0, 5, 3, 5, 10, 15]
    assert all(Schedule(LINEAR, 1).due(step, step + 1) for step in range(18))


def test_spacing_by_a_straight_sigma_is_even_but_for_the_end():
    assert Schedule(LINEAR, 10, spacing="sigma").anchors == (0, 13)
    assert Schedule(LINEAR, 5, spacing="sigma").anchors == (0, 6, 11, 17)
    assert Schedule(LINEAR, 20, spacing="sigma").anchors == (0,)


@pytest.mark.parametrize("shift", [1.5, 3.0, 12.0])
def test_spacing_by_sigma_covers_equal_parts_of_it_and_half_of_one(shift):
    sigmas = tuple(shift * s / (1 + (shift - 1) * s) for s in LINEAR)
    spaced = Schedule(sigmas, 4, spacing="sigma").anchors
    assert len(spaced) == 5 and spaced[0] == 0 and list(spaced) == sorted(set(spaced)) and spaced[-1] < 20
    for i, anchor in enumerate(spaced):
        goal = 1 - i / 4.5
        off = abs(sigmas[anchor] - goal)
        others = [abs(s - goal) for step, s in enumerate(sigmas[:-1]) if step not in spaced and step < 16 + i]
        assert off <= min(others) + 1e-9


def test_spacing_is_by_steps_unless_it_is_given():
    by_sigma = AnchorSettings(spacing="sigma")
    assert [Settings(mode=mode).spacing for mode in ("prune", "reuse")] == ["steps", "steps"]
    assert [Settings(mode=mode, anchors=by_sigma).spacing for mode in ("prune", "reuse")] == ["sigma", "sigma"]


def test_window():
    schedule = Schedule(SIGMAS, 10, first_anchor=1, high=0.95, low=0.3)
    assert [schedule.active(s) for s in (1.0, 0.9, 0.7, 0.4, 0.1)] == [False, True, True, True, False]
