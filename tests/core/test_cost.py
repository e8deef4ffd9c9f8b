import re
from pathlib import Path

import pytest

from topi_core.config import Settings
from topi_core.cost import call_flops, layer_flops, speedup
from topi_core.reuse import TEXT_LEFT
from topi_core.schedule import Schedule
from topi_core.trace import Run, Step


def test_layer_flops_match_table_6_of_the_paper():
    """The paper's own example: 8192 + 512 tokens at d = 4096, pruned to 6144 + 512, in GFLOPs of one FLUX layer."""
    assert layer_flops(8704, 4096) / 1e9 == pytest.approx(4745.94, abs=0.01)
    assert layer_flops(6656, 4096) / 1e9 == pytest.approx(3405.91, abs=0.01)
    assert layer_flops(8704, 4096, linear=32) / 1e9 == pytest.approx(5914.17, abs=0.01)  # its Qwen, with an MLP of 6 d


def run(kinds, tokens=100, kept=60, front=2, depth=10):
    made = Run("flux1", Settings(depth=depth, layers=(3,), front_layers=front), hidden=64)
    for i, kind in enumerate(kinds):
        short = kept if kind == "pruned" else tokens
        flops = (0, 0) if kind == "skipped" else call_flops(made, kind, tokens, short)
        made.steps.append(Step(i, 1.0, kind, short, 1.0, None, *flops))
    return made


def test_speedup_counts_front_layers_and_anchors_in_full():
    full, pruned = layer_flops(100, 64), layer_flops(60, 64)
    expected = 20 * full / (10 * full + 2 * full + 8 * pruned)
    assert speedup(run(["anchor", "pruned"])) == pytest.approx(expected)
    assert speedup(run(["anchor", "pruned", "skipped"])) == pytest.approx(expected)
    assert speedup(run(["full", "anchor"])) == 1.0


def test_a_reused_call_sees_keys_that_it_does_not_compute():
    taken, full = call_flops(run([]), "reused", 100, 60, 100)
    assert (taken, full) == (10 * layer_flops(60, 64, keys=100), 10 * layer_flops(100, 64))


def test_a_run_without_anchors_saves_nothing():
    assert speedup(Run("flux1", Settings(depth=10, layers=(3,), front_layers=2))) == 1.0


MODELS = {  # layers, width, linear operations
    "FLUX.1 Kontext": (57, 3072, 24),
    "FLUX.2 klein 4B": (25, 3072, 26),
    "Qwen-Image-Edit": (60, 3072, 24),
}


def test_the_readmes_table_of_savings_and_memory():
    """The defaults, references and picture of 1024 x 1024 pixels, 512 text tokens."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (.+), (one|two|three)(?:, CFG (.+))? \| (\d+) \| (.+)x \| (.+) GB \| (.+) GB \|", readme)
    assert len(rows) == 5
    for model, references, guidance, steps, ratio, memory, forecast in rows:
        depth, hidden, linear = MODELS[model]
        context = 4096 * ["one", "two", "three"].index(references) + 4096
        settings = Settings(depth=depth, layers=(3,), front_layers=0, mode="reuse")
        made = Run("flux1", settings, hidden=hidden, linear=linear)
        anchors = Schedule(tuple(1 - i / int(steps) for i in range(int(steps) + 1)), 5).anchors
        for i in range(int(steps)):
            kind, tokens = ("anchor", 4608 + context) if i in anchors else ("reused", TEXT_LEFT + 4096)
            flops = call_flops(made, kind, 4608 + context, tokens, 4608 + context)
            made.steps.append(Step(i, 1.0, kind, tokens, 1.0, None, *flops))
        gigabytes = 2 * depth * (512 + context) * hidden * 2 * (2 if "above" in guidance else 1) / 1e9
        most = gigabytes * (2 if len(anchors) > 1 else 1)  # of a single anchor nothing is forecast
        assert [ratio, memory, forecast] == [f"{speedup(made):.2f}", f"{gigabytes:.1f}", f"{most:.1f}"]
