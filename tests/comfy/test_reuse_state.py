"""The mode "reuse": its memory, what becomes of it, and what else is put on a model."""

import gc
import weakref

import comfy.model_management
import comfyui_version
import pytest
import torch
from oracle import FLOAT_ERROR
from reuse_oracle import ReuseOracle, compare_reuse
from sampling import (
    CACHE,
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
from small_models import FAMILIES, FLUX1, FLUX2, HIDDEN, QWEN, SmallControl, load, shared, with_lora

REUSE = {"mode": "reuse", "max_keep": 0.6, "update_interval": 3, "reuse_text": True}


def caches_alive() -> int:
    gc.collect()
    kind = pack_module("topi_core.kv").KVCache
    return sum(isinstance(thing, kind) and bool(thing.entries) for thing in gc.get_objects())


@pytest.fixture
def bytes_held(monkeypatch):
    """Tells the bytes of all keys and values, and of what changed of them."""
    made, kind = [], pack_module("topi_core.kv").KVCache
    begin = kind.open

    def noted(cache, *args):
        made.append(weakref.ref(cache))
        begin(cache, *args)

    def count() -> int:
        live = {id(cache): cache for ref in made if (cache := ref())}
        return sum(cache.nbytes for cache in live.values())

    monkeypatch.setattr(kind, "open", noted)
    return count


@pytest.mark.parametrize("forecast", [True, False])
@pytest.mark.parametrize("family", [FLUX1, QWEN], ids=lambda f: f.name)
def test_the_record_says_what_the_cache_took(family, forecast):
    """Two conds of one image each: keys and values of every layer, of text and reference, in float32.

    At the second anchor as much again, for what changed.
    """
    positive, negative = (conditioning(family, [latent(family)], seed=seed) for seed in (0, 1))
    patched, trace = patch(shared(family), **layer_inputs(family), **REUSE, forecast=forecast)
    image = sample(patched, positive, negative, cfg=2.0, latent=empty(family))
    run, tokens = last_run(trace), family.text_tokens + 64
    assert run.cache_bytes == (2 if forecast else 1) * 2 * (2 * family.depth * tokens * HIDDEN * 4)
    assert f"{run.cache_bytes / 1e6:.0f} MB of keys and values" in pack_module("topi_core.report").summary(run)
    report = run_node("ToPiReport", trace=trace, latent={"samples": image})[0]
    assert f"The kept keys and values took {run.cache_bytes / 1e6:,.1f} MB" in report and "reused step" in report
    assert ("from the second anchor on they were forecast" in report) == forecast


def test_nothing_is_left_after_a_run():
    patched, _ = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1))
    assert caches_alive() == 0


def test_nothing_is_left_after_an_error_even_while_it_is_held():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    patched, _ = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    expected = sample(patched, positive, latent=start)

    def stop(step, *_):
        if step == 1:
            assert caches_alive() == 1
            raise InterruptedError

    with pytest.raises(InterruptedError) as held:
        sample(patched, positive, latent=start, callback=stop)
    assert caches_alive() == 0 and held.value is not None
    assert torch.equal(sample(patched, positive, latent=start), expected)


def test_without_room_the_run_goes_on_in_full_and_says_so(monkeypatch, caplog):
    """As with ComfyUI's --reserve-vram set to more than there is."""
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    expected = sample(shared(FLUX1), positive, latent=start)
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 2**50)
    caplog.clear()
    assert torch.equal(sample(patched, positive, latent=start), expected)
    assert set(kinds(trace)) == {"full"}
    said = [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]
    assert said == ["ToPi: no room for 0.0 GB of keys and values, so what needs them runs in full"]
    report = run_node("ToPiReport", trace=trace, latent={"samples": expected})[0]
    assert "Nothing was reused: there was no room" in report


