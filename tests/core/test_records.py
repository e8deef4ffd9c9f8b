"""Settings and the trace."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from topi_core.config import KeepSettings, Model, Settings, parse_layers
from topi_core.trace import Run, Trace

GOOD = dict(family="flux1", depth=57, layers=(13, 18, 31), front_layers=10)


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
        (dict(layers=(3, 57)), r"layers must be in \[0, 56\] for this model, got 57"),
        (dict(front_layers=57), r"front_layers must be in \[0, 56\]"),
    ],
)
def test_layers_beyond_the_model_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Model(**GOOD | wrong)


def test_each_mode_has_its_own_defaults():
    """Whoever only switches the mode to prune has the paper's settings (section 5.1)."""
    paper, reuse = Settings(mode="prune"), Settings()
    assert (paper.tau, paper.update_interval, paper.spacing, paper.keeps_all) == (0.85, 10, "steps", False)
    assert (reuse.tau, reuse.update_interval, reuse.spacing, reuse.keeps_all) == (1.0, 2, "steps", True)
    assert (paper.first_anchor(20), paper.tolerance) == (0, 0)
    assert not Settings(keep=KeepSettings(max_keep=0.5)).keeps_all
    assert Settings(mode="prune", keep=KeepSettings(min_keep=1.0)).keeps_all


def test_parse_layers():
    assert parse_layers(" 13, 18,31 ") == (13, 18, 31)
    with pytest.raises(ValueError, match="got 'a,b'"):
        parse_layers("a,b")


def run_of(depth):
    return Run(Model(family="flux1", depth=depth, layers=(0,)), Settings())


def test_the_layers_of_a_run_are_those_of_its_model_or_those_it_found():
    run = Run(Model(family="flux1", depth=8), Settings())
    assert run.layers == ()
    run.found_layers = (2, 3)
    assert run.layers == (2, 3) and run_of(8).layers == (0,)


def test_trace_forgets_the_oldest_runs():
    trace = Trace(capacity=2)
    for depth in (1, 2, 3):
        trace.runs.append(run_of(depth))
    assert [run.model.depth for run in trace.runs] == [2, 3]


def finished(latent, depth=1):
    run = run_of(depth)
    run.finish(latent)
    return run


def test_trace_finds_the_run_that_made_a_latent():
    trace, latents = Trace(), torch.randn(3, 1, 16, 24, 24)
    trace.runs.extend(finished(latent, depth) for depth, latent in enumerate(latents, 1))
    trace.runs.append(run_of(9))  # still going on
    assert [trace.find(latent).model.depth for latent in latents] == [1, 2, 3]
    assert trace.find(latents[1].half()).model.depth == 2  # an output kept in a smaller dtype
    trace.runs.append(finished(latents[0], 5))
    assert trace.find(latents[0]).model.depth == 5


def test_of_runs_that_came_to_nothing_the_newest_is_found():
    """A run in too little precision ends in numbers that are none, and its picture is black."""
    trace, black = Trace(), torch.full((1, 16, 24, 24), float("nan"))
    trace.runs.extend(finished(latent, depth) for depth, latent in enumerate([torch.randn(1, 16, 24, 24), black], 1))
    assert trace.find(black).model.depth == 2
    trace.runs.append(finished(black, 3))
    assert trace.find(black).model.depth == 3
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
