"""From kept tokens to pixels: where a token's share of the image is, and a drawing of it as in the paper's Fig. 7."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .trace import Anchor, Run

GOLD = (1.0, 0.78, 0.10)
Size = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a reference image became tokens: its latent has `cells`, a token covers `patch` x `patch` of them.

    A cell covers `cell_pixels` x `cell_pixels` pixels. An image that was encoded as it is lost what is left over of
    that at its edges, around its middle; one of another size was scaled, and counts in proportion. A latent whose
    sides are no multiple of the patch is padded at its end, so its last tokens cover fewer cells.
    """

    cells: Size
    patch: int
    cell_pixels: int

    @property
    def grid(self) -> Size:
        rows, columns = (-(-side // self.patch) for side in self.cells)
        return rows, columns

    def fits(self, image: Size) -> bool:
        """Whether some scale brings the image to this latent, with less than a cell of rounding a side."""
        low = max((cells - 1) / pixels for cells, pixels in zip(self.cells, image, strict=True))
        high = min((cells + 1) / pixels for cells, pixels in zip(self.cells, image, strict=True))
        return low < high

    def tokens_of_pixels(self, image: Size) -> tuple[Tensor, Tensor]:
        """Which token row and column the pixels of an image belong to, [H] and [W]; -1 where it was cropped away."""
        as_it_is = all(pixels // self.cell_pixels == cells for pixels, cells in zip(image, self.cells, strict=True))
        rows, columns = (self._side(pixels, cells, as_it_is) for pixels, cells in zip(image, self.cells, strict=True))
        return rows, columns

    def _side(self, pixels: int, cells: int, as_it_is: bool) -> Tensor:
        place = torch.arange(pixels)
        if not as_it_is:
            return place * cells // pixels // self.patch
        cell = (place - pixels % self.cell_pixels // 2).div(self.cell_pixels, rounding_mode="floor")
        return torch.where((cell >= 0) & (cell < cells), cell // self.patch, -1)

    def mask(self, kept: Tensor, image: Size) -> Tensor:
        """kept bool [tokens] of this reference -> bool [H, W]: True on the pixels that the kept tokens came from."""
        rows, columns = self.tokens_of_pixels(image)
        grid = torch.nn.functional.pad(kept[: self.grid[0] * self.grid[1]].view(self.grid), (0, 1, 0, 1))
        return grid[rows][:, columns]  # -1 is the padding


def geometry(run: Run, anchor: Anchor, reference: int) -> Geometry:
    return Geometry(cells=anchor.references[reference].size, patch=run.patch, cell_pixels=run.cell_pixels)


def kept_of(anchor: Anchor, reference: int) -> Tensor:
    """What an anchor kept of one reference: bool [images, tokens]."""
    place, start = anchor.layout.references[reference], anchor.layout.context.start
    return anchor.kept[:, place.start - start : place.stop - start]


def draw(picture: Tensor, mask: Tensor, opacity: float) -> Tensor:
    """Kept parts tinted with gold, the others dimmed: picture [F, H, W, 3], mask [F, H, W] -> [F, H, W, 3]."""
    mask = mask[..., None].to(picture.dtype)
    gold = torch.lerp(picture, torch.tensor(GOLD, dtype=picture.dtype), 0.5 * opacity)
    return mask * gold + (1 - mask) * picture * (1 - opacity)
