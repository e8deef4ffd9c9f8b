"""Skipped steps: what stands in for them, when they are computed after all, and what nothing may skip."""

from itertools import pairwise

import comfy.samplers
import comfyui_version
import pytest
import torch
from comfy.context_windows import ContextSchedules
from comfy_api.torch_helpers import set_torch_compile_wrapper
from sampling import (
    CACHE,
    conditioning,
    difference,
    empty,
    kinds,
    last_run,
    latent,
    pack_module,
    patch,
    run_node,
    sample,
)
from small_models import FLUX1, KREA, QWEN, SmallControl, load, shared, with_lora

from topi_core.cost import speedup
from topi_core.metrics import psnr
from topi_demo import evaluate
from topi_demo.runtime import VERSION

ONLY = {"mode": "prune", "tau": 1.0, "layers": "1", "front_layers": 1}  # exact but for the skipped steps


@pytest.fixture
def positive():
    return conditioning(FLUX1, [latent(FLUX1)])


def denoised(model, positive, sigmas, start=None, sampler="euler"):
    """SamplerCustom's work, from noise."""
    start = empty(FLUX1) if start is None else start
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    noise = comfy.sample.prepare_noise(start, 7)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, positive, positive, start, disable_pbar=True, seed=7
        )  # fmt: skip


def check(attach, run, steps, family=FLUX1):
    """Beside what else is put on a model, or asked of it, steps are skipped and counted.

    Where none may be, the image is the one without ToPi.

    attach: puts it on a model; run: samples a model.
    """
    exact, trace = patch(shared(family), **ONLY | {"tolerance": 1e-9})
    assert torch.equal(run(attach(exact)), run(attach(shared(family))))
    assert "skipped" not in kinds(trace)
    for order in ("before", "after"):
        model = attach(shared(family)) if order == "before" else shared(family)
        model, trace = patch(model, **ONLY | {"tolerance": 1.0})
        image = run(attach(model) if order == "after" else model)
        last = last_run(trace)
        assert image.isfinite().all() and kinds(trace)[:3] == ["anchor", "pruned", "pruned"]
        assert "skipped" in kinds(trace) and kinds(trace)[-1] != "skipped"
        assert [step.index for step in last.steps] == list(range(steps))
        assert len({step.full_flops for step in last.steps}) == 1, "a skipped step counts as a computed one would"
        assert all(step.flops == (0 if step.kind == "skipped" else step.full_flops) for step in last.steps)


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


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "lcm"])
def test_where_noise_keeps_steps_from_being_skipped_reuse_saves_as_ever(sampler, positive):
    """Its own interval is the one without a tolerance, and so is the image."""
    image, run = {}, {}
    for tolerance in (0.0, 0.05):
        model, trace = patch(shared(FLUX1), mode="reuse", tolerance=tolerance)
        image[tolerance] = sample(model, positive, latent=empty(FLUX1), steps=16, sampler=sampler)
        run[tolerance] = last_run(trace)
    assert run[0.05].noisy and run[0.05].interval == 2 and run[0.05].cache_bytes > 0
    assert [step.kind for step in run[0.05].steps] == [step.kind for step in run[0.0].steps]
    assert torch.equal(image[0.0], image[0.05])


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


@pytest.mark.parametrize(("references", "steps", "interval"), [(1, 12, 1), (3, 12, 1), (1, 8, 2)])
def test_the_own_interval_of_reuse(references, steps, interval):
    """Where every computed step is an anchor, no key and no value is kept."""
    model, trace = patch(shared(FLUX1), mode="reuse", tolerance=0.05)
    positive = conditioning(FLUX1, [latent(FLUX1, seed=i) for i in range(references)])
    sample(model, positive, latent=empty(FLUX1), steps=steps)
    run = last_run(trace)
    assert run.interval == interval
    assert ("reused" in kinds(trace)) == (run.cache_bytes > 0) == (interval == 2)


def unchanged(model):
    return model


@pytest.mark.parametrize("attach", [with_lora, unchanged], ids=["LoRA", "ControlNet"])
def test_beside_a_lora_and_a_controlnet(attach):
    control = {} if attach is with_lora else {"control": SmallControl(FLUX1, outputs=True)}
    positive = conditioning(FLUX1, [latent(FLUX1)], **control)
    check(attach, lambda model: sample(model, positive, latent=empty(FLUX1), steps=8), 8)


