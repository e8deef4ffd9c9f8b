"""One to four references of any sizes, and none."""

import math

import pytest
import torch
from oracle import compare
from sampling import conditioning, empty, last_run, latent, layer_inputs, patch, sample
from small_models import FAMILIES, FLUX1, KREA, QWEN, by_family, load, shared

SIZES = [(16, 16), (8, 20), (22, 12), (4, 6)]


@by_family
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_to_four_references_of_different_sizes(family, count):
    refs = [latent(family, h, w, seed=i) for i, (h, w) in enumerate(SIZES[:count])]
    start = empty(family, 12, 16)
    _, trace, _ = compare(family, shared(family), conditioning(family, refs), latent=start, inputs={"tau": 0.6})
    layout = last_run(trace).anchors[0].layout
    assert layout.reference_grids == tuple((h // 2, w // 2) for h, w in SIZES[:count])
    assert (layout.text_tokens, layout.target_grid) == (family.text_tokens, (6, 8))
    assert layout.reference_tokens == sum(h * w // 4 for h, w in SIZES[:count])


@pytest.mark.parametrize(
    ("family", "method"),
    [(f, m) for f in FAMILIES if f.patch > 1 for m in f.methods if m != "negative_index"],
    ids=lambda v: getattr(v, "name", v),
)
def test_sizes_that_are_no_multiple_of_the_patch(family, method):
    """Target and references are padded by the model; FLUX.2 and Mage-Flow have one token a latent pixel."""
    refs = [latent(family, 15, 11), latent(family, 9, 14, seed=1)]
    positive, start = conditioning(family, refs, method), empty(family, 13, 17)
    image, trace, _ = compare(family, shared(family), positive, latent=start)
    assert image.shape == start.shape
    layout = last_run(trace).anchors[0].layout
    assert layout.target_grid == (7, 9) and layout.reference_grids == ((8, 6), (5, 7))
    patched, _ = patch(shared(family), tau=1.0, **layer_inputs(family))
    assert torch.equal(sample(patched, positive, latent=start), sample(shared(family), positive, latent=start))


def test_a_reference_larger_than_the_target():
    compare(FLUX1, shared(FLUX1), conditioning(FLUX1, [latent(FLUX1, 32, 28)]), latent=empty(FLUX1, 8, 8))


@by_family
def test_without_references_the_model_runs_untouched(family):
    model, start = shared(family), empty(family)
    positive = conditioning(family)
    patched, trace = patch(model, tau=0.5, **layer_inputs(family))
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))
    assert not any(run.anchors for run in trace.runs)


def test_krea_ignores_references_that_come_without_a_method():
    """As ComfyUI does, unless the model itself has a method: then they count."""
    positive, start = conditioning(KREA, [latent(KREA)]), empty(KREA)
    positive = [
        [text, {k: v for k, v in values.items() if k != "reference_latents_method"}] for text, values in positive
    ]
    patched, trace = patch(shared(KREA), tau=0.5, **layer_inputs(KREA))
    image = sample(patched, positive, latent=start)
    assert torch.equal(image, sample(shared(KREA), conditioning(KREA), latent=start))
    assert not last_run(trace).anchors and last_run(trace).reference_tokens == 0
    model = shared(KREA).clone()
    model.add_object_patch("diffusion_model.default_ref_method", "index")
    compare(KREA, model, positive, latent=start)


@pytest.mark.parametrize("frames", [1, 2])
def test_layers_of_qwen_image_layered(frames):
    """The target is several pictures, one a frame; its references may be too, and are placed before it."""
    model = load(QWEN, use_additional_t_cond=True, default_ref_method="negative_index")
    start = empty(QWEN).expand(-1, -1, 3, -1, -1).contiguous()
    refs = [torch.cat([latent(QWEN, 8, 12, seed=seed) for seed in range(frames)], 2), latent(QWEN, seed=5)]
    positive, negative = conditioning(QWEN, refs), conditioning(QWEN, refs, seed=1, tokens=9)
    image, trace, _ = compare(QWEN, model, positive, negative, cfg=2.0, latent=start)
    assert image.shape == start.shape
    layout = last_run(trace).anchors[0].layout
    assert layout.target_grid == (3 * 8, 8) and layout.reference_grids == ((frames * 4, 6), (8, 8))
    patched, _ = patch(model, tau=1.0, **layer_inputs(QWEN))
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))


def test_a_reference_of_one_token():
    model, start = shared(FLUX1), empty(FLUX1)
    positive = conditioning(FLUX1, [latent(FLUX1, 2, 2)])
    patched, trace = patch(model, tau=0.5, **layer_inputs(FLUX1))
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))
    assert last_run(trace).anchors[0].kept.tolist() == [[True]]


@by_family
def test_the_trace_counts_what_was_dropped(family):
    """A pruned step's tokens are text, target and the kept ones; shares are means of the kept masks."""
    refs = [latent(family), latent(family, 12, 20, seed=1)]
    patched, trace = patch(shared(family), tau=0.7, update_interval=2, **layer_inputs(family))
    sample(patched, conditioning(family, refs), latent=empty(family))
    run = last_run(trace)
    assert (run.model.family, run.model.depth, run.layers, run.model.front_layers) == (
        family.name, family.depth, family.layers, family.front_layers,
    )  # fmt: skip
    kept = 0
    for step in run.steps:
        anchor = next((a for a in run.anchors if a.step == step.index), None)
        if anchor is not None:
            kept = int(anchor.kept.sum())
            assert math.isclose(anchor.share, kept / 124, rel_tol=1e-6)
            assert step.kind == "anchor" and step.tokens == family.text_tokens + 64 + 124
            assert math.isclose(anchor.sigma, step.sigma, rel_tol=1e-6)
        else:
            assert step.kind == "pruned" and step.tokens == family.text_tokens + 64 + kept
        assert step.seconds > 0
