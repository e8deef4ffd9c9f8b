"""The measuring of the benchmark, in short."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import fidelity
from bench.scenarios import FEWER, MAIN, PANELS, SCENARIOS, STEPS, Panel, Scenario
from topi_demo.edits import GRAMMAR, OPEN
from topi_demo.evaluate import held_out

BY_KEY = {s.key: s for s in SCENARIOS}
TOPI = BY_KEY["ToPi: tolerance 0.05"]
WAYS = {
    "topi": TOPI,
    "plain": BY_KEY["fewer steps: 10 of 20"],
    "easycache": BY_KEY["EasyCache: 0.2"],
    "baseline": BY_KEY["velocity held: 10 computed"],
}


class Small(Panel):
    """One kind of a panel's edits."""

    kinds = ("recolour",)


SMALL = Small(name="small", open=False, references=1)


@pytest.fixture(scope="module")
def measured():
    """A row of each way, one edit each."""
    with torch.inference_mode():
        return dict(zip(WAYS, fidelity.measure(WAYS.values(), [SMALL], 1, set()), strict=True))


def test_a_row_tells_all_that_the_tables_need(measured):
    for way, row in measured.items():
        assert json.loads(json.dumps(row)) == row, way
        assert (row["scenario"], row["panel"], row["kind"], row["edits"]) == (WAYS[way].key, "small", "recolour", 1)
        assert len(row["psnr"]) == len(row["ssim"]) == len(row["lpips"]) == 1
        assert 10 < row["psnr"][0] < 100 and 0 < row["ssim"][0] < 1 and row["predicted"] > 1, way
        assert row["weights"] and row["commit"]


def test_each_way_computes_what_it_says(measured):
    assert measured["plain"]["predicted"] == 2.0 and "computed" not in measured["plain"]
    assert measured["baseline"]["computed"] == [10] and measured["baseline"]["predicted"] == 2.0
    for way in ("topi", "easycache"):
        (computed,) = measured[way]["computed"]
        assert measured[way]["predicted"] == pytest.approx(STEPS / computed, abs=1e-3) and computed < STEPS
    assert 0 < measured["topi"]["anchors"][0] < measured["topi"]["computed"][0]  # none in the first quarter


def test_a_benchmark_goes_on_where_it_stopped(measured):
    names = ("scenario", "panel", "kind", "edits", "weights")
    done = {tuple(row[name] for name in names) for way, row in measured.items() if way != "plain"}
    with torch.inference_mode():
        (row,) = fidelity.measure(WAYS.values(), [SMALL], 1, done)
        everything = done | {tuple(row[name] for name in names)}
        assert list(fidelity.measure(WAYS.values(), [SMALL], 1, everything)) == []
    assert row["scenario"] == WAYS["plain"].key
    assert {name: row[name] for name in ("psnr", "ssim", "lpips")} == {
        name: measured["plain"][name] for name in ("psnr", "ssim", "lpips")
    }


def test_parts_hold_all_edits_in_their_order():
    batch = held_out("put", 6)
    parts = fidelity._parts(batch)
    assert [len(part.instructions) for part in parts] == [4, 2]
    assert [i for part in parts for i in part.instructions] == batch.instructions
    assert torch.equal(torch.cat([part.expected for part in parts]), batch.expected)
    for i, images in enumerate(batch.references):
        assert torch.equal(torch.cat([part.references[i] for part in parts]), images)


def test_the_interval_is_of_the_mean():
    assert fidelity.interval([3.0] * 5) == (3.0, 3.0, 3.0)
    values = list(np.random.default_rng(1).normal(30, 4, 400))
    mean, low, high = fidelity.interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / 20, rel=0.1)
    assert low < mean < high and fidelity.interval(values) == (mean, low, high)


def test_panels_are_of_one_group_of_edits_and_large_enough():
    for panel in PANELS.values():
        assert panel.kinds and all((GRAMMAR[kind][0] == OPEN) == panel.open for kind in panel.kinds)
        assert 64 <= sum(panel.counts(64).values()) < 64 + len(panel.kinds)


def test_no_two_scenarios_share_a_key():
    assert max(Counter(s.key for s in SCENARIOS).values()) == 1
    assert {s.line for s in MAIN} >= {FEWER, "ToPi"}


