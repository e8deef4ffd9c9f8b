"""The benchmark's baselines that leave out whole steps: each against the same by ComfyUI's or torch's own hooks."""

import json
from functools import partial

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import conditioning, empty, kinds, last_run, latent, layer_inputs, pack_module, patch, sample
from small_models import FLUX1, FLUX2, KREA, QWEN, shared

import nodes
from bench.baselines import BASELINES, fit
from bench.baselines.steps import Ends, decay, every, lagrange, polynomial, relative_change
from topi_demo.model import WEIGHTS
from topi_demo.provenance import setting

STEPS = 10


def on(name: str, model, **constants) -> tuple:
    return BASELINES[name](nodes.NODE_CLASS_MAPPINGS, model, **constants)


def by_hand(model, answer):
    """A clone in which answer(step, sigma, run) makes the network's output; run() calls the network."""
    model = model.clone()

    def wrapper(executor, *args, **kwargs):
        options = next(arg for arg in args if isinstance(arg, dict) and "sample_sigmas" in arg)
        sigma = float(options["sigmas"][0])
        step = int((options["sample_sigmas"] >= sigma - 1e-6).sum()) - 1
        return answer(step, sigma, lambda: executor(*args, **kwargs))

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "by hand", wrapper)
    return model


def expected_kinds(computed) -> list[str]:
    return ["anchor"] + ["full" if step in computed else "skipped" for step in range(1, STEPS)]


# Schedules and forecasts


def test_every_keeps_the_ends_and_spreads_the_rest():
    assert sorted(every(20, 10)) == [0, 1, 2, 4, 7, 10, 12, 15, 18, 19]
    assert sorted(every(20, 5)) == [0, 1, 2, 18, 19]
    for steps in range(1, 30):
        for computed in range(min(5, steps), steps + 1):
            chosen = every(steps, computed)
            assert len(chosen) == computed and set(chosen) <= set(range(steps))
            assert {0, steps - 1} <= chosen
    with pytest.raises(ValueError, match=r"computed must be in \[5, 20\] for 20 steps, got 4"):
        every(20, 4)


def test_lagrange_weights_continue_a_polynomial():
    assert lagrange([0.9], 0.2) == [1.0]
    assert lagrange([4.0, 3.0], 1.0) == [-2.0, 3.0]
    weights = lagrange([1.0, 0.75, 0.5], 0.25)
    assert sum(w * (3 * s**2 - s + 2) for w, s in zip(weights, (1.0, 0.75, 0.5), strict=True)) == pytest.approx(1.9375)


@pytest.mark.parametrize("family", [FLUX1, QWEN], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["held", "linear", "quadratic"])
def test_a_forecast_stands_in_for_the_velocity(family, name):
    """The polynomial is written here by differences, so from the first order on it is equal but for rounding."""
    known, computed = [], every(STEPS, 6)

    def answer(step, sigma, run):
        if step in computed:
            known.append((sigma, run()))
            return known[-1][1]
        (s0, v0), (s1, v1), (s2, v2) = known[:-4:-1]
        first, before = (v0 - v1) / (s0 - s1), (v1 - v2) / (s1 - s2)
        value = v0
        if name != "held":
            value = value + (sigma - s0) * first
        if name == "quadratic":
            value = value + (sigma - s0) * (sigma - s1) * (first - before) / (s0 - s2)
        return value

    model, trace = on(name, shared(family), steps=STEPS, computed=6)
    positive, start = conditioning(family, [latent(family)]), empty(family)
    image = sample(model, positive, latent=start, steps=STEPS)
    expected = sample(by_hand(shared(family), answer), positive, latent=start, steps=STEPS)
    if name == "held":
        assert torch.equal(image, expected)
    torch.testing.assert_close(image, expected, atol=1e-3, rtol=1e-3)
    assert kinds(trace) == expected_kinds(computed)
    assert pack_module("topi_core.cost").speedup(last_run(trace)) == pytest.approx(STEPS / 6)


