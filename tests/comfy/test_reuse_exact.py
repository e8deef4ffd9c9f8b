"""The mode "reuse" against the unpatched model and against its own oracle, for every family."""

from itertools import pairwise

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from oracle import FLOAT_ERROR
from reuse_oracle import ReuseOracle, compare_reuse
from sampling import conditioning, difference, empty, kinds, last_run, latent, layer_inputs, patch, sample
from small_models import FAMILIES, FLUX1, FLUX2, JOY, QWEN, by_family, load, shared

by_method = pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in FAMILIES for m in f.methods], ids=lambda v: getattr(v, "name", v)
)


@by_family
@pytest.mark.parametrize("max_keep", [1.0, 0.5])
def test_an_anchor_at_every_step_is_the_unpatched_model_bit_by_bit(family, max_keep):
    model, start = shared(family), empty(family)
    positive = conditioning(family, [latent(family), latent(family, 12, 20, seed=1)])
    patched, trace = patch(model, mode="reuse", max_keep=max_keep, update_interval=1, **layer_inputs(family))
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))
    assert set(kinds(trace)) == {"anchor"}


@by_method
def test_reusing_equals_replacing_keys_and_values(family, method):
    refs = [latent(family), latent(family, 12, 20, seed=1)]
    positive, start = conditioning(family, refs, method), empty(family)
    image, trace = compare_reuse(family, shared(family), positive, latent=start, steps=5)
    assert kinds(trace) == ["anchor", "reused", "reused", "anchor", "reused"]
    assert difference(image, sample(shared(family), positive, latent=start, steps=5)) > FLOAT_ERROR
    run = last_run(trace)
    counts = [int(anchor.kept.sum()) for anchor in run.anchors]
    for step, kept in zip((1, 4), counts, strict=True):
        text = 2 if family.replacements else family.text_tokens  # what stays of text that leaves the sequence
        assert run.steps[step].tokens == text + 64
        assert run.steps[step].keys == family.text_tokens + 64 + kept


@by_family
@pytest.mark.parametrize("reuse_text", [True, False])
@pytest.mark.parametrize("forecast", [True, False])
def test_keeping_every_token(family, forecast, reuse_text):
    positive, start = conditioning(family, [latent(family)]), empty(family)
    inputs = {"max_keep": 1.0, "update_interval": 2, "forecast": forecast, "reuse_text": reuse_text}
    compare_reuse(family, shared(family), positive, latent=start, inputs=inputs)


def test_a_forecast_changes_what_is_reused():
    """Of tokens that were kept at both anchors; one that is new has no past."""
    positive, start = conditioning(FLUX1, [latent(FLUX1), latent(FLUX1, 12, 20, seed=1)]), empty(FLUX1)
    images = {}
    for forecast in (True, False):
        inputs = {"max_keep": 0.5, "update_interval": 3, "forecast": forecast}
        images[forecast], trace = compare_reuse(FLUX1, shared(FLUX1), positive, inputs=inputs, latent=start, steps=12)
        assert last_run(trace).forecast == forecast
    kept = [anchor.kept for anchor in last_run(trace).anchors]
    assert any((later & ~earlier).any() for earlier, later in pairwise(kept))
    assert difference(images[True], images[False]) > FLOAT_ERROR


@by_family
def test_in_a_batch_with_guidance(family):
    """Two images that keep different tokens, with cond and uncond: each has keys and values of its own."""
    refs = [latent(family, batch=2)]
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
    compare_reuse(family, shared(family), positive, negative, cfg=3.0, latent=empty(family, batch=2))


@pytest.mark.parametrize("family", [FLUX1, QWEN, JOY], ids=lambda f: f.name)
def test_prompts_of_different_lengths(family):
    """Each has its own text, of its own length, in keys and values of its own."""
    refs = [latent(family)]
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1, tokens=9)
    compare_reuse(family, shared(family), positive, negative, cfg=2.0, latent=empty(family), steps=8)


@by_family
def test_conds_with_other_references(family):
    """Each keeps tokens of its own, and ComfyUI batches them all the same."""
    positive = conditioning(family, [latent(family)])
    negative = conditioning(family, [latent(family, seed=5)], seed=1)
    compare_reuse(family, shared(family), positive, negative, cfg=3.0, latent=empty(family))


