"""Settings and the trace."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from topi_core.config import Settings, parse_layers
from topi_core.layout import Layout
from topi_core.trace import Anchor, Bits, Run, Step, Trace

GOOD = dict(depth=57, layers=(13, 18, 31), front_layers=10)


def test_the_core_needs_no_comfyui():
    code = (
        "import topi_core, pkgutil, importlib, sys\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(topi_core.__path__, 'topi_core.')]\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('comfy', 'comfy_api', 'nodes', 'folder_paths')])"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(tau=1.3), r"tau must be in \[0, 1\], got 1.3"),
        (dict(tau=float("nan")), "tau must be in"),
        (dict(update_interval=0), r"update_interval must be in \[1, 1000\], got 0"),
        (dict(layers=(3, 57)), r"layers must be in \[0, 56\] for this model, got 57"),
        (dict(front_layers=57), r"front_layers must be in \[0, 56\]"),
        (dict(min_keep=0.6, max_keep=0.5), "min_keep must not be above max_keep, got 0.6 and 0.5"),
        (dict(start_percent=0.6, end_percent=0.5), "start_percent must not be above"),
        (dict(metric="magic"), "metric must be one of influence, attention, similarity, random, got 'magic'"),
        (dict(mode="merge"), "mode must be one of reuse, prune, got 'merge'"),
    ],
)
def test_settings_refuse_what_is_wrong(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**GOOD | wrong)


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Settings(**GOOD).tau = 0.5


def test_parse_layers():
    assert parse_layers(" 13, 18,31 ") == (13, 18, 31)
    with pytest.raises(ValueError, match="got 'a,b'"):
        parse_layers("a,b")


@pytest.mark.parametrize("shape", [(1, 1), (2, 13), (3, 64)])
def test_bits_come_back(shape):
    mask = torch.rand(shape) > 0.5
    bits = Bits.of(mask)
    assert torch.equal(bits.unpack(), mask)
    assert bits.packed.numel() == -(-mask.numel() // 8)


def run_of(depth):
    return Run("flux1", Settings(depth=depth, layers=(0,), front_layers=0))


def test_the_layers_of_a_run_are_those_of_its_settings_or_those_it_found():
    run = Run("flux1", Settings(depth=8, front_layers=1))
    assert (run.depth, run.layers, run.front_layers) == (8, (), 1)
    run.found = (2, 3)
    assert run.layers == (2, 3)
    assert Run("flux1", Settings(depth=8, layers=(4,), front_layers=1)).layers == (4,)


def test_trace_forgets_the_oldest_runs():
    trace = Trace(capacity=2)
    for depth in (1, 2, 3):
        trace.runs.append(run_of(depth))
    assert [run.depth for run in trace.runs] == [2, 3]


def test_summary_names_what_was_kept_and_what_a_step_took():
    layout = Layout(1, (1, 2), ((1, 4),))
    run = run_of(8)
    assert run.summary() == "no reference tokens were pruned in 0 steps"
    run.anchors.append(Anchor(0, 1.0, layout, (), Bits.of(torch.tensor([[True, False, False, False]]))))
    kinds = [("anchor", 9.0), ("pruned", 1.0), ("anchor", 2.0), ("pruned", 1.0)]
    run.steps = [Step(i, 1 - i / 4, kind, 7, seconds) for i, (kind, seconds) in enumerate(kinds)]
    assert run.summary() == (
        "kept 25% of 4 reference tokens at 1 anchor; a full step took 2.000 s, a pruned one 1.000 s"
    )


def finished(latent, depth=1):
    run = run_of(depth)
    run.finish(latent)
    return run


def test_trace_finds_the_run_that_made_a_latent():
    trace, latents = Trace(), torch.randn(3, 1, 16, 24, 24)
    trace.runs.extend(finished(latent, depth) for depth, latent in enumerate(latents, 1))
    trace.runs.append(run_of(9))  # still going on
    assert [trace.find(latent).depth for latent in latents] == [1, 2, 3]
    assert trace.find(latents[1].half()).depth == 2  # an output kept in a smaller dtype
    trace.runs.append(finished(latents[0], 5))
    assert trace.find(latents[0]).depth == 5


def test_of_runs_that_came_to_nothing_the_newest_is_found():
    """A run in too little precision ends in numbers that are none, and its picture is black."""
    trace, black = Trace(), torch.full((1, 16, 24, 24), float("nan"))
    trace.runs.extend(finished(latent, depth) for depth, latent in enumerate([torch.randn(1, 16, 24, 24), black], 1))
    assert trace.find(black).depth == 2
    trace.runs.append(finished(black, 3))
    assert trace.find(black).depth == 3
    with pytest.raises(ValueError, match="none of the 1 runs"):
        other = Trace()
        other.runs.append(trace.runs[0])
        other.find(black)


def test_trace_refuses_a_latent_that_it_did_not_make():
    trace = Trace()
    with pytest.raises(ValueError, match="this trace holds no run"):
        trace.find(torch.zeros(1, 16, 8, 8))
    trace.runs.append(finished(torch.randn(1, 16, 8, 8)))
    for other in (torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 9)):
        with pytest.raises(ValueError, match="none of the 1 runs in this trace made this latent"):
            trace.find(other)
