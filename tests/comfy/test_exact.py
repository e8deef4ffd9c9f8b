"""What ToPi computes, against the unpatched model and against the masking oracle, for every family."""

import dataclasses

import pytest
import torch
from oracle import FLOAT_ERROR, Oracle, compare
from sampling import conditioning, difference, empty, kept_sets, kinds, last_run, latent, layer_inputs, patch, sample
from small_models import FAMILIES, FLUX1, FLUX2, JOY, KREA, MAGE, QWEN, by_family, load, load_qwen_of_true_width, shared

by_method = pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in FAMILIES for m in f.methods], ids=lambda v: getattr(v, "name", v)
)


@by_method
def test_tau_one_is_the_unpatched_model_bit_by_bit(family, method):
    model, start = shared(family), empty(family)
    positive = conditioning(family, [latent(family), latent(family, 12, 20, seed=1)], method)
    patched, trace = patch(model, tau=1.0, update_interval=2, **layer_inputs(family))
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))
    assert last_run(trace).anchors[0].share == 1.0


@by_method
def test_gathering_equals_masking(family, method):
    """With each reference method: the tokens kept, and the whole image."""
    refs = [latent(family), latent(family, 12, 20, seed=1)]
    compare(family, shared(family), conditioning(family, refs, method), latent=empty(family), steps=5)


@by_family
def test_gathering_equals_masking_in_a_batch_with_guidance(family):
    """Two images, which keep different tokens, with cond and uncond."""
    refs = [latent(family, batch=2)]
    positive, negative = conditioning(family, refs), conditioning(family, refs, seed=1)
    _, trace, _ = compare(family, shared(family), positive, negative, cfg=3.0, latent=empty(family, batch=2))
    first, second = last_run(trace).anchors[0].kept
    assert not torch.equal(first, second)


@by_family
@pytest.mark.parametrize("front", ["first", "last"])
def test_pruning_from_the_first_and_from_the_last_block_on(family, front):
    """front_layers 0 prunes every block; one below the depth prunes only the last one."""
    inputs = {"front_layers": 0 if front == "first" else family.depth - 1}
    compare(family, shared(family), conditioning(family, [latent(family)]), latent=empty(family), inputs=inputs)


@by_family
def test_representative_layers_at_both_ends(family):
    layers = f"{family.depth - 1}, 0"
    patched, trace = patch(shared(family), tau=0.7, layers=layers, front_layers=1)
    positive = conditioning(family, [latent(family)])
    sample(patched, positive, latent=empty(family))
    _, other, _ = compare(
        family,
        shared(family),
        positive,
        latent=empty(family),
        inputs={"tau": 0.7, "front_layers": 1},
        layers=(0, family.depth - 1),
    )
    assert torch.equal(last_run(trace).anchors[0].kept, last_run(other).anchors[0].kept)


@by_family
def test_the_share_of_attention_alone_is_the_score_of_the_attention_metric(family):
    positive, start = conditioning(family, [latent(family)]), empty(family)
    _, trace, _ = compare(family, shared(family), positive, latent=start, inputs={"metric": "attention"})
    _, other, _ = compare(family, shared(family), positive, latent=start)
    assert not torch.equal(last_run(trace).anchors[0].kept, last_run(other).anchors[0].kept)


def test_qwen_2511_marks_its_reference_method_in_the_model():
    """`index_timestep_zero` without a word in the conditioning: references are modulated for timestep 0."""
    model = load(QWEN, default_ref_method="index_timestep_zero")
    positive, start = conditioning(QWEN, [latent(QWEN)]), empty(QWEN)
    image, _, _ = compare(QWEN, model, positive, latent=start)
    assert difference(image, compare(QWEN, shared(QWEN), positive, latent=start)[0]) > FLOAT_ERROR
    patched, _ = patch(model, tau=1.0, **layer_inputs(QWEN))
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))


def test_qwen_of_its_true_width():
    """24 heads in bfloat16, as ComfyUI's loader detects a Qwen-Image-Edit 2511 file."""
    model = load_qwen_of_true_width()
    family = dataclasses.replace(QWEN, depth=1, layers=(0,), front_layers=0, double_blocks=1)
    positive, start = conditioning(family, [latent(family, 8, 12)], width=3584), empty(family, 8, 8)
    patched, trace = patch(model, tau=0.7, **layer_inputs(family))
    image = sample(patched, positive, latent=start, steps=2)
    oracle = Oracle(family, tau=0.7)
    expected = sample(oracle.attach(model), positive, latent=start, steps=2)
    assert kept_sets(trace) == oracle.anchors and kinds(trace) == ["anchor", "pruned"]
    assert difference(image, expected) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=lambda f: f.name)
def test_a_mask_over_the_full_sequence_is_realigned(family):
    """ComfyUI hands FLUX a mask [N, N] over text, target and references; some pairs are forbidden, some discouraged."""
    tokens = family.text_tokens + 64 + 64 + 60
    generator = torch.Generator().manual_seed(3)
    mask = -2.0 * torch.rand(1, tokens, tokens, generator=generator)
    mask.masked_fill_(torch.rand(mask.shape, generator=generator) < 0.2, -1e4)
    refs = [latent(family), latent(family, 12, 20, seed=1)]
    positive = conditioning(family, refs, attention_mask=mask, attention_mask_img_shape=(8, 8))
    image, _, _ = compare(family, shared(family), positive, latent=empty(family))
    without, _, _ = compare(family, shared(family), conditioning(family, refs), latent=empty(family))
    assert difference(image, without) > 1e-3
    patched, _ = patch(shared(family), tau=1.0, **layer_inputs(family))
    start = empty(family)
    assert torch.equal(sample(patched, positive, latent=start), sample(shared(family), positive, latent=start))


