"""Prompts as ComfyUI and its guidance nodes hand them to the model: areas, blocks left out, more text, noise again."""

import comfy.sample
import comfy.samplers
import comfyui_version
import pytest
import torch
from comfy.context_windows import ContextSchedules
from oracle import Oracle, compare
from reuse_oracle import compare_reuse
from sampling import (
    conditioning,
    difference,
    empty,
    kinds,
    last_run,
    latent,
    layer_inputs,
    pack_module,
    patch,
    run_node,
    sample,
)
from small_models import FLUX1, FLUX2, KREA, QWEN, load, shared

from topi_demo.runtime import VERSION

REUSE = {"mode": "reuse", "update_interval": 3}
by_mode = pytest.mark.parametrize(
    "inputs", [REUSE, {"mode": "prune", "tau": 0.7, "update_interval": 3}], ids=["reuse", "prune"]
)


@pytest.mark.parametrize("forecast", [True, False])
@pytest.mark.parametrize("family", [FLUX1, QWEN, KREA], ids=lambda f: f.name)
def test_an_area_with_guidance(family, forecast):
    """ComfyUI copies the area to the negative prompt, with the positive one's uuid."""
    refs, side = [latent(family)], 8 * family.patch // 2
    area = conditioning(family, refs, seed=3, area=(side * 2, side, 0, 0), strength=1.0)
    positive, negative = conditioning(family, refs) + area, conditioning(family, refs, seed=1)
    inputs = {"forecast": forecast, "max_keep": 1.0}
    compare_reuse(
        family, shared(family), positive, negative, cfg=2.0, latent=empty(family), steps=7, inputs=inputs
    )  # fmt: skip


def test_an_area_whose_negative_prompt_has_other_references():
    """Each looks at its own."""
    area = conditioning(FLUX1, [latent(FLUX1, seed=3)], seed=3, area=(16, 8, 0, 0), strength=1.0)
    positive, negative = conditioning(FLUX1, [latent(FLUX1)]) + area, conditioning(FLUX1, [latent(FLUX1, seed=5)])
    compare(FLUX1, shared(FLUX1), positive, negative, cfg=2.0, latent=empty(FLUX1), steps=7)


SKIPPING = [  # blocks that are scored and blocks that are not
    ("SkipLayerGuidanceDiT", {"start_percent": 0.0, "end_percent": 1.0}),
    ("SkipLayerGuidanceDiT", {"start_percent": 0.2, "end_percent": 0.7}),
    ("SkipLayerGuidanceDiTSimple", {"start_percent": 0.0, "end_percent": 1.0}),
    ("SkipLayerGuidanceDiTSimple", {"start_percent": 0.0, "end_percent": 0.5}),
]


@by_mode
@pytest.mark.parametrize("node, window", SKIPPING)
@pytest.mark.parametrize(("layers", "own"), [("", False), ("given", False), ("", True)])
def test_skip_layer_guidance(node, window, layers, own, inputs):
    """It calls a prompt a second time with blocks left out, or leaves them out of the negative one for a while.

    That may look at references of its own, which no call with all blocks scores.
    """
    known = layer_inputs(FLUX1) if layers else {"front_layers": FLUX1.front_layers}
    model = run_node(node, model=shared(FLUX1), double_layers="1", single_layers="0, 1", **window)[0]
    refs, start = [latent(FLUX1)], empty(FLUX1)
    others = [latent(FLUX1, seed=7)] if own else refs
    positive, negative = conditioning(FLUX1, refs), conditioning(FLUX1, others, seed=1)

    def edit(**changed):
        patched, trace = patch(model, **inputs | known | changed)
        return sample(patched, positive, negative, cfg=2.0, latent=start, steps=10), trace

    full = sample(model, positive, negative, cfg=2.0, latent=start, steps=10)
    exact = {"update_interval": 1} if inputs["mode"] == "reuse" else {"tau": 1.0}
    assert torch.equal(edit(**exact)[0], full)
    image, trace = edit()
    assert {"pruned", "reused"} & set(kinds(trace))
    assert 0 < difference(image, full) < 0.5


@by_mode
@pytest.mark.parametrize("family", [FLUX1, FLUX2, QWEN], ids=lambda f: f.name)
def test_tokens_before_the_prompts(family, inputs, monkeypatch):
    """USO's style reference puts some there, behind the input and inside of the network."""

    def post_input(args):
        more = torch.full_like(args["txt"][:, :5], 0.1)
        ids = args.get("txt_ids")
        changed = args | {"txt": torch.cat((more, args["txt"]), 1)}
        return changed if ids is None else changed | {"txt_ids": torch.cat((torch.zeros_like(ids[:, :5]), ids), 1)}

    model = shared(family).clone()
    model.set_model_patch(post_input, "post_input")
    positive, start = conditioning(family, [latent(family)]), empty(family)
    exact = {"update_interval": 1} if inputs["mode"] == "reuse" else {"tau": 1.0}
    full = sample(model, positive, latent=start, steps=7)
    if comfyui_version.__version__ != VERSION and torch.equal(
        full, sample(shared(family), positive, latent=start, steps=7)
    ):
        pytest.skip(f"ComfyUI {comfyui_version.__version__} has no such patch in {family.name}")
    image = sample(patch(model, **layer_inputs(family), **inputs | exact)[0], positive, latent=start, steps=7)
    assert torch.equal(image, full)
    monkeypatch.setattr(Oracle, "added_text", 5)
    oracle = compare_reuse if inputs["mode"] == "reuse" else compare
    oracle(family, model, positive, latent=start, steps=7)


