"""ToPi Calibrate and ToPi Save Profile on real small models, and a run that finds its layers itself."""

import logging

import pytest
import torch
from oracle import Oracle, four_axes
from sampling import (
    calibrate,
    conditioning,
    empty,
    kept_sets,
    kinds,
    last_calibration,
    last_run,
    latent,
    patch,
    run_node,
    sample,
)
from small_models import FLUX1, FLUX2, QWEN, ShortOfMemory, as_class, by_family, everything, load, shared, with_lora

from topi_core.calibration import top_layers


class Listener(Oracle):
    """Eq. 4 by brute force: every attention of a run once more, in full and in float64, through another hook."""

    def __init__(self, family):
        super().__init__(family, update_interval=1, layers=range(family.depth), drop=False)
        self.shares = []  # one list by layer a call

    def score(self, q, k, v, mask):
        if self.layer == 0:
            self.shares.append([])
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # heads of queries may share theirs
        logits = q.double() @ keys.double().mT / q.shape[-1] ** 0.5
        attention = (logits if mask is None else logits + four_axes(mask).double()).softmax(-1)
        target, context = self.place("t", self.joint), self.place("c", self.joint)
        self.shares[-1].append(attention[:, :, target, context].sum((1, 2, 3)) / (q.shape[1] * self.target))

    def told(self):
        return [torch.stack(call, 1) for call in self.shares]


@by_family
def test_sensitivity_is_that_of_brute_force_and_the_image_stays_as_it_is(family):
    """A batch of two with different references, several of them: one row per image, the mean over the steps."""
    positive = conditioning(family, [latent(family, batch=2), latent(family, 12, 20, batch=2, seed=1)])
    start = empty(family, batch=2)
    listener = Listener(family)
    plain = sample(listener.attach(shared(family)), positive, latent=start)
    model, calibrating = calibrate(shared(family))
    assert torch.equal(sample(model, positive, latent=start), plain)
    found = last_calibration(calibrating)
    assert found.steps.tolist() == [4, 4] and found.depth == family.depth
    expected = torch.stack(listener.told()).mean(0)
    order = sorted(range(2), key=lambda image: calibrating.trace.runs[-1].pairs[image])
    torch.testing.assert_close(found.sensitivity, expected[order].double(), rtol=1e-4, atol=1e-6)


@by_family
def test_neither_the_node_nor_a_run_changes_the_model(family):
    model = load(family)
    positive, start = conditioning(family, [latent(family)]), empty(family)
    sample(model, positive, latent=start)
    before = everything(model)
    patched, _ = calibrate(model)
    sample(patched, positive, latent=start)
    assert everything(model) == before


@pytest.mark.parametrize("family", [FLUX1, QWEN], ids=lambda f: f.name)
def test_guidance_counts_every_row_that_has_references(family):
    """Cond and uncond with them: their mean. A negative prompt without: the positive alone."""
    refs, start = [latent(family)], empty(family)
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
    listener = Listener(family)
    model, calibrating = calibrate(listener.attach(shared(family)))
    sample(model, positive, negative, latent=start, cfg=2.0, steps=1)
    assert len(last_calibration(calibrating)) == 1
    mean = torch.cat(listener.told()).mean(0)
    torch.testing.assert_close(last_calibration(calibrating).sensitivity[0], mean, rtol=1e-4, atol=1e-6)

    sample(model, positive, latent=start, steps=1)
    alone = last_calibration(calibrating)
    sample(model, positive, conditioning(family, seed=1), latent=start, cfg=2.0, steps=1)
    torch.testing.assert_close(last_calibration(calibrating).sensitivity, alone.sensitivity)
    assert torch.equal(last_calibration(calibrating).pairs, alone.pairs)


@pytest.mark.parametrize("node", ["SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple"])
def test_calls_with_blocks_left_out_do_not_count(node):
    """Skip layer guidance: what tells is the call of the positive prompt, which has all blocks."""
    model = run_node(node, model=shared(FLUX1), double_layers="1", single_layers="0", start_percent=0.0)[0]
    positive, negative = (conditioning(FLUX1, [latent(FLUX1, seed=seed)], seed=seed) for seed in (0, 1))

    def run(model):
        return sample(model, positive, negative, cfg=2.0, latent=empty(FLUX1), steps=3)

    listening, calibrating = calibrate(model)
    assert torch.equal(run(listening), run(model))
    assert last_calibration(calibrating).steps.tolist() == [3]


def test_a_sampler_that_calls_twice_a_step_counts_its_steps_once():
    model, calibrating = calibrate(shared(FLUX1))
    sample(model, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), sampler="heun")
    assert last_calibration(calibrating).steps.tolist() == [4]


def test_a_pair_is_its_references_its_prompt_and_its_noise():
    model, calibrating = calibrate(shared(FLUX1))
    start, refs = empty(FLUX1), [latent(FLUX1)]
    for positive, seed in (
        (conditioning(FLUX1, refs), 1),
        (conditioning(FLUX1, refs), 1),
        (conditioning(FLUX1, refs), 2),
        (conditioning(FLUX1, refs, seed=1), 1),
        (conditioning(FLUX1, [latent(FLUX1, seed=1)]), 1),
    ):
        sample(model, positive, latent=start, steps=1, seed=seed)
    pairs = [run.pairs for run in calibrating.trace.runs]
    assert pairs[0] == pairs[1] and len(set(pairs)) == 4


