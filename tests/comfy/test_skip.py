"""Skipped steps: what stands in for them, when they are computed after all, and what nothing may skip."""

from itertools import pairwise

import comfy.samplers
import pytest
import torch
from sampling import CACHE, conditioning, empty, kinds, last_run, latent, pack_module, patch, run_node, sample
from small_models import FLUX1, QWEN, shared

from topi_core.cost import speedup
from topi_core.metrics import psnr
from topi_demo import evaluate

ONLY = {"mode": "prune", "tau": 1.0, "layers": "1", "front_layers": 1}  # exact but for the skipped steps


@pytest.fixture
def positive():
    return conditioning(FLUX1, [latent(FLUX1)])


def by_hand(model, positive, steps, computed, corrected):
    """Euler's method with the same steps skipped, each equation as it stands in the module's description."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    seen = {}

    def sampler(model_k, noise, sigmas, *rest):
        x, known = noise, []
        for i, (now, to) in enumerate(pairwise(sigmas)):
            if i in computed:
                v = (x - model_k(x, now.expand(len(x)))) / now
                known.append((now.item(), v))
                told = v
                if seen.get("skipped"):
                    missed = sum(span * (w - lagrange(known[-3:], s)) for s, span, w in seen.pop("skipped"))
                    told = v - missed / (to - now) if corrected else v
            else:
                told = lagrange(known[-2:], now.item())
                seen.setdefault("skipped", []).append((now.item(), (to - now).item(), told))
            x = x + (to - now) * told
        return x

    def lagrange(points, s):
        total = 0
        for i, (a, v) in enumerate(points):
            weight = 1.0
            for j, (b, _) in enumerate(points):
                weight *= (s - b) / (a - b) if i != j else 1.0
            total = total + weight * v
        return total

    class Sampler(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, mask=None, pbar=None):
            wrap = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
            wrap.latent_image, wrap.noise = latent_image, noise
            scaled = model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, True)
            out = sampler(lambda x, s: wrap(x, s, mask, **extra_args), scaled, sigmas)
            return model_wrap.inner_model.model_sampling.inverse_noise_scaling(sigmas[-1], out)

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    start = empty(FLUX1)
    noise = comfy.sample.prepare_noise(start, 7)
    with torch.inference_mode():
        return guider.sample(noise, start, Sampler(), sigmas, seed=7)


def test_the_equations(positive):
    """The first three steps and the last are computed; between them at a tolerance of 1 whatever can be skipped."""
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    image = sample(model, positive, latent=empty(FLUX1), steps=8)
    computed = {i for i, kind in enumerate(kinds(trace)) if kind != "skipped"}
    assert {0, 1, 2, 7} <= computed and len(computed) < 8
    expected = by_hand(shared(FLUX1), positive, 8, computed, corrected=True)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)
    other = by_hand(shared(FLUX1), positive, 8, computed, corrected=False)
    assert (image - other).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [{"mode": "prune", "tau": 1.0}, {"mode": "reuse", "update_interval": 1}])
def test_no_tolerance_is_the_unpatched_model(mode, positive):
    model, trace = patch(shared(FLUX1), **ONLY | mode | {"tolerance": 0.0})
    image = sample(model, positive, latent=empty(FLUX1), steps=6)
    assert torch.equal(image, sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=6))
    assert "skipped" not in kinds(trace)


def test_a_tiny_tolerance_is_the_unpatched_model_too(positive):
    """Every step is computed, and what is computed goes to the sampler as it is."""
    model, _ = patch(shared(FLUX1), **ONLY | {"tolerance": 1e-9})
    image = sample(model, positive, latent=empty(FLUX1), steps=6)
    assert torch.equal(image, sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=6))


def test_a_skipped_step_counts_in_what_was_saved(positive):
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    sample(model, positive, latent=empty(FLUX1), steps=8)
    run = last_run(trace)
    assert len(run.steps) == 8 and [s.index for s in run.steps] == list(range(8))
    assert speedup(run) == pytest.approx(8 / sum(kind != "skipped" for kind in kinds(trace)))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "uni_pc", "res_multistep", "ipndm", "deis"])
def test_smooth_samplers_of_any_kind(sampler, monkeypatch):
    """On the demo model, whose course is a model's: nearer to the full run than as many plain steps."""
    monkeypatch.setattr(evaluate, "SAMPLER", sampler)
    model, *others = run_node("ToPiDemoModel")
    batch = evaluate.held_out("recolour", 1)
    full, half = (evaluate.edit((model, *others), batch, 0, steps) for steps in (16, 8))
    patched, trace = patch(model, **ONLY | {"tolerance": 0.05})
    image = evaluate.edit((patched, *others), batch, 0, 16)
    assert not last_run(trace).noisy
    assert sum(kind != "skipped" for kind in kinds(trace)) <= 8
    assert psnr(image, full) > psnr(half, full)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "lcm"])
def test_samplers_that_add_noise_skip_nothing_and_say_so(sampler, positive):
    report = pack_module("topi_core.report")
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    image = sample(model, positive, latent=empty(FLUX1), steps=8, sampler=sampler)
    assert torch.equal(image, sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=8, sampler=sampler))
    assert "skipped" not in kinds(trace) and last_run(trace).noisy
    assert "adds noise of its own" in report.summary(last_run(trace))