@pytest.mark.parametrize("name", ["held", "quadratic"])
def test_each_conditioning_has_its_own_velocity(name):
    """Two prompts of unequal length are called one after the other, those of equal length in one call."""
    positive = conditioning(FLUX1, [latent(FLUX1)])
    start = empty(FLUX1, batch=2)
    for tokens in (6, 9):
        negative = conditioning(FLUX1, [latent(FLUX1)], seed=1, tokens=tokens)
        model, _ = on(name, shared(FLUX1), steps=STEPS, computed=6)
        both = sample(model, positive, negative, latent=start, steps=STEPS, cfg=2.0)
        alone = sample(model, negative, positive, latent=start, steps=STEPS, cfg=-1.0)  # the same mixture
        torch.testing.assert_close(both, alone, atol=1e-3, rtol=1e-3)


def test_all_steps_computed_is_the_unpatched_model():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    plain = sample(shared(FLUX1), positive, latent=start, steps=STEPS)
    never = {"steps": STEPS, "coefficients": [0, 0, 0, 0, 1.0], "threshold": 0.5}
    for name, constants in (
        ("held", {"steps": STEPS, "computed": STEPS}),
        ("regione", {"steps": STEPS, "gammas": [1.0] * (STEPS - 1), "delta": 0.0}),
        ("teacache", never),
    ):
        assert torch.equal(sample(on(name, shared(FLUX1), **constants)[0], positive, latent=start, steps=STEPS), plain)


# RegionE


def test_decay_by_hand():
    sigmas = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.0]
    gammas = [1.0, 1.0, 1.1, 1.2, 1.1, 1.05]  # times 0.9: 0.9, 0.9, 0.99, 1.08, 0.99, 0.945
    assert decay(sigmas, gammas, 0.15, 1, 1) == {
        1: pytest.approx(0.9),  # 2 falls to 0.81 and is computed
        3: pytest.approx(0.99),  # 4 would grow and is computed
        5: pytest.approx(0.99),
    }
    assert list(decay(sigmas, gammas, 0.2, 1, 1)) == [1, 2, 3, 5]  # 3 falls to 0.8019
    assert list(decay(sigmas, gammas, 0.195, 1, 1)) == [1, 2, 5]
    assert list(decay(sigmas, gammas, 0.2, 2, 2)) == [2, 3]
    assert decay(sigmas, gammas, 0.0, 1, 1) == {}
    assert list(decay(sigmas, gammas, 0.1, 3, 1, symmetric=True)) == [3, 4, 5]  # 0.99, 1.0692, 1.0585
    assert list(decay(sigmas, gammas, 0.06, 3, 1, symmetric=True)) == [3, 5]


def test_regione_shrinks_the_last_computed_velocity():
    """Of 10 steps the first two and the last two are computed, and those between them by the ratios of norms."""
    sigmas, last, factors = [], [], {}

    def answer(step, sigma, run):
        sigmas.append(sigma)
        if step in factors:
            return last[0] * factors[step]
        last[:] = [run()]
        return last[0]

    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    sample(by_hand(shared(FLUX1), answer), positive, latent=start, steps=STEPS)
    ratios = [0.99, 1.02, 0.97, 0.96, 0.9, 1.05, 0.95, 0.99, 0.99]  # of steps 1 to 9
    gammas = [ratio / (1 + b - a) for ratio, a, b in zip(ratios, sigmas, sigmas[1:], strict=False)]
    factors = decay([*sigmas, 0.0], gammas, 0.1, 2, 2)
    assert list(factors) == [3, 4, 7]
    model, trace = on("regione", shared(FLUX1), steps=STEPS, gammas=gammas, delta=0.1)
    image = sample(model, positive, latent=start, steps=STEPS)
    assert torch.equal(image, sample(by_hand(shared(FLUX1), answer), positive, latent=start, steps=STEPS))
    assert kinds(trace) == expected_kinds(set(range(STEPS)) - factors.keys())


# TeaCache


def test_relative_change_and_polynomial_by_hand():
    before, now = torch.tensor([[1.0, -3.0], [2.0, 2.0]]), torch.tensor([[2.0, -3.0], [2.0, 5.0]])
    assert relative_change(now, before).item() == 0.5
    assert relative_change(now, before, (1,)).tolist() == [0.25, 0.75]
    assert polynomial([1.0, 0.0, -2.0, 3.0], 2.0) == 7.0