def test_a_lora_is_calibrated_with_the_model():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    model, plain = calibrate(shared(FLUX1))
    sample(model, positive, latent=start, steps=1)
    model, other = calibrate(with_lora(load(FLUX1)))
    sample(model, positive, latent=start, steps=1)
    assert torch.equal(last_calibration(plain).pairs, last_calibration(other).pairs)
    assert not torch.allclose(last_calibration(plain).sensitivity, last_calibration(other).sensitivity)


def test_of_patch_and_calibrate_on_one_model_the_last_counts():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    patched, trace = patch(shared(FLUX1))
    model, calibrating = calibrate(patched)
    sample(model, positive, latent=start)
    assert len(calibrating.trace.runs) == 1 and not trace.runs
    patched, trace = patch(model)
    sample(patched, positive, latent=start)
    assert len(calibrating.trace.runs) == 1 and "pruned" in kinds(trace)


def test_without_references_one_sentence_says_so(caplog):
    model, calibrating = calibrate(shared(FLUX1))
    with caplog.at_level(logging.INFO):
        made = sample(model, conditioning(FLUX1), latent=empty(FLUX1), steps=1)
    assert "nothing was calibrated" in caplog.text
    with pytest.raises(ValueError, match=r"no reference reached the model: connect ReferenceLatent") as refusal:
        run_node("ToPiSaveProfile", calibration=calibrating, latent={"samples": made}, name="none")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("top_m", [0, 9])
def test_top_m_beyond_the_model_is_refused(top_m):
    with pytest.raises(ValueError, match=rf"top_m must be in \[1, 8\] for this model of 8 layers, got {top_m}"):
        calibrate(shared(FLUX1), top_m)


# A run without a profile


@by_family
def test_the_first_anchor_finds_what_a_calibration_of_that_step_finds(family, caplog):
    positive, start = conditioning(family, [latent(family)]), empty(family)
    with caplog.at_level(logging.INFO):
        patched, trace = patch(shared(family), update_interval=2)
        image = sample(patched, positive, latent=start)
    run = last_run(trace)
    model, calibrating = calibrate(shared(family))
    sample(model, positive, latent=start)
    first = torch.stack(calibrating.trace.runs[-1].heard[0]).mean(0)[0]
    assert run.layers == top_layers(first, 3) and run.found_at == 0
    assert run.model.front_layers == round(family.depth * 10 / 58.5)
    assert ",".join(map(str, run.layers)) in caplog.text and "ToPi Calibrate" in caplog.text

    typed, other = patch(shared(family), update_interval=2, layers=",".join(map(str, run.layers)))
    assert torch.equal(image, sample(typed, positive, latent=start))
    assert kept_sets(trace) == kept_sets(other) and len(run.anchors) == 2


@pytest.mark.parametrize("mode", ["prune", "reuse"])
def test_where_every_token_is_kept_nothing_is_searched(mode, caplog):
    patched, trace = patch(shared(FLUX1), mode=mode, tau=1.0 if mode == "prune" else 0.85, update_interval=2)
    with caplog.at_level(logging.INFO):
        image = sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1))
    run = last_run(trace)
    assert run.layers == (FLUX1.depth // 2,) and run.found_at is None and len(run.anchors) == 2
    assert "scored all" not in caplog.text
    assert "the middle one" in run_node("ToPiReport", trace=trace, latent={"samples": image})[0]


@pytest.mark.parametrize("metric", ["influence", "attention", "similarity", "random"])
def test_every_metric_works_on_the_same_layers(metric):
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    patched, trace = patch(shared(FLUX1), tau=0.6, update_interval=2, metric=metric)
    image = sample(patched, positive, latent=start)
    _, influence = patched_too = patch(shared(FLUX1))
    sample(patched_too[0], positive, latent=start, steps=1)
    assert last_run(trace).layers == last_run(influence).layers
    if metric != "random":  # its draws depend on how many layers were scored
        typed, _ = patch(
            shared(FLUX1), tau=0.6, update_interval=2, metric=metric, layers=",".join(map(str, last_run(trace).layers))
        )
        assert torch.equal(sample(typed, positive, latent=start), image)


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=lambda f: f.name)
def test_layers_are_found_from_all_calls_of_the_step(family):
    """Cond and uncond in one call or in two, and conds with other references: every row counts."""
    model = shared(family)
    apart = as_class(ShortOfMemory, model)
    positive = conditioning(family, [latent(family, seed=1)])
    negative = conditioning(family, [latent(family, 12, 12, seed=2)], seed=1)
    layers = []
    for each in (model, apart):
        patched, trace = patch(each)
        sample(patched, positive, negative, latent=empty(family), cfg=2.0)
        layers.append(last_run(trace).layers)
        one, calibrating = calibrate(each)
        sample(one, positive, negative, latent=empty(family), cfg=2.0, steps=1)
        assert last_calibration(calibrating).top(3) == layers[-1]
    assert layers[0] == layers[1]


def test_each_run_finds_its_own_layers_anew():
    patched, trace = patch(shared(FLUX1))
    for seed in (1, 2):
        sample(patched, conditioning(FLUX1, [latent(FLUX1, seed=seed)]), latent=empty(FLUX1), steps=2)
    assert all(run.found_layers and not run.model.layers for run in trace.runs)
    text = run_node("ToPiReport", trace=trace, latent={"samples": _again(patched)})[0]
    assert "found at step 0, as no profile fits" in text and "ToPi Save Profile" in text


def _again(patched):
    return sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=2)


def test_a_cache_that_skips_steps_is_averaged_over_what_was_computed():
    model = run_node("EasyCache", model=shared(FLUX1), reuse_threshold=1.2, start_percent=0.1, end_percent=0.95)[0]
    model, calibrating = calibrate(model)
    sample(model, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=16)
    assert 0 < last_calibration(calibrating).steps.item() < 16
