"""The measuring of the demo model."""

import pytest
import torch
from sampling import run_node

from topi_core.layout import Layout
from topi_demo.evaluate import AttentionShare, edit, held_out, markdown, measure


def test_held_out_edits_are_always_the_same():
    batch, again = held_out("put two", 2), held_out("put two", 2)
    assert len(batch.references) == 3
    assert batch.instructions == again.instructions
    assert torch.equal(batch.expected, again.expected)


def test_listening_changes_nothing():
    objects, batch = run_node("ToPiDemoModel"), held_out("night", 2)
    listen = AttentionShare(Layout(18, (8, 8), ((8, 8),)))
    with torch.inference_mode():
        assert torch.equal(edit(objects, batch, 0, 2, listen=listen), edit(objects, batch, 0, 2))
    assert [len(step) for step in listen.shares] == [12, 12]
    assert all(0 < share < 1 for step in listen.shares for share in step.values())


def test_rows_and_tables():
    rows = list(measure(1, 0, 2, ["night", "blur", "put"]))
    assert [row["kind"] for row in rows[:3]] == ["night", "blur", "put"]
    assert [row["layer"] for row in rows[3:]] == list(range(12))
    for row in rows[3:]:
        assert row["share"] == pytest.approx(sum(row["by_step"]) / 2)
    assert {row["commit"] for row in rows} == {rows[0]["commit"]}
    lines = markdown(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| **global**", "| night", "| blur", "| **multi**"]
    assert lines[-1].count(" | ") == 12