def test_prompts_of_different_lengths(positive):
    negative = conditioning(FLUX1, [latent(FLUX1)], seed=1, tokens=9)
    check(unchanged, lambda model: sample(model, positive, negative, latent=empty(FLUX1), steps=8, cfg=2.0), 8)


def test_areas(positive):
    """Each sees a part of the latent; what is extrapolated is the whole of it."""
    area = conditioning(FLUX1, [latent(FLUX1)], seed=3, area=(16, 8, 0, 0), strength=1.0)
    negative = conditioning(FLUX1, seed=1)
    check(unchanged, lambda model: sample(model, positive + area, negative, latent=empty(FLUX1), steps=8, cfg=2.0), 8)


def test_skip_layer_guidance(positive):
    def attach(model):
        layers = {"double_layers": "1", "single_layers": "0, 1", "start_percent": 0.0, "end_percent": 1.0}
        return run_node("SkipLayerGuidanceDiT", model=model, **layers)[0]

    negative = conditioning(FLUX1, [latent(FLUX1)], seed=1)
    check(attach, lambda model: sample(model, positive, negative, latent=empty(FLUX1), steps=8, cfg=2.0), 8)


def test_context_windows():
    inputs = {"context_length": 16, "context_overlap": 0, "dim": 3, "fuse_method": "flat", "closed_loop": False}
    inputs |= {"context_schedule": ContextSchedules.STATIC_STANDARD, "context_stride": 1}
    if comfyui_version.__version__ == VERSION:  # older ones have no such input
        inputs["causal_window_fix"] = False
    positive, start = conditioning(FLUX1, [latent(FLUX1, 16, 24)]), empty(FLUX1, 16, 32)
    check(
        lambda model: run_node("ContextWindowsManual", model=model, **inputs)[0],
        lambda model: sample(model, positive, latent=start, steps=8),
        8,
    )


