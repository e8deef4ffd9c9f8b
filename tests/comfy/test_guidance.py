"""Cond and uncond: one call or several, changing between steps, with the same or with other references."""

import pytest
from comfy.model_patcher import ModelPatcher
from oracle import FLOAT_ERROR, compare
from sampling import conditioning, difference, empty, kept_sets, kinds, last_run, latent, layer_inputs, patch, sample
from small_models import BOOGU, FLUX1, FLUX2, JOY, KREA, OMNI, QWEN, ShortOfMemory, as_class, by_family, shared

import nodes


class MemoryComesAndGoes(ModelPatcher):
    """Room for cond and uncond together only at every other step."""

    def get_free_memory(self, device):
        self.asked = getattr(self, "asked", 0) + 1  # once for two conds together, twice for one after the other
        return 0 if self.asked % 3 else super().get_free_memory(device)


@pytest.mark.parametrize("family", [FLUX1, QWEN, BOOGU], ids=lambda f: f.name)
@pytest.mark.parametrize("memory", [ShortOfMemory, MemoryComesAndGoes])
def test_how_conds_are_batched_changes_nothing(family, memory):
    """The selection comes from the sum over cond and uncond, in whatever calls they arrive."""
    refs = [latent(family)]
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
    inputs = {"tau": 0.75, "update_interval": 2}
    sampling = dict(cfg=2.5, latent=empty(family), inputs=inputs)
    together, trace, _ = compare(family, shared(family), positive, negative, **sampling)
    apart, other, oracle = compare(family, as_class(memory, shared(family)), positive, negative, **sampling)
    assert kept_sets(other) == kept_sets(trace)
    assert difference(apart, together) < FLOAT_ERROR
    assert len({tuple(conds) for _, _, conds in oracle.calls}) == (2 if memory is ShortOfMemory else 3)


@pytest.mark.parametrize("family", [FLUX1, QWEN, JOY, OMNI], ids=lambda f: f.name)
def test_prompts_of_different_lengths_share_a_selection(family):
    """They come in two calls, as they cannot be concatenated; Qwen-Image's prompts are always like that."""
    refs = [latent(family)]
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1, tokens=9)
    _, trace, _ = compare(family, shared(family), positive, negative, cfg=2.0, latent=empty(family))
    assert [anchor.step for anchor in last_run(trace).anchors] == [0, 3]


@by_family
def test_the_same_selection_for_cond_and_uncond(family):
    """One anchor for the references they share, not one each."""
    refs = [latent(family)]
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
    patched, trace = patch(shared(family), **layer_inputs(family))
    sample(patched, positive, negative, cfg=2.0, latent=empty(family))
    assert [anchor.step for anchor in last_run(trace).anchors] == [0]


@by_family
def test_a_negative_prompt_without_references(family):
    """It is computed as ever, and cond's selection is that of a run without guidance."""
    positive, negative = conditioning(family, [latent(family)]), conditioning(family, seed=1)
    _, guided, _ = compare(family, shared(family), positive, negative, cfg=2.0, latent=empty(family))
    _, alone, _ = compare(family, shared(family), positive, latent=empty(family))
    assert kept_sets(guided)[0] == kept_sets(alone)[0]


@pytest.mark.parametrize("family", [FLUX1, QWEN, JOY, KREA, BOOGU], ids=lambda f: f.name)
def test_conds_with_other_references_keep_their_own_selection(family):
    """Two conds of one call that keep different numbers are filled up, by influence, to the larger."""
    one, two = latent(family, seed=1), empty(family)
    positive = conditioning(family, [one]) + conditioning(family, [two], seed=3)  # ConditioningCombine
    _, trace, oracle = compare(family, shared(family), positive, latent=empty(family), inputs={"tau": 0.7})
    first = [anchor for anchor in last_run(trace).anchors if anchor.step == 0]
    assert len(first) == 2
    assert int(first[0].kept.sum()) != int(first[1].kept.sum())
    assert all(len(conds) == 2 for _, _, conds in oracle.calls)


def test_cond_and_uncond_with_other_references():
    positive = conditioning(FLUX1, [latent(FLUX1, seed=1)])
    negative = conditioning(FLUX1, [latent(FLUX1, 12, 12, seed=2)])
    _, trace, _ = compare(FLUX1, shared(FLUX1), positive, negative, cfg=2.0, latent=empty(FLUX1))
    assert [a.layout.reference_tokens for a in last_run(trace).anchors if a.step == 0] in ([64, 36], [36, 64])


def test_images_of_a_batch_with_references_of_their_own():
    refs = [latent(FLUX1, batch=3)]
    _, trace, _ = compare(FLUX1, shared(FLUX1), conditioning(FLUX1, refs), latent=empty(FLUX1, batch=3))
    assert last_run(trace).anchors[0].kept.shape == (3, 64)


@pytest.mark.parametrize("family", [FLUX1, FLUX2, OMNI], ids=lambda f: f.name)
def test_regions(family):
    """ConditioningSetArea: a cond sees a part of the target, and the same references."""
    set_area = nodes.ConditioningSetArea().append
    refs = [latent(family)]
    side = 8 * 4 * family.patch  # half of the target; the node counts in image pixels, 8 a latent pixel
    (left,) = set_area(conditioning(family, refs, seed=1), side, side * 2, 0, 0, 1.0)
    (right,) = set_area(conditioning(family, refs, seed=2), side * 2, side, side, 0, 1.0)
    compare(family, shared(family), conditioning(family, refs) + left + right, latent=empty(family))


def test_a_cond_that_becomes_active_in_mid_run_is_scored_when_it_does():
    """Timestep ranges, with other references in each: a new selection is made at the first step of the second."""
    early = conditioning(FLUX1, [latent(FLUX1, seed=1)], end_percent=0.49)
    late = conditioning(FLUX1, [latent(FLUX1, seed=2)], start_percent=0.51)
    _, trace, _ = compare(
        FLUX1, shared(FLUX1), early + late, latent=empty(FLUX1), steps=8, inputs={"update_interval": 20}
    )
    steps = [anchor.step for anchor in last_run(trace).anchors]
    assert len(steps) == 2 and steps[0] == 0 and 1 < steps[1] < 7
    assert kinds(trace).count("anchor") == 2


def test_a_second_reference_that_joins_in_mid_run():
    """Rows that are scored and rows that are not share a call: the call keeps everything, and no token is lost."""
    always = conditioning(FLUX1, [latent(FLUX1, seed=1)])
    late = conditioning(FLUX1, [latent(FLUX1, seed=2)], start_percent=0.51)
    inputs = {"tau": 0.7, "update_interval": 20}
    _, trace, _ = compare(FLUX1, shared(FLUX1), always + late, latent=empty(FLUX1), steps=8, inputs=inputs)
    assert kinds(trace).count("anchor") == 2
