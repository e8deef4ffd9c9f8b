"""Plans: which rows and keys a cut leaves, against boolean masks and sequences written out by hand."""

from itertools import permutations

import pytest
import torch

from topi_core.layout import Layout
from topi_core.plan import Attention, Cut

ORDERS = list(permutations(("text", "target", "references")))
KEPT = {"one": [[0, 2]], "each its own": [[1, 2], [0, 3]], "none": [[]], "all": [[0, 1, 2, 3]]}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_gathering_keeps_what_stands_around_the_references(order, kept):
    """Rows, positions with dimensions before the tokens, and masks along both of theirs."""
    layout, kept = Layout(2, (1, 3), ((2, 2),), order), torch.tensor(kept, dtype=torch.long)
    cut, batch = Cut(kept=kept), len(kept)
    x = torch.rand(batch, layout.tokens, 3)
    stays = torch.ones(batch, layout.tokens, dtype=torch.bool)
    stays[:, layout.reference] = False
    stays.scatter_(1, layout.reference.start + kept, True)
    short = cut.gather(x, layout)
    assert torch.equal(short, x[stays].view(batch, 5 + kept.shape[1], 3))
    assert cut.tokens(layout) == cut.key_tokens(layout) == short.shape[1]
    assert torch.equal(cut.gather(x[:, None], layout, 2)[:, 0], short)
    assert torch.equal(cut.scatter(short, torch.zeros_like(x), layout), x * stays[..., None])
    square = torch.rand(layout.tokens, layout.tokens)
    for mask in (square, square[None], square[None, None]):
        both = cut.shorten(mask, layout, (-2, -1))
        for row, own in zip(both.reshape(batch, *both.shape[-2:]), stays, strict=True):
            assert torch.equal(row, square[own][:, own])


@pytest.mark.parametrize(  # text that leaves is at one end
    ("order", "with_text"),
    [(order, leaves) for order in ORDERS for leaves in (False, True)[: 2 - (order[1] == "text")]],
)
def test_what_stands_in_is_behind_the_own_keys(order, with_text):
    """A sequence written out by hand; of a text that leaves, two rows stay, which are no keys."""
    layout = Layout(3, (1, 4), ((1, 5),), order)
    named = {"text": "xyz", "target": "abcd", "references": "01234"}
    sequence = "".join(named[part] for part in order)
    kept = torch.tensor([[1, 3], [0, 4]])
    cut = Cut(text=2 if with_text else None, stand_in=kept, stand_in_text=with_text)
    without = [part for part in order if part != "references"]
    rows = "".join(named[part][:2] if part == "text" and with_text else named[part] for part in without)
    own = "abcd" if with_text else "".join(named[part] for part in without)
    assert {"".join(sequence[i] for i in row) for row in cut.rows(layout).tolist()} == {rows}
    behind = "xyz" * with_text
    keys = ["".join(sequence[i] for i in row) for row in cut.keys(layout).tolist()]
    assert keys == [own + behind + "13", own + behind + "04"]
    assert (cut.tokens(layout), cut.key_tokens(layout)) == (len(rows), len(keys[0]))
    assert rows[cut.own_keys(layout, len(rows))] == own


def test_what_runs_over_no_tokens_stays():
    cut, layout = Cut(kept=torch.tensor([[0]])), Layout(2, (1, 3), ((2, 2),))
    x = torch.rand(1, 4, 5)
    assert cut.shorten(x, layout, (1, -1)) is x
    assert cut.shorten(torch.rand(1, 7, 3), layout, (1,)).shape == (1, 4, 3)  # images alone


def test_heads_that_share_their_keys_are_told_apart():
    q, k = torch.rand(1, 6, 4, 2), torch.rand(1, 2, 4, 2)
    seen = Attention((0, 0), q, k, k, 6, None, splits_later=False)
    _, many, _ = seen.heads_first()
    assert torch.equal(many, k.repeat_interleave(3, 1))
    flat = Attention((0, 0), *(x.transpose(1, 2).flatten(2) for x in (q, q, q)), 6, None, splits_later=True)
    assert all(torch.equal(x, q) for x in flat.heads_first())


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (2, 6, 4, 4)])
def test_masks_are_read_as_comfyui_does(shape):
    x = torch.rand(1, 6, 4, 2)
    four = Attention((0, 0), x, x, x, 6, torch.rand(shape), splits_later=False).four_dims()
    assert four.ndim == 4 and four.expand(2, 6, 4, 4).shape == (2, 6, 4, 4)
