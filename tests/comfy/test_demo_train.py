"""What the demo model is trained on, and how its weights are kept."""

import itertools

import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file

from topi_demo import edits, text, train
from topi_demo.model import WEIGHTS


def test_every_kind_of_edit_is_trained():
    kinds = [kind for of in train.KINDS.values() for kind in of]
    assert sorted(kinds) == sorted(edits.GRAMMAR)
    for references, of in train.KINDS.items():
        assert all(edits.Edit(kind, {}).references == references for kind in of)


def test_the_same_seed_gives_the_same_stream():
    def some(seed):
        return list(itertools.islice(train.batches(seed, 4), 6))

    for one, again, other in zip(some(1), some(1), some(2), strict=True):
        assert torch.equal(one.target, again.target)
        assert torch.equal(one.tokens, again.tokens)
        assert torch.equal(one.weight, again.weight)
        assert one.target.shape != other.target.shape or not torch.equal(one.target, other.target)
        assert one.shapes.shape[1] == sum(r.shape[-1] * r.shape[-2] // 4 for r in one.references)


def test_drawn_by_other_processes():
    batches = list(itertools.islice(train.drawn(1, 2, 2, 2), 8))
    assert all(one is again for one, again in zip(batches[::2], batches[1::2], strict=True))
    assert torch.equal(batches[0].target, next(train.batches(1, 2)).target)


def test_older_weights_are_taken_up(monkeypatch):
    """Their words keep their vectors; words that they did not know are as new."""
    monkeypatch.setattr(comfy.model_management, "in_training", False)  # `new_model` sets it, for this test only
    tensors = load_file(WEIGHTS)
    name = train.TEXT_ENCODER + "word.weight"
    tensors[name] = tensors[name][:53]
    model, words = train.new_model(), text.TextEncoder()
    fresh = words.word.weight.detach().clone()
    train.restore(model, words, tensors)
    assert torch.equal(words.word.weight[:53], tensors[name].float())
    assert torch.equal(words.word.weight[53:], fresh[53:])
    stored = train.storable(model, words)
    assert all(torch.equal(stored[k], v) for k, v in tensors.items() if k != name)


@pytest.mark.parametrize("size", [7, 10, 100])
def test_pieces_join(tmp_path, size):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(70)))
    pieces = train.cut(file, size)
    assert b"".join(piece.read_bytes() for piece in pieces) == file.read_bytes()
    assert all(piece.stat().st_size <= size for piece in pieces)
