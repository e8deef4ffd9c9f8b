"""A run's state is its own: made at its start, gone at its end, and nowhere else."""

import gc
import logging

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import create_model_options_clone
from oracle import compare
from sampling import conditioning, empty, kept_sets, kinds, last_run, latent, layer_inputs, patch, sample
from small_models import BOOGU, FLUX1, KREA, QWEN, by_family, everything, load, shared


def hooked(model) -> list:
    """The modules that a hook of torch waits on."""
    return [module for module in model.model.modules() if module._forward_pre_hooks]


def stop_at(step: int, error: BaseException):
    def callback(i, x0, x, total_steps):
        if i == step:
            raise error

    return callback


@by_family
def test_neither_the_node_nor_a_run_changes_the_model(family):
    model = load(family)
    positive, start = conditioning(family, [latent(family)]), empty(family)
    sample(model, positive, latent=start)  # ComfyUI marks the weights it has loaded
    before = everything(model)
    patched, trace = patch(model, **layer_inputs(family))
    assert everything(model) == before
    patched_before = everything(patched)
    sample(patched, positive, latent=start)
    assert kinds(trace)[1] == "pruned"
    assert everything(patched) == patched_before
    after = everything(model)
    assert after == before


@pytest.mark.parametrize("error", [InterruptProcessingException(), RuntimeError("out of memory")], ids=repr)
@pytest.mark.parametrize("step", [0, 2])
def test_an_interrupted_run_leaves_nothing(error, step):
    """In mid-run, right after an anchor or a pruned step: the next run is a fresh one, bit by bit."""
    model = load(FLUX1)
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    plain = sample(model, positive, latent=start)
    fresh = sample(patch(model, update_interval=3, **layer_inputs(FLUX1))[0], positive, latent=start)
    patched, trace = patch(model, update_interval=3, **layer_inputs(FLUX1))
    before = everything(patched)
    with pytest.raises(type(error)):
        sample(patched, positive, latent=latent(FLUX1, seed=3), callback=stop_at(step, error))
    assert everything(patched) == before
    assert torch.equal(sample(patched, positive, latent=start), fresh)
    assert torch.equal(sample(model, positive, latent=start), plain)
    assert [anchor.step for anchor in last_run(trace).anchors] == [0, 3]


@pytest.mark.parametrize("family", [FLUX1, KREA, BOOGU], ids=lambda f: f.name)
@pytest.mark.parametrize("step", [0, 1])
def test_an_error_inside_a_block_leaves_nothing(family, step):
    """Another patch fails in the middle of an anchor step, and of a pruned one."""
    model = load(family)
    positive, start = conditioning(family, [latent(family)]), empty(family)
    sample(model, positive, latent=start, steps=1)  # ComfyUI marks the weights it has loaded
    failed = []

    def fail_once(func, q, k, *args, **kwargs):
        options = kwargs["transformer_options"]
        late = float(options["sigmas"][0]) < float(options["sample_sigmas"][0])
        if not failed and late == step and k.shape[-2] > 64 + family.text_tokens:  # in a block that sees references
            failed.append(len(hooked(model)))
            raise ValueError("from another patch")
        return func(q, k, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = fail_once
    patched, _ = patch(model, **layer_inputs(family))
    before = everything(patched)
    with pytest.raises(ValueError, match="from another patch"):
        sample(patched, positive, latent=start)
    assert failed[0] > 0 or family.replacements
    assert everything(patched) == before
    again = sample(patched, positive, latent=start)
    assert torch.equal(again, sample(patch(model, **layer_inputs(family))[0], positive, latent=start))


@pytest.mark.parametrize("family", [FLUX1, QWEN], ids=lambda f: f.name)
def test_one_patched_model_in_two_samplers(family):
    """With other references, sizes and batches, and back again: each is its own fresh run."""
    cases = [
        (conditioning(family, [latent(family)]), empty(family)),
        (conditioning(family, [latent(family, 8, 12, seed=1), latent(family, 12, 8, seed=2)]), empty(family, 12, 20)),
        (conditioning(family, [latent(family, seed=4)]), empty(family, batch=2)),
        (conditioning(family), empty(family)),
    ]
    patched, trace = patch(shared(family), tau=0.8, update_interval=3, **layer_inputs(family))
    for positive, start in [*cases, cases[0]]:
        image = sample(patched, positive, latent=start, steps=3)
        fresh, other = patch(shared(family), tau=0.8, update_interval=3, **layer_inputs(family))
        assert torch.equal(image, sample(fresh, positive, latent=start, steps=3))
        assert kept_sets(trace) == kept_sets(other)
    assert len(trace.runs) == 5


def test_the_references_of_the_previous_run_are_not_reused():
    """Same sizes, same prompt, other picture."""
    patched, trace = patch(shared(FLUX1), tau=0.7, **layer_inputs(FLUX1))
    for seed in (1, 2):
        sample(patched, conditioning(FLUX1, [latent(FLUX1, seed=seed)]), latent=empty(FLUX1))
    first, second = (run.anchors[0].kept for run in trace.runs)
    assert not torch.equal(first, second)


def test_a_second_run_prunes_as_much_as_the_first():
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1))
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    images = [sample(patched, positive, latent=start) for _ in range(2)]
    assert torch.equal(*images)
    first, second = ([step.tokens for step in run.steps] for run in trace.runs)
    assert first == second


