"""The measuring of the benchmark, in short."""

import json
from dataclasses import replace

import torch

from bench import fidelity
from bench.scenarios import CORE


def test_a_row_is_what_the_tables_are_made_of_and_is_measured_once():
    scenario = replace(CORE[0], steps=2)
    with torch.inference_mode():
        row = next(fidelity.measure((scenario,), 1, set()))
        done = {(row["scenario"], row["kind"], row["edits"], row["weights"])}
        following = next(fidelity.measure((scenario,), 1, done))
    assert json.loads(json.dumps(row)) == row
    assert row["anchors"] == [0] and 0 < row["kept"] < 1 < row["predicted"]
    assert len(row["psnr"]) == len(row["ssim"]) == row["edits"] == 1
    assert (row["kind"], following["kind"]) == ("recolour", "remove")
    head, _, line = fidelity.markdown([row]).splitlines()
    assert head == f"| {scenario.table}; 1 edits | local | all | kept | cost model |"
    near = f"{row['psnr'][0]:.1f}, {row['ssim'][0]:.3f}"
    assert line == f"| {scenario.name} | {near} | {near} | {row['kept']:.0%} | {row['predicted']:.2f}x |"
