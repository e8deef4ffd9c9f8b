"""What the demo model is trained and measured on: scenes, instructions, codec."""

import itertools
import math
import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from topi_demo import codec, edits, text
from topi_demo.scenes import (
    FIELDS,
    SURFACES,
    Specks,
    draw,
    random_field,
    random_object,
    random_scene,
    random_texture,
    relief,
    specks,
)

OPEN_KINDS = [kind for kind, (group, _) in edits.GRAMMAR.items() if group == edits.OPEN]


def every_edit():
    for kind, (_, sentence) in edits.GRAMMAR.items():
        names = re.findall(r"\{(\w+)\}", sentence)
        for words in itertools.product(*(edits.SLOTS[name] for name in names)):
            yield edits.Edit(kind, dict(zip(names, words, strict=True)))


def test_every_instruction_is_understood():
    for edit in every_edit():
        assert edits.parse(str(edit)) == edit
        assert edits.parse(f"  {str(edit).capitalize()}. ") == edit
        assert len(text.tokenize(str(edit))) == text.LENGTH


def test_captions_are_in_the_vocabulary():
    rng = random.Random("captions")
    for _ in range(200):
        text.tokenize(edits.caption(random_scene(rng)))


def test_later_words_stand_last():
    """Rows of the word vectors of older weights keep their meaning."""
    first = text.VOCABULARY[: -len(text._LATER)]
    assert list(first) == sorted(first)
    assert len(first) == 52


def test_unknown_instruction():
    with pytest.raises(ValueError, match=r"'paint the star blue' is not one the demo scenes know; allowed: make"):
        edits.parse("paint the star blue")


def test_unknown_words():
    with pytest.raises(ValueError, match="does not know the words 'paint', 'mauve'; it knows: a an and"):
        text.tokenize("Paint the star mauve")
    with pytest.raises(ValueError, match="reads at most 18 words, got 19"):
        text.tokenize("the " * 19)


@pytest.mark.parametrize("kind", edits.GRAMMAR)
def test_the_same_seed_draws_the_same_example(kind):
    def example(seed):
        rng = random.Random(seed)
        return edits.example(rng, edits.random_edit(rng, kind), 64)

    first, again, other = example("a"), example("a"), example("b")
    assert len(first.references) == first.edit.references
    assert torch.equal(first.expected, again.expected)
    assert all(torch.equal(x, y) for x, y in zip(first.references, again.references, strict=True))
    assert not torch.equal(first.references[0], other.references[0])
    for image in (*first.references, first.expected):
        assert image.shape == (3, 64, 64)
        assert image.min() >= 0
        assert image.max() <= 1


def test_known_edits():
    def example(instruction):
        return edits.example(random.Random("known"), edits.parse(instruction), 64)

    keep, invert, left = (example(s) for s in ("keep the image", "invert the colours", "shift the image left"))
    assert torch.equal(keep.expected, keep.references[0])
    assert torch.equal(invert.expected, 1 - invert.references[0])
    assert torch.equal(left.expected[..., :-8], left.references[0][..., 8:])


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_open_edits_have_many_right_answers(kind):
    """From the same reference, two draws of the outcome differ."""
    edit, rng = edits.random_edit(random.Random(kind), kind), random.Random(f"scenes {kind}")
    found = []
    while len(found) < 2:  # the same scenes at first, another outcome
        scenes = edits._scenes_for(random.Random(f"same {kind}"), edit)
        after = edits._EDITS[kind](scenes, edit, rng)
        if kind == "zoom out":  # what was outside is part of the scene
            extra = random_object(rng, "star", (1.0, 1.0, 1.0), scenes[0].objects)
            after = replace(after, objects=(*after.objects, extra))
        if after is not None:
            found.append(after(draw(scenes[0], 64)) if callable(after) else draw(after, 64))
    assert (found[0] - found[1]).abs().amax() > 0.1


def test_added_objects_leave_the_others_alone():
    for kind in ("add", "somewhere"):
        rng = random.Random(kind)
        example = edits.example(rng, edits.random_edit(rng, kind), 64)
        changed = (example.expected - example.references[0]).abs().amax(0) > 1e-6
        assert 0 < changed.float().mean() < 0.15
        rows, columns = (changed.any(i).nonzero().flatten() for i in (1, 0))
        assert rows[-1] - rows[0] < 25 and columns[-1] - columns[0] < 25


