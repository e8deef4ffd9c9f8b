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


def test_a_resumed_run_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(comfy.model_management, "in_training", False)
    batches = list(itertools.islice(train.batches(0, 2), 2))
    first, again = (train.Training(WEIGHTS, 1e-3, "cpu", "float32") for _ in range(2))
    first.step(batches[0], torch.Generator().manual_seed(0), 0.5)
    first.save(tmp_path / "checkpoint")
    again.load(tmp_path / "checkpoint")
    losses = [t.step(batches[1], torch.Generator().manual_seed(1), 0.6) for t in (first, again)]
    assert losses[0] == losses[1]
    for t, name in ((first, "one"), (again, "two")):
        t.write(tmp_path / name, seed=0)
    one, two = (load_file(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one.keys() == load_file(WEIGHTS).keys()


def test_the_log_drops_what_is_done_again(tmp_path):
    file = tmp_path / "log"
    log = train.Log(file, 0)
    rows = [log.add(step, 0.1, step % 2, float(step % 2), 0.0) for step in range(1, 151)]
    assert [row["step"] for row in rows if row] == [50, 100, 150]
    assert rows[49]["loss"] == 0.5 and rows[49]["loss_1_references"] == 1.0
    train.Log(file, 120)
    assert len(file.read_text().splitlines()) == 2
    with pytest.raises(RuntimeError, match="not finite at step 3"):
        log.add(3, 0.1, 0, float("nan"), 0.0)


@pytest.mark.parametrize("size", [7, 10, 100])
def test_pieces_join(tmp_path, size):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(70)))
    pieces = train.cut(file, size)
    assert b"".join(piece.read_bytes() for piece in pieces) == file.read_bytes()
    assert all(piece.stat().st_size <= size for piece in pieces)
