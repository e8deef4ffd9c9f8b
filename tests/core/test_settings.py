"""The settings of the node: their defaults, and one sentence for each bad value."""

import pytest

from topi_core.config import AnchorSettings, KeepSettings, LayerSettings, ReuseSettings, Settings
from topi_core.influence import INFLUENCE


def test_the_defaults_are_the_nodes():
    """But for the tolerance: without ToPi Patch nobody asks for skipped steps."""
    assert Settings() == Settings(
        mode="reuse",
        tolerance=0.0,
        layers=LayerSettings(profile="auto", layers=(), front_layers=-1),
        anchors=AnchorSettings(
            update_interval=0, first_anchor=0, start_percent=0.0, end_percent=1.0, spacing="auto"
        ),
        keep=KeepSettings(tau=0.85, min_keep=0.0, max_keep=1.0, metric=INFLUENCE),
        reuse=ReuseSettings(forecast=True, reuse_text=False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("part", "wrong", "sentence"),
    [
        (KeepSettings, dict(tau=1.3), "tau must be in [0, 1], got 1.3"),
        (KeepSettings, dict(tau=float("nan")), "tau must be in [0, 1], got nan"),
        (KeepSettings, dict(min_keep=-0.5), "min_keep must be in [0, 1], got -0.5"),
        (KeepSettings, dict(min_keep=0.6, max_keep=0.5), "min_keep must not be above max_keep, got 0.6 and 0.5"),
        (AnchorSettings, dict(update_interval=-1), "update_interval must be in [0, 1000], got -1"),
        (AnchorSettings, dict(first_anchor=1001), "first_anchor must be in [0, 1000], got 1001"),
        (AnchorSettings, dict(end_percent=2.0), "end_percent must be in [0, 1], got 2.0"),
        (
            AnchorSettings,
            dict(start_percent=0.6, end_percent=0.5),
            "start_percent must not be above end_percent, got 0.6 and 0.5",
        ),
        (AnchorSettings, dict(spacing="even"), "spacing must be one of auto, steps, sigma, got 'even'"),
        (Settings, dict(tolerance=1.5), "tolerance must be in [0, 1], got 1.5"),
        (Settings, dict(mode="merge"), "mode must be one of reuse, prune, got 'merge'"),
    ],
)
def test_a_bad_value_is_one_sentence(part, wrong, sentence):
    with pytest.raises(ValueError) as refusal:
        part(**wrong)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("given", "steps", "interval"),
    [
        (dict(tolerance=0.05), 20, 1),
        (dict(tolerance=0.05), 12, 1),
        (dict(tolerance=0.05), 11, 2),  # too short to skip much
        (dict(), 20, 2),  # nothing is skipped
        (dict(tolerance=0.05, anchors=AnchorSettings(update_interval=5)), 20, 5),
        (dict(tolerance=0.05, mode="prune"), 20, 10),
        (dict(mode="prune"), 20, 10),
    ],
)
def test_the_interval_of_a_run(given, steps, interval):
    assert Settings(**given).interval(steps) == interval


@pytest.mark.parametrize(
    ("given", "steps", "first"),
    [
        (dict(), 20, 4),
        (dict(), 4, 0),
        (dict(), 1, 0),
        (dict(anchors=AnchorSettings(first_anchor=2)), 20, 2),
        (dict(anchors=AnchorSettings(update_interval=5)), 20, 0),
        (dict(mode="prune"), 20, 0),
    ],
)
def test_the_first_anchor_of_a_run(given, steps, first):
    assert Settings(**given).first_anchor(steps) == first