@torch.inference_mode()
@pytest.mark.parametrize("side", [16, 15])
def test_ends_are_what_the_network_computes(side):
    """Also where a latent is padded to whole tokens. Blocks add to their input in place, so a copy of it is kept."""
    network, ends, seen = shared(FLUX1).model.diffusion_model, [], {}

    def keep(executor, *args, **kwargs):
        ends[:] = [Ends(executor.class_obj, args[0], args[1], args[3], args[4])]
        seen["output"] = executor(*args, **kwargs)
        return seen["output"]

    model, start = shared(FLUX1).clone(), empty(FLUX1, side, side)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "by hand", keep)
    block, tokens = network.double_blocks[0], 64
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: seen.update(hidden=k["img"].clone(), vector=k["vec"]), with_kwargs=True
        ),
        block.img_attn.qkv.register_forward_pre_hook(lambda m, a: seen.update(modulated=a[0])),
        network.final_layer.register_forward_pre_hook(lambda m, a: seen.update(behind=a[0])),
    ]
    try:
        sample(model, conditioning(FLUX1, [latent(FLUX1)], guidance=3.0), latent=start, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    (mine,) = ends
    torch.testing.assert_close(mine.hidden, seen["hidden"][:, :tokens])
    torch.testing.assert_close(mine.vector, seen["vector"])
    torch.testing.assert_close(mine.modulated(), seen["modulated"][:, :tokens])
    torch.testing.assert_close(mine.velocity(seen["behind"][:, :tokens]), seen["output"])


def test_teacache_adds_the_last_residual_of_the_blocks():
    """The network's own forward runs with the first block's input plus the residual behind its last block."""
    network, tokens = shared(FLUX1).model.diffusion_model, 64
    coefficients, threshold = [5.0, 0.0, -1.0, 1.5, 0.01], 0.45
    seen, kept, decided = {}, {}, []

    def behind(module, args):
        target = args[0][:, :tokens]
        if kept["skip"]:
            return seen["hidden"] + kept["residual"], *args[1:]
        kept["residual"] = target - seen["hidden"]
        return None

    def decide(step):
        change, kept["before"] = None, kept.get("before")
        if kept["before"] is not None and 0 < step < STEPS - 1:
            change = (seen["modulated"] - kept["before"]).abs().mean() / kept["before"].abs().mean()
            kept["sum"] += sum(c * change.item() ** (4 - i) for i, c in enumerate(coefficients))
        kept["before"] = seen["modulated"]
        kept["skip"] = change is not None and kept["sum"] < threshold
        if not kept["skip"]:
            kept["sum"] = 0.0
        decided.append(kept["skip"])

    def answer(step, sigma, run):
        kept["step"] = step
        return run()

    def modulated(module, args):
        seen["modulated"] = args[0][:, :tokens]
        decide(kept["step"])

    handles = [
        network.double_blocks[0].register_forward_pre_hook(
            lambda m, a, k: seen.update(hidden=k["img"][:, :tokens].clone()), with_kwargs=True
        ),
        network.double_blocks[0].img_attn.qkv.register_forward_pre_hook(modulated),
        network.final_layer.register_forward_pre_hook(behind),
    ]
    positive, start = conditioning(FLUX1, [latent(FLUX1)], guidance=3.0), empty(FLUX1)
    try:
        expected = sample(by_hand(shared(FLUX1), answer), positive, latent=start, steps=STEPS)
    finally:
        for handle in handles:
            handle.remove()
    model, trace = on("teacache", shared(FLUX1), steps=STEPS, coefficients=coefficients, threshold=threshold)
    image = sample(model, positive, latent=start, steps=STEPS)
    assert 2 <= sum(decided) <= STEPS - 3
    assert kinds(trace) == expected_kinds({step for step, skip in enumerate(decided) if not skip})
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)


def test_a_second_run_knows_nothing_of_the_first():
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    constants = {"steps": STEPS, "coefficients": [0, 0, 0, 1.0, 0], "threshold": 0.4}
    model, trace = on("teacache", shared(FLUX1), **constants)
    first = sample(model, positive, latent=start, steps=STEPS)
    assert "skipped" in kinds(trace)
    assert torch.equal(sample(model, positive, latent=start, steps=STEPS), first)


