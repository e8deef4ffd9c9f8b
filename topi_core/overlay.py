"""From kept tokens to pixels: where a token's share of the image is, and a drawing of it as in the paper's Fig. 7."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .trace import Anchor, Run

GOLD = (1.0, 0.78, 0.10)
FAINT = 0.1  # weight of the kept token with the least influence
Size = tuple[int, ...]  # height, width


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a reference image became tokens.

    An image that was encoded as it is lost, at its edges, what its middle's cells leave over; one of another size was
    scaled, and counts in proportion. A latent whose sides are no multiple of the patch is padded at its end, so its
    last tokens cover fewer cells.
    """

    cells: Size  # of its latent
    patch: int  # cells of a token, along one side
    cell_pixels: int  # pixels of a cell, along one side

    @property
    def grid(self) -> Size:
        rows, columns = (-(-side // self.patch) for side in self.cells)
        return rows, columns

    def fits(self, image: Size) -> bool:
        """Whether some scale brings the image to this latent, with less than a cell of rounding a side."""
        sides = [((cells - 1) / pixels, (cells + 1) / pixels) for cells, pixels in zip(self.cells, image, strict=True)]
        return max(low for low, _ in sides) < min(high for _, high in sides)

    def spread(self, values: Tensor, image: Size) -> Tensor:
        """Of this reference's tokens [.., tokens] -> [.., H, W]: on the pixels that they came from, else 0 or False."""
        as_it_is = tuple(pixels // self.cell_pixels for pixels in image) == tuple(self.cells)
        rows, columns = (self._tokens(*side, as_it_is) for side in zip(image, self.cells, strict=True))
        grid = values[..., : self.grid[0] * self.grid[1]].unflatten(-1, self.grid)
        return torch.nn.functional.pad(grid, (0, 1, 0, 1))[..., rows, :][..., columns]  # -1 is the padding

    def _tokens(self, pixels: int, cells: int, as_it_is: bool) -> Tensor:
        """Which token each pixel along one side belongs to; -1 where it was cropped away."""
        place = torch.arange(pixels)
        if not as_it_is:
            return place * cells // pixels // self.patch
        cell = (place - pixels % self.cell_pixels // 2).div(self.cell_pixels, rounding_mode="floor")
        return torch.where((cell >= 0) & (cell < cells), cell // self.patch, -1)


def geometry(run: Run, anchor: Anchor, reference: int) -> Geometry:
    return Geometry(cells=anchor.references[reference].size, patch=run.patch, cell_pixels=run.cell_pixels)


def kept_of(anchor: Anchor, reference: int) -> Tensor:
    """What an anchor kept of one reference: bool [images, tokens]."""
    return anchor.kept[:, _part(anchor, reference)]


def weight_of(anchor: Anchor, reference: int) -> Tensor:
    """How strongly each token of one reference is drawn, by its influence: [images, tokens] in 0..1; 0 if dropped."""
    kept = kept_of(anchor, reference).float()
    if anchor.ranks is None:
        return kept
    return kept * (FAINT + (1 - FAINT) * anchor.ranks[:, _part(anchor, reference)] / 255)


def _part(anchor: Anchor, reference: int) -> slice:
    place, start = anchor.layout.references[reference], anchor.layout.reference.start
    return slice(place.start - start, place.stop - start)


def draw(picture: Tensor, weight: Tensor, opacity: float) -> Tensor:
    """Kept parts tinted with gold, the more the larger their weight, the others, of weight 0, dimmed.

    picture [F, H, W, 3], weight [F, H, W] in 0..1 -> [F, H, W, 3]
    """
    weight = weight[..., None].to(picture.dtype)
    gold = torch.lerp(picture, torch.tensor(GOLD, dtype=picture.dtype), 0.7 * opacity * weight)
    return torch.where(weight > 0, gold, picture * (1 - opacity))