def test_without_room_for_a_forecast_there_is_none_and_the_log_says_so(monkeypatch, caplog):
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    plain, _ = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE, forecast=False)
    expected = sample(plain, positive, latent=start, steps=8)
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    size, asked = 2 * FLUX1.depth * (FLUX1.text_tokens + 64) * HIDDEN * 4, []

    def where(room, more, back=0):
        asked.append(more)
        return "device" if len(asked) != 2 else "host"

    monkeypatch.setattr(pack_module("nodes.engine.memory").CallMemory, "where", where)
    caplog.clear()
    assert torch.equal(sample(patched, positive, latent=start, steps=8), expected)
    assert not last_run(trace).forecast and len(asked) == 4
    assert asked[0] == asked[2] == size < asked[1] < 2 * size  # the second is for what changed, beside what is held
    said = [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]
    assert said == ["ToPi: no room for 0.0 GB more, so keys and values are reused as they were instead of forecast"]


def test_in_host_memory_it_is_the_same_and_nothing_is_forecast(monkeypatch, caplog):
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    patched, _ = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE, forecast=False)
    expected = sample(patched, positive, latent=start)
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    given_back = []
    monkeypatch.setattr(
        pack_module("nodes.engine.memory").CallMemory,
        "where",
        lambda room, size, back=0: given_back.append(back) or "host",
    )
    caplog.clear()
    assert torch.equal(sample(patched, positive, latent=start), expected)
    assert len(given_back) == 2 and given_back[0] == 0 < given_back[1]  # the first anchor's make room for the second's
    assert sum("no room on the GPU" in record.getMessage() for record in caplog.records) == 1
    assert "in host memory" in run_node("ToPiReport", trace=trace, latent={"samples": expected})[0]


def test_room_is_on_the_device_then_on_the_host_then_nowhere(monkeypatch):
    kind = pack_module("nodes.engine.memory").CallMemory
    monkeypatch.setattr(kind, "reserve", 2**20)
    here = kind(shared(FLUX1), HIDDEN, empty(FLUX1))
    assert here.where(1) == "device"
    assert here.where(2**50) is None
    free = {"cpu": 2**40, "meta": 0}

    def free_memory(dev, torch_free_too=False):
        return (free[dev.type], 0) if torch_free_too else free[dev.type]

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)
    there = kind(shared(FLUX1), HIDDEN, empty(FLUX1).to("meta"))
    assert there.where(2**20) == "host"
    free["cpu"] = comfy.model_management.minimum_inference_memory() + 2**21
    assert there.where(2**20) == "host" and there.where(2**21) is None
    assert there.where(2**21, back=2**20) == "host"


def test_the_reserve_is_what_comfyui_says_a_call_takes(monkeypatch):
    """Of a latent and its references, and what the user reserves; never less than ComfyUI's minimum.

    Of two prompts half as much again, or ComfyUI would run each in a call of its own.
    """
    model = shared(FLUX1)
    kind, picture = pack_module("nodes.engine.memory").CallMemory, empty(FLUX1)
    least = comfy.model_management.minimum_inference_memory()

    def reserve(*call):
        return kind(model, HIDDEN, *call).reserve

    assert reserve(picture, [], 1) == reserve(picture, [], 2) == least
    large = torch.zeros(1).expand(2, 16, 128, 128)
    alone, beside = (reserve(large, [large] * count, 1) for count in (0, 2))
    extra, step = comfy.model_management.extra_reserved_memory(), model.model.memory_required([2, 16, 128, 128])
    assert alone == step + extra > least
    assert beside - extra == pytest.approx(3 * step)
    assert reserve(large, [], 2) == 1.5 * step
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 2**50)
    assert reserve(large, [], 2) == step + 2**50


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("forecast", [False, True])
def test_the_old_keys_are_gone_before_room_is_asked_for_new_ones(monkeypatch, bytes_held, forecast, negative):
    """With room on the device for one cache of each prompt, and a host without any, every anchor finds room."""
    asked = []

    def where(room, size, back=0):
        asked.append(size)
        return "device" if bytes_held() + size <= 1.25 * asked[0] else None

    monkeypatch.setattr(pack_module("nodes.engine.memory").CallMemory, "where", where)
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), mode="reuse", update_interval=2, forecast=forecast)
    second = dict(negative=conditioning(FLUX1, [latent(FLUX1)], seed=5), cfg=2.0) if negative else {}
    sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=8, **second)
    run = last_run(trace)
    assert len(run.anchors) == 4 and not run.no_room and not run.forecast
    assert len(asked) == 4 + forecast  # and is not asked for it again


