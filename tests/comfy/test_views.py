"""ToPi Mask Preview, ToPi Report and ToPi Compare, on runs of the demo model."""

import base64
import io
import json
from dataclasses import replace

import pytest
import sampling
import torch
from PIL import Image
from sampling import conditioning, empty, layer_inputs, pack_module, patch, run_node
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from small_models import by_family, shared

import nodes


@pytest.fixture(scope="module")
def demo():
    return run_node("ToPiDemoModel")


def run(demo, *images, steps=4, batch=1, **settings):
    """-> trace and the sampler's latent, for an edit with these references."""
    model, clip, vae = demo
    model, trace = patch(model, update_interval=2, **settings)
    return trace, sample(model, clip, vae, images, steps, batch)


def sample(model, clip, vae, images, steps, batch):
    cond = nodes.CLIPTextEncode().encode(clip, "make it night")[0]
    for image in images:
        latent = nodes.VAEEncode().encode(vae, image)[0]
        (cond,) = run_node("ReferenceLatent", conditioning=cond, latent=latent)
    empty = {"samples": torch.zeros(batch, 16, 16, 16)}
    with torch.inference_mode():
        return nodes.KSampler().sample(model, 1, steps, 1.0, "euler", "simple", cond, cond, empty)[0]


def test_references_of_two_sizes(demo):
    """A negative prompt may look at another reference: the frames are of those that the image fits."""
    model, clip, vae = demo
    small, large = scene(1), scene(2, 128, 192)
    prompts = []
    for image in (small, large):
        cond = nodes.CLIPTextEncode().encode(clip, "make it night")[0]
        latent = nodes.VAEEncode().encode(vae, image)[0]
        prompts += run_node("ReferenceLatent", conditioning=cond, latent=latent)
    patched, trace = patch(model, update_interval=2)
    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    with torch.inference_mode():
        latent = nodes.KSampler().sample(patched, 1, 4, 2.0, "euler", "simple", *prompts, empty)[0]
    assert len(trace.runs[-1].anchors) == 4
    for image in (small, large):
        overlay, mask = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=image)
        assert overlay.shape == (2, *image.shape[1:]) and 0 < mask.mean() < 1
    overlay, _ = run_node("ToPiMaskPreview", trace=trace, latent=latent)
    assert overlay.shape == (2, *small.shape[1:])
    with pytest.raises(ValueError, match="another aspect ratio"):
        run_node("ToPiMaskPreview", trace=trace, latent=latent, image=scene(1, 64, 192))


def scene(seed, height=128, width=128):
    image, _ = run_node("ToPiDemoScene", seed=seed, instruction="make it night")
    return image.repeat(1, 2, 2, 1)[:, :height, :width]


def test_masks_are_the_kept_tokens_in_the_image(demo):
    images = [scene(1, 133, 171), scene(2, 96, 128)]  # 16 x 21 and 12 x 16 latent cells
    trace, latent = run(demo, *images, tau=0.6)
    anchors = trace.runs[-1].anchors
    assert len(anchors) == 2
    crops = [(slice(2, 130), slice(1, 169)), (slice(0, 96), slice(0, 128))]
    for reference, (image, crop) in enumerate(zip(images, crops, strict=True)):
        overlay, mask = run_node(
            "ToPiMaskPreview", trace=trace, latent=latent, image=image, reference=reference, opacity=1.0
        )
        assert mask.shape == (2, *image.shape[1:3])
        assert overlay.shape == (*mask.shape, 3)
        for anchor, frame, drawn in zip(anchors, mask, overlay, strict=True):
            grid = anchor.layout.reference_grids[reference]
            first = anchor.layout.references[reference].start - anchor.layout.reference.start
            kept = anchor.kept[0, first : first + grid[0] * grid[1]].view(grid)
            rows, columns = crop
            size = (rows.stop - rows.start, columns.stop - columns.start)
            assert torch.equal(frame[crop], torch.kron(kept.float(), torch.ones(16, 16))[: size[0], : size[1]])
            assert drawn[frame == 0].count_nonzero() == 0
            frame = frame.clone()
            frame[crop] = 0
            assert not frame.any()  # what the VAE cropped away is no token's


def test_without_opacity_the_picture_stays(demo):
    image = scene(1)
    trace, latent = run(demo, image)
    overlay, _ = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=image, opacity=0.0)
    torch.testing.assert_close(overlay, image.expand(2, -1, -1, -1), atol=1e-6, rtol=0)


def test_without_an_image_the_run_s_own_picture_is_shown(demo):
    image = scene(1)
    trace, latent = run(demo, image)
    overlay, mask = run_node("ToPiMaskPreview", trace=trace, latent=latent, opacity=0.0)
    assert mask.shape == (2, 128, 128)
    cells = image.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))[0]
    assert (overlay[0, ::8, ::8] - cells).abs().max() < 0.02


