"""The baselines that merge tokens, on small models: what each step computes, and what must stay as it is."""

import comfy.sample
import pytest
import torch
from sampling import conditioning, difference, empty, kinds, last_run, latent, layer_inputs, pack_module, patch, sample
from small_models import FLUX1, OMNI, QWEN, by_family, load, shared

import nodes
from bench.baselines import BASELINES
from bench.baselines import tokens as baselines
from bench.baselines.attach import attached
from bench.baselines.merging import bipartite, dynamic_ratio, strided
from topi_core.config import AnchorSettings, KeepSettings, LayerSettings, ReuseSettings
from topi_core.cost import layer_flops

TEXT, PICTURE = 6, 64  # tokens of a prompt, and of a picture of 8 x 8; a reference of as many


def baseline(name, family=FLUX1, **constants):
    return BASELINES[name](nodes.NODE_CLASS_MAPPINGS, shared(family), **constants)


def tokens(trace) -> list[int]:
    return [step.tokens for step in last_run(trace).steps]


def edit(model, family=FLUX1, **how):
    return sample(model, conditioning(family, [latent(family)]), latent=empty(family), **how)


LAYERS = LayerSettings(layers=FLUX1.layers, front_layers=FLUX1.front_layers)
WHOLE = TEXT + 2 * PICTURE
NOTHING = {
    "merge": {"keep": KeepSettings(tau=1.0), "layers": LAYERS},
    **{name: {"ratio": 0.0} for name in ("tomesd", "tomesd_refs", "toma", "toma_refs")},
    "sdtm": {"ratio": 0.0, "deviation": 0.0},
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_is_merged_the_picture_is_the_unpatched_one(name):
    model, trace = baseline(name, **NOTHING[name])
    assert torch.equal(edit(model), edit(shared(FLUX1)))
    assert tokens(trace) == [WHOLE] * 4


@pytest.mark.parametrize(
    ("name", "count"),
    [("tomesd", WHOLE - 64), ("tomesd_refs", WHOLE - 32), ("toma", WHOLE - 64), ("toma_refs", WHOLE - 32)],
)
def test_every_step_computes_half_of_the_tokens(name, count):
    model, trace = baseline(name)
    merged = edit(model)
    assert tokens(trace) == [count] * 4 and kinds(trace) == ["pruned"] * 4
    run = last_run(trace)
    assert all(step.flops == FLUX1.depth * layer_flops(count, 256) for step in run.steps)
    assert pack_module("topi_core.cost").speedup(run) > 1.3 and pack_module("topi_core.report").summary(run)
    assert merged.isfinite().all() and not torch.equal(merged, edit(shared(FLUX1)))


def test_the_first_block_gets_means_at_the_positions_of_destinations():
    """Hidden states and positions that it gets, beside those of the unpatched model, merged by hand."""
    model, got = load(FLUX1), []

    def look(module, args, kwargs):
        got.append((kwargs["img"].clone(), kwargs["pe"]))

    model.model.diffusion_model.double_blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    edit(model, steps=1)
    edit(BASELINES["tomesd"](nodes.NODE_CLASS_MAPPINGS, model)[0], steps=1)
    (x, positions), (short, fewer) = got
    groups = bipartite(x, *strided(x, ((8, 8), (8, 8)), 2), 64)
    rows = torch.cat([torch.arange(TEXT), TEXT + groups.kept[0]])
    assert torch.equal(short, groups.merge(x)) and torch.equal(fewer, positions[:, :, rows])


def test_toma_shares_its_pattern_over_steps(monkeypatch):
    """Destinations are chosen at steps 0 and 10, and shares in them computed at 0, 5 and 10."""
    called = []
    for name in ("facilities", "shared_out"):
        original = getattr(baselines, name)
        monkeypatch.setattr(baselines, name, lambda *a, n=name, f=original: called.append(n) or f(*a))
    edit(baseline("toma")[0], steps=12)
    assert called == ["facilities", "shared_out", "shared_out", "facilities", "shared_out"]


@by_family
@pytest.mark.parametrize("name", ["tomesd", "toma_refs", "sdtm"])
def test_every_family_bears_it(family, name):
    """Whatever the order of its sequence: the picture comes out whole, and steps are shorter."""
    model, trace = baseline(name, family)
    image = edit(model, family)
    assert image.shape == empty(family).shape and image.isfinite().all()
    assert all(step.flops < step.full_flops for step in last_run(trace).steps if step.kind == "pruned")
    assert "pruned" in kinds(trace)


@pytest.mark.parametrize("family", [FLUX1, QWEN, OMNI], ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("name", "constants"), [("tomesd", {}), ("toma", {"temperature": 1e-4}), ("sdtm", {"mixed": 1.0})]
)
def test_each_token_of_the_picture_loses_its_own_noise(family, name, constants):
    """The picture comes near to the full one also where tokens went away: they do not get their destination's state."""
    model, _ = baseline(name, family, ratio=0.25, **constants)
    full, image = edit(shared(family), family), edit(model, family)
    error = (image - full).square().mean() / full.square().mean()
    assert error < 0.5


def test_a_prompt_without_references_computes_everything():
    """Beside one with two references of different sizes, of whose tokens a half goes away."""
    model, trace = baseline("tomesd_refs", ratio=0.5)
    two = conditioning(FLUX1, [latent(FLUX1), latent(FLUX1, 16, 24, seed=1)])
    sample(model, two, conditioning(FLUX1, seed=3), latent=empty(FLUX1), cfg=2.0)
    whole = TEXT + PICTURE + 64 + 96
    assert tokens(trace) == [whole - 80] * 4
    flops = FLUX1.depth * (layer_flops(whole - 80, 256) + layer_flops(TEXT + PICTURE, 256))
    assert [step.flops for step in last_run(trace).steps] == [flops] * 4


def test_merge_ranks_as_prune_does():
    """The same anchor, as many tokens, the same first steps; then other hidden states."""
    keep = {"min_keep": 0.5, "max_keep": 0.5}
    model, trace = baseline("merge", keep=KeepSettings(**keep), layers=LAYERS)
    pruning, prunes = patch(shared(FLUX1), **keep, **layer_inputs(FLUX1))
    merged, pruned = edit(model), edit(pruning)
    assert kinds(trace) == kinds(prunes) == ["anchor", "pruned", "pruned", "pruned"]
    assert tokens(trace) == tokens(prunes) == [WHOLE] + [WHOLE - 32] * 3
    assert torch.equal(last_run(trace).anchors[0].kept, last_run(prunes).anchors[0].kept)
    assert [step.flops for step in last_run(trace).steps] == [step.flops for step in last_run(prunes).steps]
    assert not torch.equal(merged, pruned)


@pytest.mark.parametrize("name", ["merge", "tomesd", "toma", "sdtm"])
def test_images_of_a_batch_are_made_as_they_are_alone(name):
    """Each has its own neighbours and destinations."""
    constants = {"keep": KeepSettings(min_keep=0.5, max_keep=0.5), "layers": LAYERS} if name == "merge" else {}
    model, _ = baseline(name, **constants)
    references = torch.cat([latent(FLUX1, seed=i) for i in range(2)])
    noise = torch.randn(2, *empty(FLUX1).shape[1:], generator=torch.Generator().manual_seed(5))

    def made(some: slice):
        cond, zeros = conditioning(FLUX1, [references[some]]), torch.zeros_like(noise[some])
        with torch.inference_mode():
            return comfy.sample.sample(model, noise[some], 4, 1.0, "euler", "simple", cond, cond, zeros, seed=0)

    both = made(slice(0, 2))
    for i in range(2):
        assert difference(both[i], made(slice(i, i + 1))[0]) < 1e-3


def sdtm_tokens(step: int, steps: int) -> int:
    """Of a picture's 64 after merging, by hand: windows of four while structure is made."""
    if step % 3 == 0:
        return PICTURE
    gone = int(dynamic_ratio(step / (steps - 1), 0.3, 0.2) * PICTURE)
    return PICTURE - (gone // 3 * 3 if step < 20 / 28 * steps else gone)


def test_sdtm_protects_every_third_step():
    model, trace = baseline("sdtm")
    edit(model, steps=10)
    assert tokens(trace) == [TEXT + PICTURE + sdtm_tokens(step, 10) for step in range(10)]
    assert kinds(trace) == ["full", "pruned", "pruned"] * 3 + ["full"]


def test_sdtm_keeps_what_protected_steps_computed():
    """What is kept counts; where all steps are protected, the picture is the unpatched one."""
    always, _ = baseline("sdtm", protect=1)
    assert torch.equal(edit(always), edit(shared(FLUX1)))
    a, b = (edit(baseline("sdtm", mixed=mixed)[0]) for mixed in (0.1, 1.0))
    assert not torch.equal(a, b)


def test_sdtm_merges_what_reuse_leaves():
    """Beside reuse, an anchor is protected as well; between them the picture alone is computed, and merged."""
    anchors, text = AnchorSettings(update_interval=5, spacing="sigma"), ReuseSettings(reuse_text=True)
    model, trace = baseline("sdtm_reuse", beside={"mode": "reuse", "anchors": anchors, "reuse": text})
    image = edit(model, steps=10)
    run = last_run(trace)
    anchors = [anchor.step for anchor in run.anchors]
    left = [2 + (PICTURE if step % 3 == 0 else sdtm_tokens(step, 10)) for step in range(10)]
    assert tokens(trace) == [WHOLE if step in anchors else left[step] for step in range(10)]
    assert set(kinds(trace)) == {"anchor", "reused"} and len(anchors) == 2 and image.isfinite().all()
    step = next(step for step in run.steps if step.tokens == min(tokens(trace)))
    assert step.keys == WHOLE - (PICTURE + 2 - step.tokens)
    assert step.flops == FLUX1.depth * layer_flops(step.tokens, 256, keys=step.keys)


def test_a_run_begins_anew():
    for name in ("toma", "sdtm", "sdtm_reuse"):
        model, _ = baseline(name)
        assert torch.equal(edit(model), edit(model))


def test_a_call_knows_how_many_steps_the_run_has():
    plan, seen = pack_module("topi_core.plan"), []

    class Looks(plan.Saving):
        def observe(self, plan, call):
            seen.append((call.step, call.steps))
            return True

    model, _ = attached(nodes.NODE_CLASS_MAPPINGS, shared(FLUX1), lambda *run: [Looks()], mode="prune")
    edit(model, steps=3)
    assert seen == [(0, 3)]


@pytest.mark.parametrize("name", [name for name in baselines.BASELINES if name != "merge"])
def test_half_precision_is_enough(name):
    model = load(FLUX1, torch.bfloat16)
    patched, _ = BASELINES[name](nodes.NODE_CLASS_MAPPINGS, model)
    full, image = edit(model), edit(patched)
    assert image.isfinite().all() and (image - full).square().mean() < full.square().mean()


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got 1"):
        baseline("tomesd", ratio=1.0)
    model = load(QWEN, default_ref_method="index_timestep_zero")
    with pytest.raises(ValueError, match="modulates"):
        BASELINES["sdtm"](nodes.NODE_CLASS_MAPPINGS, model)
    assert BASELINES["toma_refs"](nodes.NODE_CLASS_MAPPINGS, model)
