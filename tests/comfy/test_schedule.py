"""Which steps score and which prune: by the position of sigma in the schedule, whatever the sampler does."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from oracle import compare
from sampling import conditioning, difference, empty, kinds, last_run, latent, layer_inputs, patch, sample
from small_models import FLUX1, QWEN, by_family, shared


def run(inputs: dict, **sampling):
    positive = conditioning(FLUX1, [latent(FLUX1)])
    _, trace, _ = compare(FLUX1, shared(FLUX1), positive, latent=empty(FLUX1), inputs=inputs, **sampling)
    return trace


@pytest.mark.parametrize(
    ("interval", "first", "expected"),
    [
        (3, 0, "A--A--A-"),
        (1, 0, "AAAAAAAA"),
        (10, 0, "A-------"),
        (3, 2, "..A--A--"),
        (5, 1, ".A----A-"),
        (2, 7, ".......A"),
        (2, 100, "........"),
    ],
)
def test_anchors(interval, first, expected):
    inputs = {"update_interval": interval, "first_anchor": first}
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **inputs)
    sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=8)
    letters = {"anchor": "A", "pruned": "-", "full": "."}
    assert "".join(letters[kind] for kind in kinds(trace)) == expected
    assert [step.index for step in last_run(trace).steps] == list(range(8))
    assert [anchor.step for anchor in last_run(trace).anchors] == [i for i, c in enumerate(expected) if c == "A"]


def test_first_anchor_equals_masking():
    trace = run({"update_interval": 3, "first_anchor": 2}, steps=8)
    assert kinds(trace) == ["full"] * 2 + ["anchor", "pruned", "pruned"] * 2


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "uni_pc", "seeds_2"])
def test_samplers_that_call_the_model_several_times_a_step(sampler):
    """Steps between and ahead count for the step their sigma is in."""
    trace = run({"update_interval": 2}, steps=6, sampler=sampler)
    assert [anchor.step for anchor in last_run(trace).anchors] == [0, 2, 4]
    assert [step.index for step in last_run(trace).steps] == list(range(6))


@pytest.mark.parametrize("mode", ["prune", "reuse"])
def test_a_sampler_that_looks_two_steps_ahead(mode):
    """heunpp2 comes back to a step that it has looked into: a step is recorded once, and an anchor too."""
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)

    def run(negative=None, cfg=1.0, **inputs):
        part = {"tau": 0.7} if mode == "prune" else {"max_keep": 0.6}
        inputs = layer_inputs(FLUX1) | part | inputs
        patched, trace = patch(shared(FLUX1), mode=mode, spacing="steps", **inputs)
        return sample(patched, positive, negative, latent=start, cfg=cfg, steps=12, sampler="heunpp2"), trace

    negative = conditioning(FLUX1, [latent(FLUX1, seed=5)], seed=5)  # of the same size: two anchors a step
    _, trace = run(update_interval=4, negative=negative, cfg=2.0)
    assert [anchor.step for anchor in last_run(trace).anchors] == [0, 0, 4, 4, 8, 8]
    image, trace = run(update_interval=4)
    full = sample(shared(FLUX1), positive, latent=start, steps=12, sampler="heunpp2")
    assert 0 < difference(image, full) < 0.5
    assert [step.index for step in last_run(trace).steps] == list(range(12))
    assert [anchor.step for anchor in last_run(trace).anchors] == [0, 4, 8]
    exact = {"update_interval": 1} if mode == "reuse" else {"update_interval": 4, "tau": 1.0}
    assert torch.equal(run(**exact)[0], full)


def test_a_schedule_that_starts_above_the_models_own():
    """As ModelSamplingAuraFlow's does for some shifts, by a rounding: without a window its first step is an anchor."""
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1))
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    sigmas = torch.tensor([1.5, 1.0000001, 0.6, 0.3, 0.0])
    comfy.sample.sample_custom(
        patched, start, 1.0, comfy.samplers.sampler_object("euler"), sigmas, positive, positive, start, seed=1,
        disable_pbar=True,
    )  # fmt: skip
    assert kinds(trace) == ["anchor", "pruned", "pruned", "pruned"]