def test_a_text_mask_of_qwen_is_respected():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    positive = conditioning(QWEN, [latent(QWEN)], attention_mask=mask)
    image, _, _ = compare(QWEN, shared(QWEN), positive, latent=empty(QWEN))
    plain, _, _ = compare(QWEN, shared(QWEN), conditioning(QWEN, [latent(QWEN)]), latent=empty(QWEN))
    assert difference(image, plain) > 1e-3


@pytest.mark.parametrize("family", [FLUX1, FLUX2], ids=lambda f: f.name)
def test_pruning_to_a_crop_equals_a_cropped_reference(family):
    """Positions are never renumbered: the kept upper half of a reference is the reference cut in half.

    At the anchor a mask hides the lower half, so that it has no influence. The mask belongs to a cond that is active
    at the first step only; the other one has the same reference, hence the same selection, and no mask.
    """
    model, start = shared(family), empty(family)
    whole = latent(family)
    upper = whole[:, :, : whole.shape[2] // 2]
    tokens = family.text_tokens + 64 + 64
    mask = torch.zeros(1, tokens, tokens)
    mask[:, :, -32:] = -1e4
    first = {"attention_mask": mask, "attention_mask_img_shape": (8, 8), "end_percent": 0.1}
    later = {"start_percent": 0.1}
    masked = conditioning(family, [whole], "offset", **first)
    inputs = {"min_keep": 0.5, "max_keep": 0.5, "layers": layer_inputs(family)["layers"], "front_layers": 0}
    patched, trace = patch(model, **inputs)
    image = sample(patched, masked + conditioning(family, [whole], "offset", **later), latent=start)
    (anchor,) = last_run(trace).anchors
    assert anchor.kept[0].nonzero().flatten().tolist() == list(range(32))
    cropped = sample(model, masked + conditioning(family, [upper], "offset", **later), latent=start)
    assert difference(image, cropped) < FLOAT_ERROR
    uncut = sample(model, masked + conditioning(family, [whole], "offset", **later), latent=start)
    assert difference(image, uncut) > 1e-3


@pytest.mark.parametrize(
    ("family", "values"),
    [
        (MAGE, "transformer_blocks.{}.attn.to_v"),
        (JOY, "double_blocks.{}.attn.img_attn_qkv"),
        (KREA, "blocks.{}.attn.wv"),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
@pytest.mark.parametrize("drop", ["half of a reference", "a reference"])
def test_what_is_dropped_might_as_well_never_have_been_given(family, values, drop):
    """As above, but for other means: at the anchor the last tokens' values are zero, so that they have no influence.

    OmniGen2 and Boogu mix the references, and shift the target by them, before the first block.
    """
    if family is MAGE and drop == "half of a reference":
        pytest.skip("its positions are counted from the middle of a reference")
    model, start = shared(family), empty(family)
    less = [latent(family, 8, 16)] if drop == "half of a reference" else [latent(family)]
    more = [latent(family, 8, 16, seed=1)]
    whole = [torch.cat(less + more, -2)] if drop == "half of a reference" else less + more
    gone = 32

    def no_values(module, args, out):
        out[:, -gone:, -width // (3 if family is JOY else 1) :] = 0

    def first(refs):
        return conditioning(family, refs, end_percent=0.1)

    def later(refs):
        return conditioning(family, refs, start_percent=0.1)

    share = 1 - gone / (gone + sum(one.shape[-1] * one.shape[-2] for one in less) // family.patch**2)
    inputs = {"min_keep": share, "max_keep": share, "layers": layer_inputs(family)["layers"], "front_layers": 0}
    patched, trace = patch(model, **inputs)
    results = []
    for network, refs in ((patched, whole), (model, less), (model, whole)):
        modules = [model.model.diffusion_model.get_submodule(values.format(i)) for i in range(family.depth)]
        width = modules[0].out_features
        handles = [module.register_forward_hook(no_values) for module in modules]

        def unhook(i, x0, x, total_steps, handles=handles):
            for handle in handles:
                handle.remove()

        results.append(sample(network, first(whole) + later(refs), latent=start, callback=unhook))
    image, cropped, uncut = results
    (anchor,) = last_run(trace).anchors
    kept = anchor.kept[0].nonzero().flatten().tolist()
    assert kept == list(range(anchor.layout.reference_tokens - gone))
    assert difference(image, cropped) < FLOAT_ERROR
    assert difference(image, uncut) > 1e-3


@pytest.mark.parametrize("channels", [32, 96], ids=["control", "fill"])
def test_flux_with_channels_for_more_than_the_latent(channels):
    """FLUX.1 Fill, Canny and Depth get the latent with an image and a mask beside it, 96 or 32 channels in all.

    ComfyUI joins references to that before the first layer, so they need as many channels: those of its VAE, with 16,
    it cannot take. Without references the model runs untouched.
    """
    model, start = load(FLUX1, in_channels=channels), empty(FLUX1)
    assert model.model.diffusion_model.in_channels != model.model.diffusion_model.out_channels
    picture = {"concat_latent_image": latent(FLUX1, seed=3)}
    wide = [torch.cat([latent(FLUX1, seed=seed) for seed in range(channels // 16)], 1)]
    compare(FLUX1, model, conditioning(FLUX1, wide, **picture), latent=start)
    patched, trace = patch(model, tau=0.5, **layer_inputs(FLUX1))
    positive = conditioning(FLUX1, **picture)
    assert torch.equal(sample(patched, positive, latent=start), sample(model, positive, latent=start))
    assert not last_run(trace).anchors
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        sample(model, conditioning(FLUX1, [latent(FLUX1)], **picture), latent=start)
