"""ToPi Mask Preview and ToPi Report, on runs of the demo model."""

import pytest
import torch

import nodes
from runs import patch, run_node


@pytest.fixture(scope="module")
def demo():
    return run_node("ToPiDemoModel")


def run(demo, *images, steps=4, **settings):
    """-> trace and the sampler's latent, for an edit with these references."""
    model, clip, vae = demo
    cond = nodes.CLIPTextEncode().encode(clip, "make it night")[0]
    for image in images:
        latent = nodes.VAEEncode().encode(vae, image)[0]
        (cond,) = run_node("ReferenceLatent", conditioning=cond, latent=latent)
    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    model, trace = patch(model, update_interval=2, **settings)
    with torch.inference_mode():
        return trace, nodes.KSampler().sample(model, 1, steps, 1.0, "euler", "simple", cond, cond, empty)[0]


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
            first = anchor.layout.references[reference].start - anchor.layout.context.start
            kept = anchor.kept[0, first : first + grid[0] * grid[1]].view(grid)
            rows, columns = crop
            size = (rows.stop - rows.start, columns.stop - columns.start)
            assert torch.equal(frame[crop], torch.kron(kept.float(), torch.ones(16, 16))[: size[0], : size[1]])
            assert drawn[frame == 0].count_nonzero() == 0


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


def test_an_image_of_another_size_counts_in_proportion(demo):
    trace, latent = run(demo, scene(1), tau=0.6)
    small = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=scene(1))[1]
    large = run_node("ToPiMaskPreview", trace=trace, latent=latent, image=torch.zeros(1, 256, 512, 3))[1]
    assert torch.equal(large, small.repeat_interleave(2, 1).repeat_interleave(4, 2))


def test_nothing_pruned_means_everything_kept(demo):
    trace, latent = run(demo)
    _, mask = run_node("ToPiMaskPreview", trace=trace, latent=latent)
    assert mask.min() == 1
    report, plot = run_node("ToPiReport", trace=trace, latent=latent)
    assert "no reference tokens were pruned in 4 steps" in report
    assert plot.shape[-1] == 3


def test_a_reference_that_is_not_there(demo):
    trace, latent = run(demo, scene(1))
    with pytest.raises(ValueError, match=r"reference must be in \[0, 0\] for this run, got 1"):
        run_node("ToPiMaskPreview", trace=trace, latent=latent, reference=1)


def test_report_has_a_line_for_each_step(demo):
    trace, latent = run(demo, scene(1), tau=0.6)
    newest = trace.runs[-1]
    output = nodes.NODE_CLASS_MAPPINGS["ToPiReport"].execute(trace=trace, latent=latent)
    report, _ = output.result
    lines = report.splitlines()[-4:]
    assert [line.split()[2] for line in lines] == ["anchor", "pruned", "anchor", "pruned"]
    assert lines[0].endswith(f"{newest.anchors[0].share:.1%}")
    assert output.ui["text"] == (report,)
    assert [step["kind"] for step in output.ui["run"][0]["steps"]] == [step.kind for step in newest.steps]