@by_family
def test_img2img(family):
    """denoise below 1: the schedule is the part that is sampled, and its first step is an anchor."""
    positive = conditioning(family, [latent(family)])
    _, trace, _ = compare(family, shared(family), positive, latent=latent(family, seed=4), denoise=0.6, steps=4)
    assert kinds(trace) == ["anchor", "pruned", "pruned", "anchor"]
    sigmas = [step.sigma for step in last_run(trace).steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[0] < 0.95


def test_a_part_of_the_schedule():
    """KSampler (Advanced) with start and end steps."""
    trace = run({"update_interval": 2}, steps=8, start_step=3, last_step=7)
    assert kinds(trace) == ["anchor", "pruned", "anchor", "pruned"]


def test_a_schedule_that_ends_above_zero_and_looks_ahead():
    """Heun evaluates the last sigma too, which is the start of no step."""
    run({"update_interval": 2}, steps=8, last_step=5, sampler="heun")


def test_inpainting():
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    positive = conditioning(FLUX1, [latent(FLUX1)])
    compare(FLUX1, shared(FLUX1), positive, latent=latent(FLUX1, seed=4), noise_mask=mask)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.6), (0.3, 1.0), (0.25, 0.75)])
def test_start_and_end_windows(start, end):
    """Outside, the model runs with the full context; the first step inside is an anchor."""
    trace = run({"update_interval": 3, "start_percent": start, "end_percent": end}, steps=10)
    to_sigma = shared(FLUX1).get_model_object("model_sampling").percent_to_sigma
    inside = [to_sigma(end) < step.sigma <= to_sigma(start) for step in last_run(trace).steps]
    assert [kind != "full" for kind in kinds(trace)] == inside
    assert kinds(trace)[inside.index(True)] == "anchor"
    assert True in inside and False in inside


def test_an_empty_window_prunes_nothing():
    patched, trace = patch(shared(FLUX1), tau=0.5, start_percent=0.5, end_percent=0.5, **layer_inputs(FLUX1))
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    assert torch.equal(sample(patched, positive, latent=start), sample(shared(FLUX1), positive, latent=start))
    assert set(kinds(trace)) == {"full"}


@by_family
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_equal_bounds_keep_a_fixed_fraction(family, fraction):
    inputs = {"min_keep": fraction, "max_keep": fraction, "update_interval": 2}
    positive = conditioning(family, [latent(family)])
    _, trace, _ = compare(family, shared(family), positive, latent=empty(family), inputs=inputs)
    assert [anchor.share for anchor in last_run(trace).anchors] == [fraction] * 2


@pytest.mark.parametrize(("bounds", "share"), [({"min_keep": 0.75}, 0.75), ({"max_keep": 0.25}, 0.25)])
def test_bounds_hold_against_tau(bounds, share):
    trace = run({"tau": 0.5} | bounds)
    assert last_run(trace).anchors[0].share == share


def test_tau_zero_needs_no_token():
    """The smallest set that holds no influence is empty: the reference is gone from the pruned layers."""
    trace = run({"tau": 0.0})
    assert last_run(trace).anchors[0].share == 0.0
    pruned = next(step for step in last_run(trace).steps if step.kind == "pruned")
    assert pruned.tokens == FLUX1.text_tokens + 64


def test_one_step():
    positive, once = conditioning(FLUX1, [latent(FLUX1)]), {"latent": empty(FLUX1), "steps": 1}
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1))
    assert torch.equal(sample(patched, positive, **once), sample(shared(FLUX1), positive, **once))
    assert kinds(trace) == ["anchor"]


def test_a_schedule_of_custom_sigmas():
    """SamplerCustom: sigmas that no scheduler made."""
    sigmas = torch.tensor([1.0, 0.98, 0.7, 0.69, 0.2, 0.0])
    positive = conditioning(QWEN, [latent(QWEN)])
    _, trace, _ = compare(QWEN, shared(QWEN), positive, latent=empty(QWEN), sigmas=sigmas)
    assert [step.sigma for step in last_run(trace).steps] == pytest.approx(sigmas[:-1].tolist())
