"""docs/architecture.md's "How to add a saving": its code, as it stands there, on a real model."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import conditioning, empty, kinds, last_run, latent, pack_module, sample
from small_models import FLUX1, QWEN, shared

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The document's code as a module, which imports from the pack as ComfyUI loaded it."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## How to add a saving")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) < 40
    file = tmp_path_factory.mktemp("toy") / "toy.py"
    pack = pack_module("nodes").__name__.removesuffix(".nodes")
    sys.modules["the_pack"] = sys.modules[pack]  # whose own name is no identifier
    file.write_text(re.sub(r"^from (topi_core|nodes)", r"from the_pack.\1", code, flags=re.MULTILINE))
    spec = importlib.util.spec_from_file_location("toy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["the_pack"]
    return module


def toys(toy, family, **settings):
    """The model with the toy beside what its settings save, and the trace."""
    config = pack_module("topi_core.config")
    known = pack_module("nodes.engine.families").family_of(shared(family).model.diffusion_model)
    model = config.Model(family=known.name, depth=family.depth, hidden=256, layers=family.layers, front_layers=1)
    trace = pack_module("topi_core.trace").Trace()
    patch = toy.WithTheToy(known, model, config.Settings(**settings), trace)
    return pack_module("nodes.engine.attach").attach(shared(family), patch), trace


def by_hand(model, anchors):
    """The same without ToPi: between anchors, every second call returns what the network returned before."""
    model, last = model.clone(), []

    def wrapper(executor, *args, **kwargs):
        options = next(arg for arg in args if isinstance(arg, dict) and "sample_sigmas" in arg)
        step = int((options["sample_sigmas"] >= options["sigmas"][0] - 1e-6).sum()) - 1
        if step not in anchors and last:
            return last.pop()
        last[:] = [executor(*args, **kwargs)]
        return last[0]

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "by hand", wrapper)
    return model


@pytest.mark.parametrize("family", [FLUX1, QWEN], ids=lambda f: f.name)
def test_it_does_what_it_says(toy, family):
    """Beside prune with tau 1, which is exact: steps are computed, answered, computed, ... from each anchor on."""
    config = pack_module("topi_core.config")
    keep, anchors = config.KeepSettings(tau=1.0), config.AnchorSettings(update_interval=4)
    model, trace = toys(toy, family, mode="prune", keep=keep, anchors=anchors)
    positive, start = conditioning(family, [latent(family)]), empty(family)
    image = sample(model, positive, latent=start, steps=8)
    assert torch.equal(image, sample(by_hand(shared(family), {0, 4}), positive, latent=start, steps=8))
    assert kinds(trace) == ["anchor", "skipped", "pruned", "skipped"] * 2
    assert pack_module("topi_core.cost").speedup(last_run(trace)) == 2.0


def test_it_composes_with_reuse(toy):
    model, trace = toys(toy, FLUX1, anchors=pack_module("topi_core.config").AnchorSettings(update_interval=5))
    positive = conditioning(FLUX1, [latent(FLUX1)])
    sample(model, positive, conditioning(FLUX1, [latent(FLUX1)], seed=1), latent=empty(FLUX1), steps=8, cfg=2.0)
    assert {"anchor", "skipped", "reused"} == set(kinds(trace))
