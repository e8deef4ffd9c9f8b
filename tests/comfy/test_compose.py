"""ToPi with what else is put on a model: LoRA, caches, ControlNet, other packs' patches, weights in few bits."""

import pytest
import torch
from comfy.patcher_extension import CallbacksMP
from oracle import FLOAT_ERROR, Oracle, compare
from sampling import (
    CACHE,
    conditioning,
    difference,
    empty,
    kept_sets,
    kinds,
    last_run,
    latent,
    layer_inputs,
    patch,
    run_node,
    sample,
)
from small_models import FAMILIES, FLUX1, FLUX2, KREA, MAGE, QWEN, SmallControl, by_family, load, shared, with_lora

by_replaceable = pytest.mark.parametrize("family", [f for f in FAMILIES if f.replacements], ids=lambda f: f.name)
by_order = pytest.mark.parametrize("order", ["before", "after"])


@by_family
def test_lora_before(family):
    model, positive = load(family), conditioning(family, [latent(family)])
    _, plain, _ = compare(family, model, positive, latent=empty(family))
    _, trace, _ = compare(family, with_lora(model), positive, latent=empty(family))
    assert kept_sets(trace) != kept_sets(plain)


def test_lora_after_is_the_same_as_before():
    model, positive = load(FLUX1), conditioning(FLUX1, [latent(FLUX1)])
    before = sample(patch(with_lora(model), **layer_inputs(FLUX1))[0], positive, latent=empty(FLUX1))
    patched, trace = patch(model, **layer_inputs(FLUX1))
    assert torch.equal(sample(with_lora(patched), positive, latent=empty(FLUX1)), before)
    assert "pruned" in kinds(trace)


def patch_with(attach, order: str, family, **inputs):
    """ToPi Patch with another pack's patch put on before or after it -> (model, trace)."""
    if order == "before":
        return patch(attach(shared(family)), **layer_inputs(family), **inputs)
    patched, trace = patch(shared(family), **layer_inputs(family), **inputs)
    return attach(patched), trace


@by_order
@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("family", [FLUX1, QWEN, KREA], ids=lambda f: f.name)
def test_caches_that_skip_steps(family, cache, order):
    """Skipped steps are skipped, and an anchor among them happens at the next step that is computed."""
    positive, negative = conditioning(family, [latent(family)]), conditioning(family, [latent(family)], seed=1)
    sampling = dict(latent=empty(family), cfg=1.5, steps=16)
    inputs = {"tau": 0.75, "update_interval": 3}
    settings = CACHE | ({"reuse_threshold": 2.0} if family is KREA else {})  # so that an anchor is among the skipped
    model = shared(family)
    if order == "before":
        model = run_node(cache, model=model, **settings)[0]
    patched, trace = patch(model, **inputs, **layer_inputs(family))
    if order == "after":
        patched = run_node(cache, model=patched, **settings)[0]
    image = sample(patched, positive, negative, **sampling)

    oracle = Oracle(family, **inputs)
    expected = oracle.attach(run_node(cache, model=shared(family), **settings)[0])
    assert difference(image, sample(expected, positive, negative, **sampling)) < FLOAT_ERROR
    assert kept_sets(trace) == oracle.anchors
    computed = {step for step, _, _ in oracle.calls}
    assert {step.index for step in last_run(trace).steps if step.kind in ("anchor", "pruned")} == computed
    late = [anchor.step for anchor in last_run(trace).anchors if anchor.step % 3]
    assert late and len(computed) < 16


def test_a_cache_that_skips_nothing_changes_nothing():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    patched, _ = patch(shared(FLUX1), **layer_inputs(FLUX1))
    cached = run_node("EasyCache", model=patched, reuse_threshold=0.0)[0]
    assert torch.equal(sample(cached, positive, latent=start), sample(patched, positive, latent=start))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.control], ids=lambda f: f.name)
def test_controlnet(family):
    """Its residuals go to the target's tokens, which stand before the references."""
    refs, control = [latent(family)], SmallControl(family, outputs=family not in (QWEN, MAGE))
    image, _, _ = compare(family, shared(family), conditioning(family, refs, control=control), latent=empty(family))
    without, _, _ = compare(family, shared(family), conditioning(family, refs), latent=empty(family))
    assert difference(image, without) > 1e-2


def block_names(family):
    singles = family.depth - family.double_blocks
    return [("double_block", i) for i in range(family.double_blocks)] + [("single_block", i) for i in range(singles)]


