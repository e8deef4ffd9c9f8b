"""The shipped profile of the demo model: made from its weights, and found again on a few pairs."""

from topi_core.calibration import Calibration
from topi_demo.calibrate import chart, listen, row, shipped, spread
from topi_demo.edits import GROUPS
from topi_demo.provenance import setting


def test_it_was_made_from_the_weights_that_are_here():
    """`make calibrate` makes it anew; layers found on other weights may be others."""
    assert shipped().versions["weights"] == setting()["weights"]
    assert shipped().layers == shipped().calibration.top(3) and len(shipped().calibration) == 48


def test_a_few_pairs_find_the_leading_layers(comfyui):
    """7 pairs of 4 steps are no 48 of 20: the third layer's lead is smaller than the spread between pairs. But the two
    layers that lead are among the three that a few pairs find, and the other way round. One pair of each group, for the
    groups differ: on global edits alone layer 4 leads, which is not among the three of all."""
    few = Calibration.of(shipped().depth)
    for group in GROUPS:
        few = few.merge(listen(comfyui.nodes, group, 1, seed=3, steps=4))
    assert len(few) == 7
    assert set(shipped().calibration.top(2)) <= set(few.top(3))
    assert set(few.top(2)) <= set(shipped().layers)


def test_spread():
    assert spread(48, 7) == [7, 7, 7, 7, 7, 7, 6]
    assert spread(2, 4) == [1, 1, 0, 0]


def test_figures_and_chart():
    calibration = shipped().calibration
    figures = row("all", calibration)
    assert figures["layers"] == shipped().layers and len(figures["sensitivity"]) == shipped().depth
    assert all(0 < share <= 1 for share in figures["agreement"])
    assert chart(shipped()).size == (960, 480)
