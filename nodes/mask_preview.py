"""ToPi Mask Preview: which parts of a reference the model kept, drawn over it."""

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..topi_core.overlay import draw, geometry, kept_of, weight_of
from ..topi_core.report import why_nothing
from ..topi_core.trace import Anchor, Run
from .patch import TraceType

LARGEST = 768  # longest side of the page's frames in pixels; the outputs keep the size of the image


class ToPiMaskPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiMaskPreview", display_name="ToPi Mask Preview", category="ToPi", is_output_node=True,
            description="Shows what the model looked at: kept reference tokens in gold, the more the larger their "
            "influence, and the others dimmed; one frame per anchor.",
            inputs=[
                TraceType.Input("trace", tooltip="From ToPi Patch."),
                io.Latent.Input("latent", tooltip="The sampler's output: it says which run is meant."),
                io.Image.Input("image", optional=True,
                    tooltip="The reference image to draw over; without one, a small picture of it."),
                io.Int.Input("reference", default=0, min=0, max=63, tooltip="Which reference, counted from 0."),
                io.Float.Input("opacity", default=0.6, min=0.0, max=1.0, step=0.05,
                    tooltip="How strongly the picture is dimmed and tinted; 0 shows it as it is."),
            ],
            outputs=[
                io.Image.Output(display_name="overlay",
                    tooltip="The reference with its kept tokens: one frame per anchor, and per image of a batch."),
                io.Mask.Output(display_name="mask",
                    tooltip="1 where the token is kept, so all 1 where every token is; frames as in overlay."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, trace, latent, image=None, reference=0, opacity=0.6) -> io.NodeOutput:
        run = trace.find(latent["samples"])
        image = None if image is None else image.cpu()  # on the device with --gpu-only
        anchors = alike(run, anchors_with(run, reference), reference, image)
        if anchors:
            seen = [(a, geometry(run, a, reference), picture(run, a, reference, image)) for a in anchors]
            mask = torch.cat([at.spread(kept_of(a, reference).float(), p.shape[1:3]) for a, at, p in seen])
            weight = torch.cat([at.spread(weight_of(a, reference), p.shape[1:3]) for a, at, p in seen])
            pictures = torch.cat([p for _, _, p in seen])
        else:  # a run without an anchor pruned nothing
            pictures = torch.full((1, 64, 64, 3), 0.5) if image is None else image[:1, ..., :3]
            mask = weight = torch.ones(pictures.shape[:3])
        overlay = draw(pictures, weight, opacity)
        shown = ui.PreviewImage(_at_most(overlay, LARGEST)).as_dict()
        facts = [fact for anchor in anchors for fact in frames(anchor, reference)]
        return io.NodeOutput(overlay, mask, ui=shown | {"frames": facts, "note": (note(run),)})


def note(run: Run) -> str:
    """What has to be said beside the frames."""
    if why := why_nothing(run):
        return f"nothing was {run.verb}: {why}"
    unscored = run.anchors and all(anchor.ranks is None for anchor in run.anchors)
    return "no influence was scored, as nothing looked on while this run was sampled: change the seed" * bool(unscored)


def anchors_with(run: Run, reference: int) -> list[Anchor]:
    """The anchors that saw this reference; conds without it have their own."""
    anchors = [anchor for anchor in run.anchors if reference < len(anchor.references)]
    if run.anchors and not anchors:
        most = max(len(anchor.references) for anchor in run.anchors)
        raise ValueError(f"reference must be in [0, {most - 1}] for this run, got {reference}")
    return anchors


def alike(run: Run, anchors: list[Anchor], reference: int, image: Tensor | None) -> list[Anchor]:
    """Of prompts whose references differ in size, those that the image fits, or those with the first one's size."""
    if image is None:
        return [a for a in anchors if a.references[reference].size == anchors[0].references[reference].size]
    return [a for a in anchors if geometry(run, a, reference).fits(image.shape[1:3])] or anchors


def frames(anchor: Anchor, reference: int) -> list[dict]:
    """What the page shows beside each frame of an anchor, as plain values."""
    kept = kept_of(anchor, reference)
    facts = {"step": anchor.step, "sigma": round(anchor.sigma, 4), "images": len(kept)}
    return [
        facts | {"image": i, "share": row.float().mean().item(), "kept": int(row.sum()), "tokens": len(row)}
        for i, row in enumerate(kept)
    ]


def picture(run: Run, anchor: Anchor, reference: int, image: Tensor | None) -> Tensor:
    """What to draw over [images, H, W, 3]: the image, or the small picture of the reference, enlarged to its size."""
    images, seen = anchor.kept.shape[0], anchor.references[reference]
    if image is None:
        if seen.picture is None:
            return torch.full((images, *(side * run.cell_pixels for side in seen.size), 3), 0.5)
        scale = run.cell_pixels * seen.size[0] // seen.picture.shape[1]
        return seen.picture.float().div(255).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    height, width = image.shape[1:3]
    if not geometry(run, anchor, reference).fits((height, width)):
        h, w = (side * run.cell_pixels for side in seen.size)
        raise ValueError(
            f"image is {width} x {height} pixels and reference {reference} was {w} x {h}, another aspect ratio: "
            "connect the image that was encoded as this reference"
        )
    return image[..., :3] if len(image) == images else image[:1, ..., :3].expand(images, -1, -1, -1)


def _at_most(pictures: Tensor, side: int) -> Tensor:
    """[F, H, W, 3], made smaller where the longest side is larger."""
    scale = side / max(pictures.shape[1:3])
    if scale >= 1:
        return pictures
    size = [max(1, round(length * scale)) for length in pictures.shape[1:3]]
    return torch.nn.functional.interpolate(pictures.movedim(-1, 1), size, mode="area").movedim(1, -1)