@by_order
@by_replaceable
def test_block_replacements_of_others_are_still_called(family, order):
    """They change what every block gives, and are called for every block and step."""
    calls = []

    def attach(model):
        model = model.clone()
        for name, number in block_names(family):

            def replacement(args, extra, place=(name, number)):
                calls.append(place)
                out = extra["original_block"](args)
                out["img"] = out["img"] * 1.02
                return out

            model.set_model_patch_replace(replacement, "dit", name, number)
        return model

    positive, start = conditioning(family, [latent(family)]), empty(family)
    inputs = {"tau": 0.8, "update_interval": 3}
    patched, trace = patch_with(attach, order, family, **inputs)
    image = sample(patched, positive, latent=start)
    assert calls == block_names(family) * 4
    oracle = Oracle(family, **inputs)
    assert difference(image, sample(oracle.attach(attach(shared(family))), positive, latent=start)) < FLOAT_ERROR
    assert kept_sets(trace) == oracle.anchors
    assert "pruned" in kinds(trace)


@by_order
@by_family
def test_attention_overrides_of_others_are_still_called(family, order):
    """Attention with another temperature, in every block of every step."""
    lengths = []

    def override(func, q, k, v, heads, *args, **kwargs):
        lengths.append(k.shape[2 if kwargs.get("skip_reshape") else 1])
        return func(q * 0.9, k, v, heads, *args, **kwargs)

    def attach(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    positive, start = conditioning(family, [latent(family)]), empty(family)
    inputs = {"tau": 0.8, "update_interval": 3}
    patched, trace = patch_with(attach, order, family, **inputs)
    image = sample(patched, positive, latent=start)
    kept = int(last_run(trace).anchors[0].kept.sum())
    full, short = (lengths.count(family.text_tokens + 64 + count) for count in (64, kept))
    assert (full, short) == (2 * family.depth + 2 * family.front_layers, 2 * (family.depth - family.front_layers))
    oracle = Oracle(family, **inputs)
    assert difference(image, sample(oracle.attach(attach(shared(family))), positive, latent=start)) < FLOAT_ERROR
    assert kept_sets(trace) == oracle.anchors


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.replacements], ids=lambda f: f.name)
def test_hooks_of_others_on_the_blocks_are_still_called(family):
    """Where a pack has nothing else to change a block with."""
    model = shared(family)
    network = model.model.diffusion_model
    names = {"krea2": "blocks.1", "omnigen2": "layers.1", "boogu": "single_stream_layers.1"}
    block = network.get_submodule(names[family.name])
    calls = []

    def after(module, args, output):
        calls.append(output.shape[1])
        return output * 1.02

    positive, start = conditioning(family, [latent(family)]), empty(family)
    inputs = {"tau": 0.8, "update_interval": 3}
    with block.register_forward_hook(after):
        patched, trace = patch(model, **layer_inputs(family), **inputs)
        image = sample(patched, positive, latent=start)
        assert len(calls) == 4 and calls[1] < calls[0]
        oracle = Oracle(family, **inputs)
        assert difference(image, sample(oracle.attach(model), positive, latent=start)) < FLOAT_ERROR
    assert kept_sets(trace) == oracle.anchors
    assert difference(image, compare(family, model, positive, latent=start, inputs=inputs)[0]) > 1e-3


def test_other_wrappers_around_the_network_are_still_called():
    """And see its arguments where they always are."""
    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append(isinstance(args[-1], dict) and "sigmas" in args[-1])
        return executor(*args, **kwargs)

    before = shared(FLUX1).clone()
    before.add_wrapper_with_key("diffusion_model", "other", wrapper)
    patched, _ = patch(before, **layer_inputs(FLUX1))
    patched.add_wrapper_with_key("diffusion_model", "another", wrapper)
    sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1))
    assert seen == [True] * 8


def test_of_two_patches_in_a_row_the_last_counts():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    first, unused = patch(shared(FLUX1), tau=0.3, **layer_inputs(FLUX1))
    second, trace = patch(first, tau=0.8, update_interval=2, **layer_inputs(FLUX1))
    alone, _ = patch(shared(FLUX1), tau=0.8, update_interval=2, **layer_inputs(FLUX1))
    assert torch.equal(sample(second, positive, latent=start), sample(alone, positive, latent=start))
    assert len(trace.runs) == 1 and not unused.runs


@by_order
@pytest.mark.parametrize("mode", ["prune", "reuse"])
@pytest.mark.parametrize("family", [FLUX2, QWEN, KREA], ids=lambda f: f.name)
def test_flux_kv_cache_is_refused_by_name(family, order, mode):
    """It takes the references out of the sequence after the first step: there is nothing left to prune or to reuse."""
    model = shared(family)
    if order == "before":
        model = run_node("FluxKVCache", model=model)[0]
    model = patch(model, mode=mode, **layer_inputs(family))[0]
    if order == "after":
        model = run_node("FluxKVCache", model=model)[0]
    with pytest.raises(RuntimeError, match=r"remove FluxKVCache, or bypass ToPi Patch") as refusal:
        sample(model, conditioning(family, [latent(family)]), latent=empty(family))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mode", ["prune", "reuse"])