def test_a_sampler_that_goes_back_scores_anew():
    """After a restart nothing of the lower noise is used."""
    model, positive = shared(FLUX1), conditioning(FLUX1, [latent(FLUX1)])
    patched, trace = patch(model, **layer_inputs(FLUX1), **REUSE | {"spacing": "steps"})
    seen = []

    def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in [*sigmas[:6], *sigmas[1:6]]:
            x = 0.5 * (x + model(x, sigma * x.new_ones(len(x)), **extra_args))
            seen.append(float(sigma))
        return x

    sampler = comfy.samplers.KSAMPLER(restarting)
    noise = torch.randn(empty(FLUX1).shape, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, 9)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            patched, noise, 1.0, sampler, sigmas, positive, positive, empty(FLUX1), disable_pbar=True
        )
    steps = [(step.index, step.kind) for step in last_run(trace).steps]
    assert steps[:6] == list(enumerate(["anchor", "reused", "reused", "anchor", "reused", "reused"]))
    assert steps[6:] == list(enumerate(["anchor", "reused", "anchor", "reused", "reused"], 1))


def test_a_negative_prompt_without_references_weighs_in_the_prediction():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    with_, without = conditioning(FLUX1, [latent(FLUX1)], seed=1), conditioning(FLUX1, seed=1)
    predicted = []
    for negative in (with_, without):
        patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
        sample(patched, positive, negative, cfg=2.0, latent=start, steps=6)
        steps = last_run(trace).steps
        predicted.append(sum(step.full_flops for step in steps) / sum(step.flops for step in steps))
    assert 1 < predicted[1] < predicted[0]


def test_room_for_one_prompt_and_not_for_the_other(monkeypatch):
    """The one that has room keeps it at its next anchors; the other runs in full, and the report says so."""
    positive, negative = conditioning(FLUX1, [latent(FLUX1)]), conditioning(FLUX1, [latent(FLUX1, 12, 20)])
    answers = ["device", None]  # as they ask

    def where(room, size, back=0):
        return answers.pop(0) if answers else "device"

    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE | {"spacing": "steps", "forecast": False})
    monkeypatch.setattr(pack_module("nodes.engine.memory").CallMemory, "where", where)
    image = sample(patched, positive, negative, cfg=2.0, latent=empty(FLUX1), steps=7)
    run = last_run(trace)
    assert [step.kind for step in run.steps] == ["anchor", "reused", "reused", "anchor", "reused", "reused", "anchor"]
    assert run.no_room and not answers
    assert "For some of the prompts" in run_node("ToPiReport", trace=trace, latent={"samples": image})[0]


def test_context_windows_over_the_width():
    """Windows side by side are pictures of their own: each looks at its own anchor's keys and values."""
    positive, both = conditioning(FLUX1, [latent(FLUX1, 16, 24)]), latent(FLUX1, 16, 32)
    patched, trace = patch(shared(FLUX1), **REUSE | layer_inputs(FLUX1))
    inputs = {"context_length": 16, "context_overlap": 0, "dim": 3, "fuse_method": "flat", "closed_loop": False}
    inputs |= {"context_schedule": ContextSchedules.STATIC_STANDARD, "context_stride": 1}
    if comfyui_version.__version__ == VERSION:  # older ones have no such input
        inputs["causal_window_fix"] = False
    (windowed,) = run_node("ContextWindowsManual", model=patched, **inputs)

    def denoise(model, noise):
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 6, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), disable_pbar=True
            )  # fmt: skip

    image = denoise(windowed, both)
    assert len(last_run(trace).anchors) == 2
    halves = [denoise(patched, half) for half in both.chunk(2, dim=-1)]
    assert difference(image, torch.cat(halves, dim=-1)) < 1e-5


@by_mode
def test_a_guider_with_two_models(inputs, caplog):
    """One of another depth runs as it is; a clone of the first is pruned like it."""
    positive, negative = (conditioning(FLUX1, [latent(FLUX1)], seed=seed) for seed in (0, 1))
    model, other = shared(FLUX1), load(FLUX1, depth=1)
    inputs = inputs | layer_inputs(FLUX1)

    def image(model, second):
        (guider,) = run_node(
            "DualModelGuider", model=model, model_negative=second, positive=positive, negative=negative, cfg=2.0
        )
        noise = comfy.sample.prepare_noise(empty(FLUX1), 7)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 6)
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            return guider.sample(noise, empty(FLUX1), sampler, sigmas, disable_pbar=True, seed=7)

    patched, trace = patch(model, **inputs)
    alone = image(patched, model)
    assert "second model" not in caplog.text
    assert kinds(trace)[:2] == ["anchor", "reused" if inputs["mode"] == "reuse" else "pruned"]
    assert difference(alone, image(model, model)) > 0

    exact, _ = patch(model, **inputs | {"update_interval": 1})
    assert torch.equal(image(exact, other), image(model, other))
    assert caplog.text.count("this run has a second model, of another kind") == 1