def test_a_second_call_of_an_anchor_takes_the_place_of_the_first(monkeypatch, bytes_held):
    """dpm_2 calls the model twice a step: with a forecast there is never more than was asked for."""
    most, put = [0], pack_module("topi_core.kv").KVCache.put

    def counted(cache, *args):
        put(cache, *args)
        most[0] = max(most[0], bytes_held())

    monkeypatch.setattr(pack_module("topi_core.kv").KVCache, "put", counted)
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), mode="reuse", update_interval=2)
    sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=6, sampler="dpm_2")
    run = last_run(trace)
    assert run.forecast and len(run.anchors) == 3
    assert most[0] <= run.cache_bytes * (1 + 1 / FLUX1.depth)


@pytest.mark.parametrize("error", ["OutOfMemoryError", "AcceleratorError"])
@pytest.mark.parametrize("when", ["put", "read"])
def test_out_of_memory_the_run_goes_on_in_full_and_says_so(monkeypatch, caplog, when, error):
    """At the first anchor, or in the first step that reuses: what had gone wrong is done again without the keys."""
    if error == "AcceleratorError" and not hasattr(comfy.model_management, "is_oom"):
        pytest.skip(f"ComfyUI {comfyui_version.__version__} takes no AcceleratorError for lack of memory")
    kind, calls = pack_module("topi_core.kv").KVCache, []
    method = getattr(kind, when)

    def full(cache, site, *args):
        calls.append(site)
        if len(calls) > FLUX1.depth // 2:
            raise getattr(torch, error)("CUDA error: out of memory")
        return method(cache, site, *args)

    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    expected = sample(shared(FLUX1), positive, latent=start)
    monkeypatch.setattr(kind, when, full)
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    caplog.clear()
    image = sample(patched, positive, latent=start)
    assert torch.equal(image, expected) and caches_alive() == 0
    assert set(kinds(trace)) == ({"full"} if when == "put" else {"full", "anchor"}) and last_run(trace).no_room
    (text, _) = run_node("ToPiReport", trace=trace, latent={"samples": image})
    assert "Nothing was reused: there was no room for the references' keys and values" in text
    said = [r.getMessage() for r in caplog.records if "ran out of memory" in r.getMessage()]
    assert len(said) == 1 and len(calls) == FLUX1.depth // 2 + 1
    monkeypatch.setattr(pack_module("topi_core.kv").KVStore, "give_up", lambda store: False)
    calls.clear()
    with pytest.raises(getattr(torch, error)):
        sample(patched, positive, latent=start)