def test_another_patch_that_drops_references_is_named(mode):
    def drop(inputs):
        return inputs | {"img": inputs["img"][:, :64]}

    model = shared(FLUX2).clone()
    model.set_model_post_input_patch(drop)
    model = patch(model, mode=mode, **layer_inputs(FLUX2))[0]
    with pytest.raises(RuntimeError, match=r"another patch") as refusal:
        sample(model, conditioning(FLUX2, [latent(FLUX2)]), latent=empty(FLUX2))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@by_family
def test_weights_in_few_bits(family, dtype):
    """tau = 1 is bit-equal, the selection is the oracle's, and a pruned step is near to masking but for rounding."""
    model, start = load(family, dtype), empty(family)
    assert model.model.diffusion_model.dtype == dtype
    positive = conditioning(family, [latent(family)])
    full, _ = patch(model, tau=1.0, **layer_inputs(family))
    assert torch.equal(sample(full, positive, latent=start), sample(model, positive, latent=start))
    patched, trace = patch(model, tau=0.8, **layer_inputs(family))
    image = sample(patched, positive, latent=start, steps=2)
    oracle = Oracle(family, tau=0.8)
    expected = sample(oracle.attach(model), positive, latent=start, steps=2)
    assert kept_sets(trace) == oracle.anchors
    assert kinds(trace) == ["anchor", "pruned"]
    rounding = torch.finfo(model.model.get_dtype_inference()).eps
    assert difference(image, expected) < max(4 * rounding, FLOAT_ERROR)


def test_partial_offloading():
    """Half of the weights are cast when they are used, with a LoRA on them."""
    model = with_lora(load(FLUX1))
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    whole, _ = patch(model, tau=0.8, **layer_inputs(FLUX1))
    expected = sample(whole, positive, latent=start)
    offloaded = []

    def unload_half(patcher):
        offloaded.append(patcher.partially_unload(torch.device("cpu"), patcher.model_size() // 2))

    partial, trace = patch(model, tau=0.8, **layer_inputs(FLUX1))
    partial.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "half", unload_half)
    assert difference(sample(partial, positive, latent=start), expected) < FLOAT_ERROR
    assert offloaded[0] > 0 and partial.model.model_lowvram
    assert "pruned" in kinds(trace)


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=lambda f: f.name)
def test_the_stock_conditioning_nodes(family):
    """ReferenceLatent twice, the method node and FluxGuidance give the same as the helper of these tests."""
    refs = [latent(family), latent(family, 12, 20, seed=1)]
    cond = conditioning(family)
    for reference in refs:
        (cond,) = run_node("ReferenceLatent", conditioning=cond, latent={"samples": reference})
    (cond,) = run_node("FluxKontextMultiReferenceLatentMethod", conditioning=cond, reference_latents_method="index")
    (cond,) = run_node("FluxGuidance", conditioning=cond, guidance=2.0)
    image, _, _ = compare(family, shared(family), cond, latent=empty(family))
    cond = conditioning(family, refs, "index", guidance=2.0)
    same, _, _ = compare(family, shared(family), cond, latent=empty(family))
    assert torch.equal(image, same)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_another_patch_splits_runs_unpruned_and_says_so_once(batch, caplog):
    """As packs do that run cond and uncond one after the other to save memory."""

    def one_after_the_other(apply_model, args):
        def part(value, i):
            if isinstance(value, list):
                return [part(one, i) for one in value]
            return value.chunk(2)[i] if torch.is_tensor(value) and value.shape[0] == 2 * batch else value

        conds = [{key: part(value, i) for key, value in args["c"].items()} for i in range(2)]
        halves = zip(args["input"].chunk(2), args["timestep"].chunk(2), conds, strict=True)
        return torch.cat([apply_model(x, sigma, **cond) for x, sigma, cond in halves])

    model = load(FLUX1).clone()
    positive, negative = (conditioning(FLUX1, [latent(FLUX1)], seed=seed) for seed in (0, 1))
    settings = {"latent": empty(FLUX1, batch=batch), "cfg": 3.0}
    model.set_model_unet_function_wrapper(one_after_the_other)
    expected = sample(model, positive, negative, **settings)
    patched, trace = patch(model, **layer_inputs(FLUX1))
    caplog.clear()
    assert torch.equal(sample(patched, positive, negative, **settings), expected)
    assert [record.getMessage() for record in caplog.records if "splits the batch" in record.getMessage()] != []
    assert not last_run(trace).anchors
    caplog.clear()
    sample(patched, positive, negative, **settings)
    assert not any("splits the batch" in record.getMessage() for record in caplog.records)