def test_the_unpatched_model_beside_the_patched_one():
    """Both branches of a graph, one after the other."""
    model = load(FLUX1)
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    plain = sample(model, positive, latent=start)
    patched, _ = patch(model, tau=0.5, **layer_inputs(FLUX1))
    assert not torch.equal(sample(patched, positive, latent=start), plain)
    assert torch.equal(sample(model, positive, latent=start), plain)


@pytest.mark.parametrize("metric", ["influence", "attention", "similarity", "random"])
def test_metrics_repeat_themselves_and_leave_the_global_random_state_alone(metric):
    patched, trace = patch(shared(FLUX1), tau=0.6, update_interval=2, metric=metric, **layer_inputs(FLUX1))
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    images, kept, states = [], [], []
    for model in (patched, patched, shared(FLUX1)):
        images.append(sample(model, positive, latent=start))
        states.append(torch.get_rng_state())
        kept.append(kept_sets(trace))
    assert torch.equal(images[0], images[1]) and kept[0] == kept[1]
    assert torch.equal(states[0], states[2])
    assert "pruned" in kinds(trace)
    assert 0 < len(kept[0][0][1][0]) < 64


def test_random_tokens_are_a_share_of_all_tokens():
    """With equal influence everywhere, tau is the kept fraction; another seed keeps others."""
    patched, trace = patch(shared(FLUX1), tau=0.5, metric="random", **layer_inputs(FLUX1))
    for seed in (1, 2):
        sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), seed=seed)
    first, second = (run.anchors[0].kept for run in trace.runs)
    assert abs(first.float().mean() - 0.5) < 0.02
    assert not torch.equal(first, second)


def test_metrics_keep_different_tokens():
    kept = {}
    for metric in ("influence", "similarity", "random"):
        patched, trace = patch(shared(FLUX1), min_keep=0.5, max_keep=0.5, metric=metric, **layer_inputs(FLUX1))
        sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=2)
        kept[metric] = tuple(kept_sets(trace)[0][1][0])
    assert len(set(kept.values())) == 3


@by_family
def test_a_sampler_that_skips_outer_sample_runs_unpruned_and_says_so_once(family, caplog):
    """As some packs do: the guider's inner methods are called directly."""

    def inner_sample(model):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning(family, [latent(family)]), [])
        guider.model_options = create_model_options_clone(model.model_options)
        guider.conds = {key: [cond.copy() for cond in conds] for key, conds in guider.original_conds.items()}
        comfy.sampler_helpers.prepare_model_patcher(model, guider.conds, guider.model_options)
        start = comfy.sample.fix_empty_latent_channels(model, empty(family))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(start, 5)
            sampler = comfy.samplers.sampler_object("euler")
            return guider.outer_sample(noise, start, sampler, sigmas, disable_pbar=True, seed=5)

    expected = inner_sample(shared(family))
    patched, trace = patch(shared(family), tau=0.5, **layer_inputs(family))
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert torch.equal(inner_sample(patched), expected)
    assert len([record for record in caplog.records if "ToPi" in record.getMessage()]) == 1
    assert not any(run.anchors for run in trace.runs)
    sample(patched, conditioning(family, [latent(family)]), latent=empty(family))
    assert "pruned" in kinds(trace)


def test_tensors_do_not_pile_up():
    """Two more runs leave no more tensors alive than a run's own record."""
    positive, start = conditioning(FLUX1, [latent(FLUX1, batch=2)]), empty(FLUX1, batch=2)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def once() -> None:
        patched, _ = patch(shared(FLUX1), update_interval=2, **layer_inputs(FLUX1))
        sample(patched, positive, positive, cfg=2.0, latent=start)

    once()
    before = alive()
    once()
    once()
    assert alive() <= before


def test_two_patched_models_in_turns():
    """Their runs alternate: each is a fresh one's, bit by bit, and their traces do not mix."""

    def patched(family):
        return patch(shared(family), tau=0.6, **layer_inputs(family))

    def image(model, family):
        return sample(model, conditioning(family, [latent(family)]), latent=empty(family), steps=2)

    models = {family: patched(family) for family in (FLUX1, QWEN)}
    fresh = {family: image(patched(family)[0], family) for family in models}
    for _ in range(2):
        for family, (model, _) in models.items():
            assert torch.equal(image(model, family), fresh[family])
    for family, (_, trace) in models.items():
        assert [run.model.family for run in trace.runs] == [family.name] * 2


def test_a_run_is_the_same_after_another_model_was_compared():
    """The oracle shares the model with the patch: neither disturbs the other."""
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    first = compare(FLUX1, shared(FLUX1), positive, latent=start)[0]
    assert torch.equal(compare(FLUX1, shared(FLUX1), positive, latent=start)[0], first)


def test_a_model_on_several_gpus_is_refused():
    """ComfyUI's nodes for that leave the model's copies on it, and each run finds its own options in them."""
    patched, _ = patch(shared(FLUX1), **layer_inputs(FLUX1))
    patched.set_additional_models("multigpu", [patched.clone()])
    with pytest.raises(RuntimeError, match="sampled on several GPUs at once; remove one of the two"):
        sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1))
