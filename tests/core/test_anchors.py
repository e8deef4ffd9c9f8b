import pytest

from topi_core.schedule import Schedule, step_of

SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.1, 0.0)


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


def test_anchors_are_evenly_spaced():
    sigmas = tuple(1 - i / 20 for i in range(21))
    assert anchors(Schedule(sigmas, 10), range(20)) == [0, 10]
    assert anchors(Schedule(sigmas, 6, first_anchor=3), range(20)) == [3, 9, 15]
    assert anchors(Schedule(sigmas, 1), range(4)) == [0, 1, 2, 3]


def test_a_missed_anchor_happens_at_the_next_computed_step():
    sigmas = tuple(1 - i / 20 for i in range(21))
    assert anchors(Schedule(sigmas, 5), [0, 1, 2, 7, 8, 9, 10, 11]) == [0, 7, 10]
    assert anchors(Schedule(sigmas, 5), [3, 4, 5]) == [3, 5]  # a window that opens late


def test_window():
    schedule = Schedule(SIGMAS, 10, first_anchor=1, high=0.95, low=0.3)
    assert [schedule.active(s) for s in (1.0, 0.9, 0.7, 0.4, 0.1)] == [False, True, True, True, False]
