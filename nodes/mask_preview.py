"""ToPi Mask Preview: which parts of a reference the model kept, drawn over it."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..topi_core.trace import Anchor, Run
from .patch import TraceType

GOLD = (1.0, 0.78, 0.10)
Size = tuple[int, int]


class ToPiMaskPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiMaskPreview",
            display_name="ToPi Mask Preview",
            category="ToPi",
            description="Shows which reference tokens a run kept: in gold, the others dimmed. One picture an anchor.",
            is_output_node=True,
            inputs=[
                TraceType.Input("trace", tooltip="From ToPi Patch."),
                io.Latent.Input("latent", tooltip="The sampler's output: it says which run is meant."),
                io.Image.Input("image", optional=True, tooltip="The reference to draw over; else a rough picture."),
                io.Int.Input("reference", default=0, min=0, max=63, tooltip="Which reference, counted from 0."),
                io.Float.Input(
                    "opacity", default=0.6, min=0.0, max=1.0, step=0.05,
                    tooltip="How strongly the picture is dimmed and tinted; 0 shows it as it is.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="overlay", tooltip="Kept tokens in gold, the others dimmed."),
                io.Mask.Output(display_name="mask", tooltip="1 where the token is kept, one frame an anchor."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, trace, latent, image=None, reference=0, opacity=0.6) -> io.NodeOutput:
        run = trace.find(latent["samples"])
        anchors = anchors_with(run, reference)
        if image is None:
            image = small_picture(run, anchors[0], reference) if anchors else torch.full((1, 64, 64, 3), 0.5)
        size = (image.shape[1], image.shape[2])
        # a run without an anchor pruned nothing
        masks = [kept_pixels(run, anchor, reference, size) for anchor in anchors] or [torch.ones(size)]
        mask = torch.stack(masks).float()
        overlay = draw(image[:1, ..., :3], mask, opacity)
        return io.NodeOutput(overlay, mask, ui=ui.PreviewImage(overlay, cls=cls))


def anchors_with(run: Run, reference: int) -> list[Anchor]:
    anchors = [anchor for anchor in run.anchors if reference < len(anchor.references)]
    if run.anchors and not anchors:
        most = max(len(anchor.references) for anchor in run.anchors)
        raise ValueError(f"reference must be in [0, {most - 1}] for this run, got {reference}")
    return anchors


def small_picture(run: Run, anchor: Anchor, reference: int) -> Tensor:
    """The reference as the run saw it, in blocks of a latent cell; gray for models without latent-to-RGB factors."""
    seen = anchor.references[reference]
    if seen.picture is None:
        return torch.full((1, *(side * run.cell_pixels for side in seen.size), 3), 0.5)
    large = seen.picture[:1].float().repeat_interleave(run.cell_pixels, 1).repeat_interleave(run.cell_pixels, 2)
    return large / 255


def kept_pixels(run: Run, anchor: Anchor, reference: int, size: Size) -> Tensor:
    """What an anchor kept of one reference, bool [H, W] in the pixels of an image of it; the first one of a batch."""
    layout, place = anchor.layout, anchor.layout.references[reference]
    grid = layout.reference_grids[reference]
    kept = anchor.kept[0, place.start - layout.context.start : place.stop - layout.context.start].view(grid)
    cells = anchor.references[reference].size
    rows, columns = (
        token_of_pixels(*sides, run.cell_pixels, run.patch) for sides in zip(size, cells, grid, strict=True)
    )
    return kept[rows][:, columns]


def token_of_pixels(pixels: int, cells: int, tokens: int, cell_pixels: int, patch: int) -> Tensor:
    """Which token each pixel of a side belongs to: [pixels].

    An image that was encoded as it is was cropped around its middle; of any other size, it counts in proportion.
    """
    place = torch.arange(pixels)
    if pixels // cell_pixels == cells:
        cell = (place - pixels % cell_pixels // 2).div(cell_pixels, rounding_mode="floor").clamp(0, cells - 1)
    else:
        cell = place * cells // pixels
    return (cell // patch).clamp(max=tokens - 1)


def draw(picture: Tensor, mask: Tensor, opacity: float) -> Tensor:
    """Kept parts tinted with gold, the others dimmed: picture [1, H, W, 3], mask [A, H, W] -> [A, H, W, 3]."""
    mask = mask[..., None]
    gold = torch.lerp(picture, torch.tensor(GOLD), 0.5 * opacity)
    return mask * gold + (1 - mask) * picture * (1 - opacity)
