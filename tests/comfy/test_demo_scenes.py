"""What the demo model is trained and measured on: scenes, instructions, codec."""

import itertools
import random
import re

import pytest
import torch
import torch.nn.functional as F

from topi_demo import codec, edits, text
from topi_demo.scenes import draw, random_scene


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


def test_a_scene_is_the_same_at_every_size():
    scene = random_scene(random.Random("sizes"))
    assert (F.avg_pool2d(draw(scene, 256), 2) - draw(scene, 128)).abs().mean() < 0.005


def test_codec_is_a_projection():
    latent = 0.3 * torch.randn(2, codec.CHANNELS, 5, 7, generator=torch.Generator().manual_seed(0))
    image = codec.decode(latent)
    assert image.shape == (2, 3, 40, 56)
    assert image.min() > 0
    assert image.max() < 1
    torch.testing.assert_close(codec.encode(image), latent, atol=1e-4, rtol=0)