def test_zooming_out_shows_the_reference_in_the_middle():
    example = edits.example(random.Random("out"), edits.parse("zoom out"), 96)
    small = F.interpolate(example.references[0][None], 64, mode="area")[0]
    assert (example.expected[:, 16:80, 16:80] - small).abs().mean() < 0.02


def test_the_ground_of_another_image():
    example = edits.example(random.Random("g"), edits.parse("put the ground of the second image into the first"), 64)
    first, second = example.scenes
    bare = [draw(replace(scene, objects=()), 64) for scene in (first, second)]
    on_ground = (example.references[0] == bare[0]).all(0)
    assert torch.equal(example.expected[:, on_ground], bare[1][:, on_ground])


@pytest.mark.parametrize("kind", [*SURFACES, *FIELDS])
def test_relief_is_a_sum_of_waves(kind):
    """Its value at a point does not depend on the other points, and it stays within its strength."""
    texture = random_texture(random.Random(kind), (kind,), 0.42)
    x, y = torch.rand(1, 9), torch.rand(7, 1)
    height = relief(texture, x, y)
    assert height.abs().max() <= texture.strength
    alone = torch.stack([relief(texture, x[:, j : j + 1], y[i : i + 1])[0, 0] for i in range(7) for j in range(9)])
    torch.testing.assert_close(height.flatten(), alone, atol=1e-5, rtol=0)
    assert not torch.allclose(height, relief(replace(texture, seed=texture.seed + 1), x, y), atol=0.01)


@pytest.mark.parametrize("kind", [*SURFACES, *FIELDS])
def test_the_codec_keeps_fine_detail(kind):
    scene = replace(random_scene(random.Random("flat")), objects=(), gradient=0.0)
    rng = random.Random(f"codec {kind}")
    scene = (
        random_field(rng, scene, kind) if kind in FIELDS else replace(scene, texture=random_texture(rng, (kind,), 0.2))
    )
    image = draw(scene, 128)[None]
    lost = (codec.decode(codec.encode(image)) - image).square().mean()
    assert lost < 0.1 * image.var((2, 3)).mean()


def test_specks_are_discs():
    of = Specks(5, 3, 0.05, 0.1)
    axis = (torch.arange(40) + 0.5) / 40
    x, y = axis[None, :], axis[:, None]
    px, py, size = torch.rand(5, 3, generator=torch.Generator().manual_seed(3)).T[..., None, None]
    plain = (0.5 - 40 * (torch.hypot(x - px, y - py) - 0.05 - 0.05 * size)).clamp(0, 1).amax(0)
    torch.testing.assert_close(specks(of, x, y, 40.0), plain, atol=1e-5, rtol=0)


def test_every_pixel_of_a_painting_is_of_its_nearest_stroke():
    image, strokes = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)), 9
    px, py, turn, tone = torch.rand(4, strokes, generator=torch.Generator().manual_seed(5))
    painted = edits._painted(image, strokes, 5)
    for row, column in itertools.product(range(16), repeat=2):
        dx, dy = (column + 0.5) / 16 - px, (row + 0.5) / 16 - py
        along = dx * torch.cos(math.pi * turn) + dy * torch.sin(math.pi * turn)
        across = dy * torch.cos(math.pi * turn) - dx * torch.sin(math.pi * turn)
        near = int((0.25 * along**2 + across**2).argmin())
        colour = image[:, int(py[near] * 16), int(px[near] * 16)] + 0.3 * (tone[near] - 0.5)
        torch.testing.assert_close(painted[:, row, column], colour.clamp(0, 1))


def test_a_scene_is_the_same_at_every_size():
    for i in range(8):
        scene = random_scene(random.Random(f"sizes {i}"))
        assert (F.avg_pool2d(draw(scene, 256), 2) - draw(scene, 128)).abs().mean() < 0.01


def test_codec_is_a_projection():
    latent = 0.3 * torch.randn(2, codec.CHANNELS, 5, 7, generator=torch.Generator().manual_seed(0))
    image = codec.decode(latent)
    assert image.shape == (2, 3, 40, 56)
    assert image.min() > 0
    assert image.max() < 1
    torch.testing.assert_close(codec.encode(image), latent, atol=1e-4, rtol=0)