@pytest.mark.parametrize("kind", ["DualCFG", "DualCFG, nested", "PerpNeg"])
def test_custom_guiders(kind, positive):
    """What they make of their predictions is one thing too."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    middle, negative = (conditioning(FLUX1, [latent(FLUX1)], seed=seed) for seed in (1, 2))

    def run(model):
        guider = (Guider_PerpNeg if kind == "PerpNeg" else Guider_DualCFG)(model)
        guider.set_conds(positive, middle, negative)
        guider.set_cfg(2.0, 1.5, **({"nested": True} if "nested" in kind else {}))
        noise = comfy.sample.prepare_noise(empty(FLUX1), 7)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8)
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            return guider.sample(noise, empty(FLUX1), sampler, sigmas, disable_pbar=True, seed=7)

    check(unchanged, run, 8)


def test_a_schedule_that_starts_above_one(positive):
    check(unchanged, lambda model: denoised(model, positive, torch.linspace(1.6, 0, 11)), 10)


@pytest.mark.parametrize("family", [FLUX1, KREA], ids=lambda f: f.name)
def test_a_compiled_model_skips_the_same_steps(family):
    torch._dynamo.reset()
    compiled = load(family).clone()
    options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
    set_torch_compile_wrapper(compiled, backend="eager", options=options)
    positive = conditioning(family, [latent(family)])
    images, steps = [], []
    for model in (compiled, shared(family)):
        patched, trace = patch(model, mode="reuse", update_interval=2, tolerance=1.0)
        images.append(sample(patched, positive, latent=empty(family), steps=12))
        steps.append(kinds(trace))
    assert torch.equal(*images) and steps[0] == steps[1]
    assert {"skipped", "reused"} <= set(steps[0])


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.4, 1.0), (0.3, 0.7)])
def test_only_inside_of_the_window(window, positive):
    """What was seen before it counts, and what was skipped in it is put right by the first step after it."""
    start, end = window
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0, "start_percent": start, "end_percent": end})
    image = sample(model, positive, latent=empty(FLUX1), steps=16)
    to_sigma = shared(FLUX1).get_model_object("model_sampling").percent_to_sigma
    inside = {step.index for step in last_run(trace).steps if to_sigma(end) < step.sigma <= to_sigma(start)}
    skipped = {i for i, kind in enumerate(kinds(trace)) if kind == "skipped"}
    assert skipped and skipped <= inside
    expected = by_hand(shared(FLUX1), positive, 16, set(range(16)) - skipped, corrected=True)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_window_skips_nothing(positive):
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0, "start_percent": 0.5, "end_percent": 0.5})
    image = sample(model, positive, latent=empty(FLUX1), steps=8)
    assert torch.equal(image, sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=8))
    assert set(kinds(trace)) == {"full"}


@pytest.mark.parametrize("tolerances", [(1.0, 0.0), (0.0, 1.0)])
def test_of_two_patches_in_a_row_the_last_one_s_tolerance_counts(tolerances, positive):
    first, unused = patch(shared(FLUX1), **ONLY | {"tolerance": tolerances[0]})
    second, trace = patch(first, **ONLY | {"tolerance": tolerances[1]})
    alone, other = patch(shared(FLUX1), **ONLY | {"tolerance": tolerances[1]})
    images = [sample(model, positive, latent=empty(FLUX1), steps=8) for model in (second, alone)]
    assert torch.equal(*images) and kinds(trace) == kinds(other) and not unused.runs
    assert ("skipped" in kinds(trace)) == (tolerances[1] > 0)


def test_the_model_beside_it_skips_nothing(positive):
    """As where ToPi Patch is bypassed: the model in front of it is as it was, also after a run that skipped."""
    before = sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=8)
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    assert not torch.equal(sample(model, positive, latent=empty(FLUX1), steps=8), before)
    assert torch.equal(sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=8), before)
    assert len(trace.runs) == 1


def test_an_interrupted_run_leaves_nothing_to_the_next(positive):
    model, _ = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    fresh = sample(model, positive, latent=empty(FLUX1), steps=8)

    def stop(step, *_):
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(model, positive, latent=latent(FLUX1, seed=3), steps=8, callback=stop)
    assert torch.equal(sample(model, positive, latent=empty(FLUX1), steps=8), fresh)


def test_a_sampler_that_tells_no_schedule_skips_nothing(positive):
    """As ToPi itself, which knows no step then."""

    def bare(model, x, sigmas, extra_args=None, callback=None, disable=None):
        options = dict(extra_args["model_options"])
        inner = {k: v for k, v in options.get("transformer_options", {}).items() if k != "sample_sigmas"}
        extra_args = extra_args | {"model_options": options | {"transformer_options": inner}}
        for sigma, to in pairwise(sigmas):
            x = x + (to - sigma) * (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
        return x

    sigmas = torch.linspace(1, 0, 9)
    patched, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    image = denoised(patched, positive, sigmas, sampler=comfy.samplers.KSAMPLER(bare))
    assert torch.equal(image, denoised(shared(FLUX1), positive, sigmas, sampler=comfy.samplers.KSAMPLER(bare)))
    assert not last_run(trace).steps


@pytest.mark.parametrize("when", ["put", "read"])
def test_a_step_that_is_done_again_for_lack_of_memory_counts_once(when, monkeypatch):
    positive = conditioning(FLUX1, [latent(FLUX1)])
    kind, calls = pack_module("topi_core.kv").KVCache, []
    method = getattr(kind, when)

    def full(cache, *args):
        calls.append(args)
        if len(calls) == FLUX1.depth // 2:
            raise torch.OutOfMemoryError("CUDA error: out of memory")
        return method(cache, *args)

    monkeypatch.setattr(kind, when, full)
    model, trace = patch(shared(FLUX1), mode="reuse", update_interval=2, tolerance=1.0)
    image = sample(model, positive, latent=empty(FLUX1), steps=12)
    run = last_run(trace)
    assert image.isfinite().all() and len(calls) == FLUX1.depth // 2 and run.no_room
    assert [step.index for step in run.steps] == list(range(12)) and "skipped" in kinds(trace)
    assert len({step.full_flops for step in run.steps}) == 1
    assert all(step.flops == step.full_flops for step in run.steps if step.kind == "full")


def test_the_report_says_how_many_steps_were_skipped(positive):
    model, trace = patch(shared(FLUX1), **ONLY | {"tolerance": 1.0})
    image = sample(model, positive, latent=empty(FLUX1), steps=8)
    (text, *_) = run_node("ToPiReport", trace=trace, latent={"samples": image})
    skipped = kinds(trace).count("skipped")
    assert f"{skipped} skipped" in text and "skipped by a cache" not in text
    assert f"{8 / (8 - skipped):.2f}x the whole run, by the count of operations" in text
    assert difference(image, sample(shared(FLUX1), positive, latent=empty(FLUX1), steps=8)) > 0
