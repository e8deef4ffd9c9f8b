import re
from pathlib import Path

import pytest
import torch

from topi_core.config import Model, Settings
from topi_core.cost import call_flops, layer_flops, speedup
from topi_core.layout import Layout
from topi_core.plan import Cut, Plan
from topi_core.trace import Run, Step


def test_layer_flops_match_table_6_of_the_paper():
    """The paper's own example: 8192 + 512 tokens at d = 4096, pruned to 6144 + 512, in GFLOPs of one FLUX layer."""
    assert layer_flops(8704, 4096) / 1e9 == pytest.approx(4745.94, abs=0.01)
    assert layer_flops(6656, 4096) / 1e9 == pytest.approx(3405.91, abs=0.01)
    assert layer_flops(8704, 4096, linear=32) / 1e9 == pytest.approx(5914.17, abs=0.01)  # its Qwen, with an MLP of 6 d


LAYOUT = Layout(10, (5, 6), ((6, 10),))  # 100 tokens, 60 of them the reference's


def kept(count):
    return torch.arange(count)[None]


def plan(kind):
    """Pruned to 20 reference tokens from layer 2 on; reused with all of them, and two text tokens left."""
    if kind == "pruned":
        return Plan(kind, Cut(kept=kept(20)), first_layer=2)
    if kind == "reused":
        return Plan(kind, Cut(text=2, stand_in=kept(60), stand_in_text=True))
    return Plan(kind, answer=torch.zeros(()) if kind == "skipped" else None)


def run(kinds, depth=10):
    made = Run(Model(family="flux1", depth=depth, hidden=64, layers=(3,), front_layers=2), Settings())
    for i, kind in enumerate(kinds):
        flops = call_flops(made.model, plan(kind), LAYOUT), call_flops(made.model, Plan(), LAYOUT)
        made.steps.append(Step(i, 1.0, kind, 0, 1.0, None, *flops))
    return made


def test_speedup_counts_front_layers_and_anchors_in_full():
    full, pruned = layer_flops(100, 64), layer_flops(60, 64)
    assert speedup(run(["anchor", "pruned"])) == pytest.approx(20 * full / (10 * full + 2 * full + 8 * pruned))
    assert speedup(run(["full", "anchor"])) == 1.0


def test_a_reused_call_sees_keys_that_it_does_not_compute():
    """The picture's 30 rows and two of the text, against all 100 keys."""
    model = run([]).model
    assert call_flops(model, plan("reused"), LAYOUT) == 10 * layer_flops(32, 64, keys=100)
    assert layer_flops(60, 2, keys=70) == 4 * 60 * 70 * 2 + 24 * 60 * 4


def test_an_answer_in_the_networks_place_costs_nothing():
    assert speedup(run(["anchor", "skipped"])) == 2.0


def test_a_run_without_anchors_saves_nothing():
    assert speedup(run([])) == 1.0


DEPTHS = {"FLUX.1 Kontext": 57, "FLUX.2 klein 4B": 25}  # layers of width 3072


def test_the_readmes_memory_of_reuse():
    """Keys and values of a reference of 1024 x 1024 pixels in bfloat16; the prompt's own are not kept by default."""
    readme = " ".join((Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").split())
    (sentence,) = re.findall(r"A reference of 1024 x 1024 pixels takes .*?\. [A-Z]", readme)
    said = re.findall(r"([\d.]+) GB in (FLUX\.1 Kontext)|in (FLUX\.2 klein 4B) ([\d.]+) GB", sentence)
    found = {first or second: float(a or b) for a, first, second, b in said}
    assert found == {name: round(2 * depth * 4096 * 3072 * 2 / 1e9, 1) for name, depth in DEPTHS.items()}
    assert sentence.count("twice that") == 2 and not Settings().reuse.reuse_text