# FluxKVCache


@pytest.mark.parametrize("family", [FLUX1, QWEN, KREA], ids=lambda f: f.name)
def test_flux_kv_cache_is_reuse_of_one_anchor(family):
    model, trace = on("flux_kv_cache", shared(family))
    mine, _ = patch(
        shared(family), mode="reuse", update_interval=1000, forecast=False, reuse_text=False, **layer_inputs(family)
    )
    positive, start = conditioning(family, [latent(family)]), empty(family)
    image = sample(model, positive, latent=start, steps=4)
    assert torch.equal(image, sample(mine, positive, latent=start, steps=4))
    assert kinds(trace) == ["anchor", "reused", "reused", "reused"]


def test_flux_kv_cache_is_comfyuis():
    """FLUX.2 is what that node was made for; it also asks for references that are modulated as at timestep 0."""
    node = nodes.NODE_CLASS_MAPPINGS.get("FluxKVCache")
    if node is None:
        pytest.skip("this ComfyUI has no FluxKVCache")
    theirs = node.execute(shared(FLUX2)).result[0]
    mine, _ = on("flux_kv_cache", shared(FLUX2))
    positive, start = conditioning(FLUX2, [latent(FLUX2)], "index_timestep_zero"), empty(FLUX2)
    images = [sample(model, positive, latent=start, steps=4) for model in (mine, theirs, shared(FLUX2))]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    assert (images[0] - images[2]).abs().max() > 1e-2


# Constants


def test_fits_by_hand():
    x = torch.linspace(0.1, 1.0, 12)
    found = fit.polynomial_fit(x, polynomial([1.0, -2.0, 0.5, 3.0, 0.25], x))
    assert found == pytest.approx([1.0, -2.0, 0.5, 3.0, 0.25], abs=1e-3)
    ones = torch.ones(2, 4, 3, 3)
    course = [fit.Seen(1.0, ones[0], ones), fit.Seen(0.8, ones[0], ones * torch.tensor([0.5, 2]).view(2, 1, 1, 1))]
    torch.testing.assert_close(fit.decays(course), torch.tensor([[0.625, 2.5]]))


def test_calibration_edits_are_spread_and_never_twice_the_same():
    found = fit.batches(30)
    assert sum(len(batch.instructions) for batch in found) == 30
    assert sorted(len(batch.references) for batch in found) == [1, 2, 3]
    for batch in found:
        assert len({each.numpy().tobytes() for each in batch.references[0]}) == len(batch.instructions)


@pytest.mark.parametrize("steps", fit.STEPS)
def test_shipped_constants_are_for_the_shipped_weights(steps):
    assert len(fit.constants("regione", steps)["gammas"]) == steps - 1
    assert len(fit.constants("teacache", steps)["coefficients"]) == 5


def test_constants_of_others_are_refused(tmp_path):
    path = tmp_path / "constants.json"
    row = {"steps": 20, "teacache": [0.0] * 5, "regione": [1.0] * 19, "weights": setting(WEIGHTS)["weights"]}
    path.write_text(json.dumps([row]))
    assert fit.constants("teacache", 20, path=path) == {"steps": 20, "coefficients": [0.0] * 5}
    refused = partial(pytest.raises, ValueError)
    with refused(match=r"has constants of regione for 20 steps, and not for 28"):
        fit.constants("regione", 28, path=path)
    path.write_text(json.dumps([row | {"weights": "others"}]))
    with refused(match=r"for the weights others, and these are .*: run `python -m bench.baselines.fit`"):
        fit.constants("regione", 20, path=path)
    with refused(match=r"needs 9 gammas for 10 steps, got 19"):
        on("regione", shared(FLUX1), steps=10, gammas=row["regione"], delta=0.1)
    with refused(match=r"FLUX.1, and not that of"):
        on("teacache", shared(QWEN), steps=10, coefficients=row["teacache"], threshold=0.1)
    with refused(match=r"this baseline was set up for 8 steps, and the run has 10"):
        sample(on("held", shared(FLUX1), steps=8, computed=6)[0], conditioning(FLUX1), latent=empty(FLUX1), steps=10)
