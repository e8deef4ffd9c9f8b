"""The measuring of the demo model."""

import re

import pytest
import torch
import torch.nn.functional as F
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


def test_other_sizes_are_the_same_scenes():
    small, large = held_out("night", 1), held_out("night", 1, side=256)
    assert (F.avg_pool2d(large.references[0], 2) - small.references[0]).abs().mean() < 0.01
    assert edit(run_node("ToPiDemoModel"), large, 0, 1).shape == (1, 3, 256, 256)


def test_guidance_runs_the_negative_prompt():
    objects, batch = run_node("ToPiDemoModel"), held_out("night", 1)
    with torch.inference_mode():
        plain = edit(objects, batch, 0, 2)
        same = edit(objects, batch, 0, 2, cfg=4.0, negative=batch.instructions[0])
        guided = edit(objects, batch, 0, 2, cfg=4.0)
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
    assert not torch.allclose(guided, plain, atol=1e-2)


def test_rows_and_tables():
    rows = list(measure(1, 0, 2, ["night", "blur", "put", "snow"]))
    assert [row["kind"] for row in rows[:4]] == ["night", "blur", "put", "snow"]
    assert [row["layer"] for row in rows[4:]] == list(range(12))
    assert rows[3]["psnr"] == [] and len(rows[3]["psnr_of_half"]) == 1
    for row in rows[4:]:
        assert row["share"] == pytest.approx(sum(row["by_step"]) / 2)
    assert {row["commit"] for row in rows} == {rows[0]["commit"]}
    lines = markdown(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| **global**", "| night", "| blur", "| **multi**"]
    assert re.fullmatch(r"\| \*\*open\*\* \|  \|  \|  \| [\d.]+ dB \| [\d.]+ dB \|", lines[6])
    assert lines[-1].count(" | ") == 12