def test_guidance_is_extrapolated_as_one(positive):
    negative = conditioning(FLUX1, [latent(FLUX1)], seed=1)
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    sample(model, positive, negative, latent=empty(FLUX1), steps=8, cfg=3.0)
    run = last_run(trace)
    assert "skipped" in kinds(trace)
    assert len({step.full_flops for step in run.steps}) == 1  # cond and uncond, in skipped steps as in others


def test_anchors_count_computed_steps(positive):
    """With reuse: an anchor, a reused step, an anchor, ..., whatever is skipped between them."""
    inputs = {"mode": "reuse", "update_interval": 2, "tolerance": 1.0}
    model, trace = patch(shared(FLUX1), **inputs)
    sample(model, positive, latent=empty(FLUX1), steps=16)
    computed = [kind for kind in kinds(trace) if kind != "skipped"]
    assert "skipped" in kinds(trace)
    assert computed == (["anchor", "reused"] * 8)[: len(computed)]


def test_the_own_schedule_of_reuse(positive):
    """A quarter of the steps in full, the last of them an anchor, then every second one."""
    model, trace = patch(shared(FLUX1), mode="reuse")
    sample(model, positive, latent=empty(FLUX1), steps=12)
    assert kinds(trace) == ["full"] * 2 + ["anchor", "reused"] * 5


def test_part_of_a_schedule_and_a_mask(positive):
    start = latent(FLUX1)
    mask = torch.zeros(1, 1, *start.shape[-2:])
    mask[..., start.shape[-1] // 2 :] = 1
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    image = sample(model, positive, latent=start, steps=10, denoise=0.6, noise_mask=mask)
    assert image.isfinite().all() and "skipped" in kinds(trace)
    image = sample(model, positive, latent=start, steps=10, last_step=5, force_full_denoise=False)
    image = sample(model, positive, latent=image, steps=10, start_step=5, disable_noise=True)
    assert image.isfinite().all() and kinds(trace)[:3] == ["anchor", "pruned", "pruned"]  # a run knows no other one


def test_a_reversed_schedule_skips_as_well(positive):
    sigmas = comfy.samplers.calculate_sigmas(shared(FLUX1).get_model_object("model_sampling"), "simple", 8)
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    flipped = sigmas.flip(0).clamp(0.05, 0.95)
    with torch.inference_mode():
        image = comfy.sample.sample_custom(
            model, torch.zeros_like(empty(FLUX1)), 1.0, comfy.samplers.sampler_object("euler"), flipped, positive,
            positive, latent(FLUX1), disable_pbar=True, seed=1,
        )  # fmt: skip
    assert image.isfinite().all()
    assert kinds(trace)[:3] == ["anchor", "pruned", "pruned"] and kinds(trace)[-1] != "skipped"


@pytest.mark.parametrize("first", [True, False], ids=["cache before", "cache behind"])
@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_beside_caches_nothing_is_counted_twice(cache, first, positive):
    model = shared(FLUX1)
    if first:
        (model,) = run_node(cache, model=model, **CACHE)
    model, trace = patch(model, **ONLY | {"tolerance": 0.3})
    if not first:
        (model,) = run_node(cache, model=model, **CACHE)
    image = sample(model, positive, latent=empty(FLUX1), steps=16)
    assert image.isfinite().all()
    run = last_run(trace)
    assert sum(step.full_flops for step in run.steps) <= 16 * max(step.full_flops for step in run.steps)


def test_batches_by_their_worst_image():
    start = empty(FLUX1, batch=2)
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    image = sample(model, conditioning(FLUX1, [latent(FLUX1, batch=2)]), latent=start, steps=8)
    assert image.shape == start.shape and "skipped" in kinds(trace)


def test_models_with_frames():
    model, trace = patch(shared(QWEN), **ONLY | {"tolerance": 1.0})
    image = sample(model, conditioning(QWEN, [latent(QWEN)]), latent=empty(QWEN), steps=8)
    assert image.isfinite().all() and "skipped" in kinds(trace)


def test_without_references_steps_are_skipped_as_well():
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    sample(model, conditioning(FLUX1), latent=empty(FLUX1), steps=8)
    assert "skipped" in kinds(trace)


def test_a_run_leaves_nothing_behind(positive):
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    once = sample(model, positive, latent=empty(FLUX1), steps=8)
    assert torch.equal(once, sample(model, positive, latent=empty(FLUX1), steps=8))
    assert len(kinds(trace)) == 8


@pytest.mark.parametrize(("references", "steps", "interval"), [(1, 12, 1), (2, 12, 2), (1, 8, 2)])
def test_the_own_interval_of_reuse(references, steps, interval):
    """Where every computed step is an anchor, no key and no value is kept."""
    model, trace = patch(shared(FLUX1), mode="reuse", tolerance=0.05)
    positive = conditioning(FLUX1, [latent(FLUX1, seed=i) for i in range(references)])
    sample(model, positive, latent=empty(FLUX1), steps=steps)
    run = last_run(trace)
    assert run.interval == interval
    assert ("reused" in kinds(trace)) == (run.cache_bytes > 0) == (interval == 2)
