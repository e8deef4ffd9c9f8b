"""Kept tokens land on the pixels that they came from."""

from dataclasses import replace

import pytest
import torch

from topi_core.layout import Layout
from topi_core.overlay import FAINT, GOLD, Geometry, draw, kept_of, weight_of
from topi_core.select import select
from topi_core.trace import Anchor


def encoded(pixels, cell_pixels):
    """What ComfyUI's VAE does to a side: crop around the middle to whole cells -> first pixel, cells."""
    return pixels % cell_pixels // 2, pixels // cell_pixels


@pytest.mark.parametrize("size", [(128, 128), (133, 171), (96, 135), (17, 250), (16, 16)])
@pytest.mark.parametrize(("patch", "cell_pixels"), [(2, 8), (1, 16), (2, 4)])
def test_each_pixel_by_hand(size, patch, cell_pixels):
    (top, rows), (left, columns) = (encoded(side, cell_pixels) for side in size)
    place = Geometry(cells=(rows, columns), patch=patch, cell_pixels=cell_pixels)
    grid = -(-rows // patch), -(-columns // patch)
    assert place.grid == grid
    kept = torch.rand(grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.5
    mask = place.spread(kept, size)
    assert mask.shape == size
    kept, mask = kept.tolist(), mask.tolist()  # indexing a tensor takes a hundred times as long
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = (y - top) // cell_pixels // patch, (x - left) // cell_pixels // patch
            inside = top <= y < top + rows * cell_pixels and left <= x < left + columns * cell_pixels
            assert mask[y][x] == (inside and kept[row * grid[1] + column])


def test_an_image_of_another_size_counts_in_proportion():
    place = Geometry(cells=(16, 21), patch=2, cell_pixels=8)
    kept = torch.rand(8 * 11, generator=torch.Generator().manual_seed(0)) < 0.5
    small = place.spread(kept, (128, 168))
    assert torch.equal(place.spread(kept, (384, 504)), small.repeat_interleave(3, 0).repeat_interleave(3, 1))


@pytest.mark.parametrize(("image", "fits"), [
    ((128, 168), True), ((133, 171), True), ((384, 504), True), ((64, 84), True),
    ((128, 128), False), ((168, 128), False), ((128, 200), False),
])  # fmt: skip
def test_the_aspect_ratio_is_held_to_a_cell(image, fits):
    assert Geometry(cells=(16, 21), patch=2, cell_pixels=8).fits(image) is fits


def test_references_have_their_own_tokens():
    layout = Layout(3, (2, 2), ((2, 3), (1, 2)))
    mask = torch.arange(16).view(2, 8) % 3 == 0
    anchor = Anchor(0, 1.0, layout, (), mask)
    assert torch.equal(kept_of(anchor, 0), mask[:, :6])
    assert torch.equal(kept_of(anchor, 1), mask[:, 6:])


def test_drawing_tints_and_dims():
    picture, mask = torch.full((1, 1, 2, 3), 0.5), torch.tensor([[[1.0, 0.0]]])
    gold, dim = draw(picture, mask, 1.0)[0, 0]
    torch.testing.assert_close(gold, torch.tensor(GOLD) * 0.7 + 0.5 * 0.3)
    assert dim.tolist() == [0, 0, 0]
    paler = draw(picture, mask / 2, 1.0)[0, 0, 0]
    torch.testing.assert_close(paler, torch.tensor(GOLD) * 0.35 + 0.5 * 0.65)
    assert torch.equal(draw(picture, mask, 0.0), picture)


def test_a_kept_token_is_drawn_by_its_rank_and_a_dropped_one_not_at_all():
    layout = Layout(0, (1, 1), ((1, 4), (1, 1)))
    influence = torch.tensor([[3.0, 0.0, 9.0, 1.0, 2.0]])
    selection = select(influence, tau=0.9)
    anchor = Anchor(0, 1.0, layout, (), selection.mask(), ranks=selection.ranks())
    assert anchor.ranks.tolist() == [[191, 0, 255, 64, 128]]
    torch.testing.assert_close(weight_of(anchor, 0)[0], torch.tensor([FAINT + (1 - FAINT) * 191 / 255, 0, 1, 0]))
    assert weight_of(replace(anchor, ranks=None), 0).tolist() == [[1, 0, 1, 0]]