PANEL = "open"


def rows(s: Scenario, db: float, predicted: float, edits: int = 2, spread: float = 0.0, panel: str = PANEL) -> list:
    """A row for each kind of the panel; its edits differ by `spread`."""
    values = [db + spread * (2 * i / max(edits - 1, 1) - 1) for i in range(edits)]
    return [
        {"scenario": s.key, "panel": panel, "kind": kind, "edits": edits, "psnr": values, "predicted": predicted}
        for kind in PANELS[panel].kinds
    ]


def plain(count: int) -> Scenario:
    return BY_KEY[f"{FEWER}: {count} of {STEPS}"]


def test_ahead_is_measured_against_fewer_steps_at_the_same_cost():
    """Between two counts of them by the logarithm of the cost, edit by edit: what all edits share cancels out."""
    some = rows(plain(10), 30, 2.0, spread=5) + rows(plain(5), 20, 4.0, spread=5)
    results = fidelity.Results(some + rows(TOPI, 27, 2 * 2**0.5, spread=5))
    assert results.ahead(TOPI, PANEL) == pytest.approx((2.0, 2.0, 2.0))
    at = fidelity.Results(some + rows(TOPI, 31, 2.0, spread=5))
    assert at.ahead(TOPI, PANEL) == pytest.approx((1.0, 1.0, 1.0))
    other = fidelity.Results(some + rows(TOPI, 27, 2 * 2**0.5, spread=-5))  # edits that differ the other way round
    mean, low, high = other.ahead(TOPI, PANEL)
    assert mean == pytest.approx(2.0) and low < 0 < high


def test_ahead_is_none_outside_of_what_was_measured():
    some = rows(plain(10), 30, 2.0) + rows(plain(5), 20, 4.0)
    for predicted in (1.9, 4.1):
        assert fidelity.Results(some + rows(TOPI, 27, predicted)).ahead(TOPI, PANEL) is None
    assert fidelity.Results(rows(plain(10), 30, 2.0) + rows(TOPI, 27, 2.0)).ahead(TOPI, PANEL) is None
    other_steps = replace(TOPI, steps=28)
    assert fidelity.Results(some + rows(other_steps, 27, 3.0)).ahead(other_steps, PANEL) is None


def test_the_rows_of_most_edits_count_and_of_these_the_newest():
    results = fidelity.Results(rows(TOPI, 20, 2.0, 4) + rows(TOPI, 25, 2.0, 4) + rows(TOPI, 99, 2.0, 2))
    assert set(results.values(TOPI, PANEL)) == {25}
    assert len(results.values(TOPI, PANEL)) == 4 * len(PANELS[PANEL].kinds)


def test_a_panel_counts_when_all_of_its_kinds_are_there():
    some = rows(TOPI, 25, 2.0)
    assert fidelity.Results(some).has(TOPI, PANEL)
    assert not fidelity.Results(some[:-1]).has(TOPI, PANEL) and not fidelity.Results(some).has(TOPI, "closed")


def test_the_speed_up_of_a_panel_is_that_of_all_its_edits():
    """Half of the edits at 2x and half at 4x take 3/8 of the time."""
    some, kinds = rows(TOPI, 25, 2.0), PANELS[PANEL].kinds
    half = {kind for kind, _ in zip(kinds, range(len(kinds) // 2), strict=False)}
    for row in some:
        row["predicted"] = 4.0 if row["kind"] in half else 2.0
    share = len(half) / len(kinds)
    assert fidelity.Results(some).speedup(TOPI, PANEL) == pytest.approx(1 / (share / 4 + (1 - share) / 2))


def test_the_table():
    some = rows(plain(10), 30, 2.0) + rows(plain(5), 20, 4.0) + rows(TOPI, 27, 2 * 2**0.5)
    head, _, *lines = fidelity.Results(some).table([plain(10), TOPI, plain(8)], [PANEL, "closed"]).splitlines()
    assert head == "| | open |"
    assert lines == [
        "| fewer steps: 10 of 20 | 30.0 ±0.0 at 2.00x |",
        "| ToPi: tolerance 0.05 | 27.0 ±0.0 at 2.83x (+2.0 ±0.0) |",
    ]