@by_family
def test_every_family_s_picture_is_drawn(family):
    """The live view's, and the preview's as large as the image that was encoded."""
    patched, trace = patch(shared(family), **layer_inputs(family) | {"tau": 0.6, "update_interval": 2})
    reference = sampling.latent(family, 12, 16)
    image = sampling.sample(patched, conditioning(family, [reference]), latent=empty(family))
    newest = trace.runs[-1]
    cell = newest.cell_pixels
    height, width = reference.shape[-2:]
    overlay, mask = run_node("ToPiMaskPreview", trace=trace, latent={"samples": image})
    assert mask.shape == (2, height * cell, width * cell) and overlay.shape == (*mask.shape, 3)
    assert torch.equal(
        mask[0, :: cell * family.patch, :: cell * family.patch].flatten(), newest.anchors[0].kept[0] * 1.0
    )
    event = pack_module("nodes.support.events").message("7", newest, newest.anchors[0])
    (live,) = (Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))) for p in event["pictures"])
    assert live.size[0] % width == 0 and live.size[0] * height == live.size[1] * width


def test_an_image_of_another_size_counts_in_proportion(demo):
    trace, latent = run(demo, scene(1), tau=0.6)
    small = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=scene(1))[1]
    large = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=torch.zeros(1, 256, 256, 3))[1]
    assert torch.equal(large, small.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_a_planted_part_of_the_picture_is_what_lights_up(demo):
    """The same mask, planted into the run's record, at sizes that ComfyUI crops and pads."""
    image = scene(1, 133, 171)  # 16 x 21 cells, 8 x 11 tokens, cropped by 2 and 1 pixels before
    trace, latent = run(demo, image)
    newest = trace.runs[-1]
    planted = torch.zeros(1, 8, 11, dtype=torch.bool)
    planted[0, 2, 10] = planted[0, 7, 0] = True
    newest.anchors[:] = [replace(newest.anchors[0], kept=planted.flatten(1))]
    _, mask = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=image)
    expected = torch.zeros(1, 133, 171)
    expected[0, 2 + 32 : 2 + 48, 1 + 160 : 1 + 168] = 1  # the last token of a row covers one cell of two
    expected[0, 2 + 112 : 2 + 128, 1 : 1 + 16] = 1
    assert torch.equal(mask, expected)


def test_a_batch_has_a_frame_for_each_image(demo):
    image = torch.cat((scene(1), scene(2)))
    trace, latent = run(demo, image, batch=2, tau=0.6)
    output = nodes.NODE_CLASS_MAPPINGS["ToPiMaskPreview"].execute(trace=trace, latent=latent, image=image, opacity=0.0)
    overlay, mask = output.result
    anchors = trace.runs[-1].anchors
    assert mask.shape == (4, 128, 128)
    torch.testing.assert_close(overlay, torch.cat((image, image)), atol=1e-6, rtol=0)
    kept = torch.cat([anchor.kept for anchor in anchors]).view(4, 8, 8).float()
    assert torch.equal(mask, kept.repeat_interleave(16, 1).repeat_interleave(16, 2))
    assert len(output.ui["images"]) == len(output.ui["frames"]) == 4
    assert [(frame["step"], frame["image"]) for frame in output.ui["frames"]] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert [frame["kept"] for frame in output.ui["frames"]] == kept.sum((1, 2)).tolist()


def test_nothing_pruned_means_everything_kept_and_says_why(demo):
    trace, latent = run(demo)
    preview = nodes.NODE_CLASS_MAPPINGS["ToPiMaskPreview"].execute(trace=trace, latent=latent)
    assert preview.result[1].min() == 1
    assert "no reference reached the model" in preview.ui["note"][0]
    report, plot = run_node("ToPiReport", trace=trace, latent=latent)
    assert "Nothing was pruned: no reference reached the model" in report
    assert plot.shape[-1] == 3


@pytest.mark.parametrize(("settings", "why"), [
    ({"tau": 1.0}, "tau is 1"),
    ({"first_anchor": 9}, "the first anchor is step 9, and the run has 4"),
    ({"start_percent": 1.0}, "no step lies between start_percent 1 and end_percent 1"),
    ({"steps": 1}, "too few steps"),
])  # fmt: skip
def test_the_report_says_why_nothing_was_pruned(demo, settings, why):
    trace, latent = run(demo, scene(1), **settings)
    assert why in run_node("ToPiReport", trace=trace, latent=latent)[0]