@by_family
def test_a_negative_prompt_without_references(family):
    positive, negative = conditioning(family, [latent(family)]), conditioning(family, seed=1)
    compare_reuse(family, shared(family), positive, negative, cfg=3.0, latent=empty(family))


def test_a_cond_that_starts_in_mid_run_makes_its_step_an_anchor():
    """It has the same references as one before, hence a selection, and no keys and values yet."""
    refs = [latent(FLUX1)]
    positive = conditioning(FLUX1, refs, end_percent=0.5) + conditioning(FLUX1, refs, seed=4, start_percent=0.5)
    inputs = {"update_interval": 10}
    _, trace = compare_reuse(FLUX1, shared(FLUX1), positive, latent=empty(FLUX1), steps=8, inputs=inputs)
    assert kinds(trace).count("anchor") == 2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_sde"])
def test_samplers_that_call_the_model_more_than_once_a_step(sampler):
    positive = conditioning(FLUX1, [latent(FLUX1)])
    compare_reuse(FLUX1, shared(FLUX1), positive, latent=empty(FLUX1), steps=5, sampler=sampler)


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=lambda f: f.name)
def test_a_mask_over_the_full_sequence(family):
    tokens = family.text_tokens + 64 + 64 + 60
    generator = torch.Generator().manual_seed(3)
    mask = -2.0 * torch.rand(1, tokens, tokens, generator=generator)
    mask.masked_fill_(torch.rand(mask.shape, generator=generator) < 0.2, -1e4)
    refs = [latent(family), latent(family, 12, 20, seed=1)]
    positive = conditioning(family, refs, attention_mask=mask, attention_mask_img_shape=(8, 8))
    image, _ = compare_reuse(family, shared(family), positive, latent=empty(family))
    without, _ = compare_reuse(family, shared(family), conditioning(family, refs), latent=empty(family))
    assert difference(image, without) > 1e-3


def test_a_mask_that_another_patch_puts_on_inside():
    """ToPi has let the text leave by then."""
    tokens = FLUX1.text_tokens + 64 + 64
    mask = -2.0 * torch.rand(1, tokens, tokens, generator=torch.Generator().manual_seed(3))

    def masked(model):
        def wrapper(executor, *args, **kwargs):
            return executor(*args, **kwargs | {"attention_mask": mask.to(args[0].device)})

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "mask", wrapper)
        return model

    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    inputs = {"max_keep": 0.6, "update_interval": 3, "reuse_text": True}
    patched, trace = patch(shared(FLUX1), mode="reuse", spacing="steps", **layer_inputs(FLUX1), **inputs)
    image = sample(masked(patched), positive, latent=start)
    expected = sample(masked(ReuseOracle(FLUX1, **inputs).attach(shared(FLUX1))), positive, latent=start)
    assert difference(image, expected) < FLOAT_ERROR and last_run(trace).steps[1].tokens == 2 + 64


def test_a_text_mask_of_qwen():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    positive = conditioning(QWEN, [latent(QWEN)], attention_mask=mask)
    image, _ = compare_reuse(QWEN, shared(QWEN), positive, latent=empty(QWEN))
    plain, _ = compare_reuse(QWEN, shared(QWEN), conditioning(QWEN, [latent(QWEN)]), latent=empty(QWEN))
    assert difference(image, plain) > 1e-3


def test_qwen_2511_with_its_own_reference_method():
    model = load(QWEN, default_ref_method="index_timestep_zero")
    compare_reuse(QWEN, model, conditioning(QWEN, [latent(QWEN)]), latent=empty(QWEN))


def test_anchors_spaced_by_sigma():
    """On a schedule that is far from even."""
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    inputs = {"mode": "reuse", "max_keep": 0.6, "update_interval": 3, "spacing": "sigma", "reuse_text": True}
    patched, trace = patch(shared(FLUX1), **inputs, **layer_inputs(FLUX1))
    image = sample(patched, positive, latent=start, steps=9, scheduler="beta")
    anchors = tuple(step.index for step in last_run(trace).steps if step.kind == "anchor")
    assert len(anchors) == 3 and anchors != (0, 3, 6)
    oracle = ReuseOracle(FLUX1, anchors, max_keep=0.6)
    expected = sample(oracle.attach(shared(FLUX1)), positive, latent=start, steps=9, scheduler="beta")
    assert difference(image, expected) < FLOAT_ERROR