def test_page_locked_memory_is_given_back_wherever_the_last_keys_lay(monkeypatch):
    places, given = iter(["device", "host", "device"]), []
    monkeypatch.setattr(pack_module("nodes.engine.memory").CallMemory, "where", lambda room, size, back=0: next(places))
    monkeypatch.setattr(pack_module("topi_core.kv"), "release_pinned", lambda: given.append(None))
    patched, trace = patch(shared(FLUX1), **layer_inputs(FLUX1), mode="reuse", update_interval=2, forecast=False)
    sample(patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=6)
    assert len(last_run(trace).anchors) == 3 and next(places, None) is None
    assert len(given) == 1  # at the end


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_what_is_asked_for_is_what_is_kept(monkeypatch, family):
    """In every family, whatever its heads share; forecast it is twice as much, and no more is asked for after that."""
    asked, room = [], pack_module("nodes.engine.memory").CallMemory
    where = room.where
    monkeypatch.setattr(room, "where", lambda self, size, back=0: asked.append(size) or where(self, size, back))
    patched, trace = patch(shared(family), **layer_inputs(family), mode="reuse", update_interval=2)
    sample(patched, conditioning(family, [latent(family)]), latent=empty(family), steps=6)
    run = last_run(trace)
    assert len(run.anchors) == 3 and run.forecast
    assert asked == [run.cache_bytes / 2] * 2


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize(("max_keep", "forecast"), [(0.6, False), (1.0, True)])
def test_caches_that_skip_steps(cache, order, max_keep, forecast):
    """An anchor among the skipped steps happens at the next one that is computed.

    The oracle does not see skipped steps, so it cannot know whether a choice was made that none of them used.
    """
    family, inputs = FLUX1, {"max_keep": max_keep, "update_interval": 3, "forecast": forecast, "reuse_text": True}
    positive, negative = conditioning(family, [latent(family)]), conditioning(family, [latent(family)], seed=1)
    sampling = dict(latent=empty(family), cfg=1.5, steps=16)
    model = shared(family)
    if order == "before":
        model = run_node(cache, model=model, **CACHE)[0]
    patched, trace = patch(model, mode="reuse", **inputs, spacing="steps", **layer_inputs(family))
    if order == "after":
        patched = run_node(cache, model=patched, **CACHE)[0]
    image = sample(patched, positive, negative, **sampling)
    oracle = ReuseOracle(family, **inputs)
    expected = oracle.attach(run_node(cache, model=shared(family), **CACHE)[0])
    assert difference(image, sample(expected, positive, negative, **sampling)) < FLOAT_ERROR
    assert "reused" in kinds(trace) and last_run(trace).anchors
    skipped = sum(kind == "skipped" for kind in kinds(trace)) + 16 - len(kinds(trace))
    assert skipped == 16 - len({step for step, _, _ in oracle.calls})


@pytest.mark.parametrize("family", [FLUX1, FLUX2, QWEN], ids=lambda f: f.name)
def test_controlnet(family):
    refs, control = [latent(family)], SmallControl(family, outputs=family is not QWEN)
    image, _ = compare_reuse(family, shared(family), conditioning(family, refs, control=control), latent=empty(family))
    without, _ = compare_reuse(family, shared(family), conditioning(family, refs), latent=empty(family))
    assert difference(image, without) > 1e-2


def test_lora():
    compare_reuse(FLUX1, with_lora(shared(FLUX1)), conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1))


def test_regions_of_other_sizes_and_several_prompts():
    refs = [latent(FLUX1)]
    left = conditioning(FLUX1, refs, area=(16, 8, 0, 0), strength=1.0)
    both = conditioning(FLUX1, refs, seed=2, tokens=9)
    compare_reuse(FLUX1, shared(FLUX1), left + both, latent=empty(FLUX1))


def test_two_samplers_share_one_patched_model():
    positive, other = (conditioning(FLUX1, [latent(FLUX1, seed=seed)]) for seed in (0, 3))
    patched, _ = patch(shared(FLUX1), **layer_inputs(FLUX1), **REUSE)
    first = sample(patched, positive, latent=empty(FLUX1))
    sample(patched, other, latent=empty(FLUX1))
    assert torch.equal(sample(patched, positive, latent=empty(FLUX1)), first)


@pytest.mark.parametrize("max_keep", [1.0, 0.5])
def test_an_anchor_that_misses_an_attention_says_so_at_once(max_keep):
    """Another pack's forward leaves a block's attention out. It is not found out later, by a step that reads it."""
    model, done = load(FLUX1), []
    model.model.diffusion_model.double_blocks[1].forward = lambda img, txt, **_: (img, txt)
    patched, _ = patch(model, **layer_inputs(FLUX1), mode="reuse", update_interval=3, max_keep=max_keep)
    with pytest.raises(
        RuntimeError, match="saw no attention in layer 1; another patch replaces this block's attention"
    ):
        sample(
            patched, conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), callback=lambda i, *_: done.append(i)
        )
    assert not done and caches_alive() == 0