def test_bad_input_is_one_clear_sentence(demo):
    trace, latent = run(demo, scene(1))
    with pytest.raises(ValueError, match=r"image is 512 x 256 pixels and reference 0 was 128 x 128, another aspect"):
        run_node("ToPiMaskPreview", trace=trace, latent=latent, image=torch.zeros(1, 256, 512, 3))
    _, empty = patch(demo[0])
    for name in ("ToPiMaskPreview", "ToPiReport"):
        with pytest.raises(ValueError, match=r"^this trace holds no run: sample with the model of the same ToPi Patch"):
            run_node(name, trace=empty, latent=latent)


def test_two_samplers_on_one_model_show_their_own_runs(demo):
    """Also when the first one's preview is asked for again, as after a rerun from ComfyUI's cache."""
    model, clip, vae = demo
    model, trace = patch(model, update_interval=2, tau=0.6)
    latents, masks = [], []
    for seed in (1, 2):
        latents.append(sample(model, clip, vae, [scene(seed)], 4, 1))
        masks.append(run_node("ToPiMaskPreview", trace=trace, latent=latents[-1])[1])
    assert not torch.equal(*masks)
    for latent, mask in zip(latents, masks, strict=True):
        again = {"samples": latent["samples"].clone()}
        assert torch.equal(run_node("ToPiMaskPreview", trace=trace, latent=again)[1], mask)


def test_two_patch_nodes_show_their_own_runs(demo):
    (first, latent), (second, other) = (run(demo, scene(seed), tau=0.6) for seed in (1, 2))
    masks = [run_node("ToPiMaskPreview", trace=t, latent=made)[1] for t, made in ((first, latent), (second, other))]
    assert not torch.equal(*masks)
    with pytest.raises(ValueError, match="connect the output of the sampler that the same ToPi Patch feeds"):
        run_node("ToPiMaskPreview", trace=first, latent=other)


def test_a_reference_that_is_not_there(demo):
    trace, latent = run(demo, scene(1))
    with pytest.raises(ValueError, match=r"reference must be in \[0, 0\] for this run, got 1"):
        run_node("ToPiMaskPreview", trace=trace, latent=latent, reference=1)


def test_report_of_a_run(demo):
    images = [scene(1), scene(2, 96, 128)]
    trace, latent = run(demo, *images, tau=0.6)
    newest = trace.runs[-1]
    output = nodes.NODE_CLASS_MAPPINGS["ToPiReport"].execute(trace=trace, latent=latent)
    report, plot = output.result
    for anchor in newest.anchors:
        first, second = anchor.kept[0].split((64, 48))
        row = next(line for line in report.splitlines() if line.startswith(f"step {anchor.step} "))
        for part in (first, second, anchor.kept[0]):
            assert f"{int(part.sum())} of {len(part)} ({part.float().mean():.1%})" in row
    for word in ("2 anchors, 2 pruned", "full step", "pruned step", "speed-up", "predicted", "scoring"):
        assert word in report
    assert plot.shape[-1] == 3 and plot.unique().numel() > 2
    assert output.ui["text"] == (report,)
    facts = json.loads(json.dumps(output.ui["run"][0]))  # plain values
    assert [step["kind"] for step in facts["steps"]] == [step.kind for step in newest.steps]
    assert facts["figures"]["measured"] > 0 and facts["nothing"] is None
    assert facts["figures"]["scoring_seconds"] > 0
    assert newest.anchors[1].seconds < newest.steps[2].seconds  # a part of it


def test_compare(demo):
    a, b = scene(1), scene(2)
    psnr, ssim, text = run_node("ToPiCompare", image=torch.cat((a, a)), reference=torch.cat((b, b)))
    expected = peak_signal_noise_ratio(b[0].numpy(), a[0].numpy(), data_range=1)
    assert psnr == pytest.approx(expected, abs=1e-4)
    assert ssim == pytest.approx(
        structural_similarity(
            a[0].double().numpy(), b[0].double().numpy(), data_range=1, channel_axis=-1,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        ), abs=1e-5,
    )  # fmt: skip
    assert text.splitlines()[0] == f"mean: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"
    assert run_node("ToPiCompare", image=a, reference=a)[:2] == (float("inf"), 1.0)
    with pytest.raises(ValueError, match=r"got 1 of 128 x 128 and 1 of 128 x 96"):
        run_node("ToPiCompare", image=a, reference=scene(1, 96, 128))


def test_the_record_is_small(demo):
    """A byte per token of the masks, one picture of the references, a few values of the result (`bench/record.py`)."""
    trace, _ = run(demo, scene(1), tau=0.6)
    newest = trace.runs[-1]
    anchors = {id(anchor.references): anchor.references for anchor in newest.anchors}
    pictures = sum(reference.picture.nbytes for references in anchors.values() for reference in references)
    assert pictures == 16 * 16 * 3  # once a run, a byte a channel and cell
    assert [anchor.kept.nbytes for anchor in newest.anchors] == [64] * 2
    assert newest.fingerprint.nbytes <= 4 * 256
