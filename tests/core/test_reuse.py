"""Keys and values that are kept, and what reusing them costs."""

import pytest
import torch

from topi_core.config import Settings
from topi_core.cost import call_flops, layer_flops, speedup
from topi_core.reuse import ContextCache, Line, extend, extend_mask, forecast_weight
from topi_core.trace import Run, Step

CPU = torch.device("cpu")


def got(cache: ContextCache, place, sigma: float, text: bool = False) -> list[torch.Tensor]:
    """Keys and values as an attention sees them."""
    return [extend(line.x[..., :0, :], [line]) for line in cache.get(place, CPU, sigma, text)]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 4, generator=generator) for _ in range(2)]


def test_a_cache_holds_copies(pair):
    cache = ContextCache(0, 1.0)
    cache.put((0, 0), *pair)
    expected = [x.clone() for x in pair]
    for x in pair:
        x.zero_()
    assert all(map(torch.equal, got(cache, (0, 0), 1.0), expected))


def test_shrinking_keeps_each_images_own_tokens(pair):
    cache = ContextCache(0, 1.0)
    cache.put((0, 0), *pair)
    cache.put((0, 1), *(x.transpose(1, 2).flatten(2) for x in pair))  # heads that are split later
    kept = torch.tensor([[0, 2, 5], [1, 2, 6]])
    cache.shrink(kept)
    for heads_first, flat, x in zip(*(got(cache, (0, i), 1.0) for i in (0, 1)), pair, strict=True):
        for image, own in enumerate(kept):
            assert torch.equal(heads_first[image], x[image][:, own])
            assert torch.equal(flat[image], x[image][:, own].transpose(0, 1).flatten(1))


def test_keeping_every_token_changes_nothing(pair):
    cache = ContextCache(0, 1.0)
    cache.put((0, 0), *pair)
    cache.shrink(torch.arange(7).expand(2, 7))
    assert all(map(torch.equal, got(cache, (0, 0), 1.0), pair))
    assert cache.nbytes == sum(x.nbytes for x in pair)


@pytest.mark.parametrize("flat", [False, True], ids=["heads first", "heads split later"])
def test_extending_equals_concatenating(pair, flat):
    k, cached = pair
    if flat:
        k, cached = (x.transpose(1, 2).flatten(2) for x in pair)
    assert torch.equal(extend(k, [Line(cached[:1]), Line(cached[1:])]), torch.cat((k, cached), -2))
    ahead = extend(k, [Line(cached[:1]), Line(cached[1:], k[1:], 0.5)])
    assert torch.equal(ahead, torch.cat((k, torch.cat((cached[:1], cached[1:].add(k[1:], alpha=0.5)))), -2))


@pytest.mark.parametrize("before", [False, True], ids=["as it was", "forecast"])
def test_heads_that_share_their_keys_are_held_once(before):
    few = torch.arange(48.0).view(2, 2, 3, 4)
    first, old = ContextCache(0, 1.0, key_heads=2), few / 2
    first.put((0, 0), *(old.repeat_interleave(3, 1),) * 2)
    cache = ContextCache(5, 0.75, key_heads=2, before=first if before else None)
    cache.put((0, 0), *(few.repeat_interleave(3, 1),) * 2)
    assert cache.nbytes == (2 if before else 1) * 2 * few.nbytes
    own = torch.randn(2, 6, 5, 4)
    k, _ = cache.get((0, 0), CPU, 0.5)
    expected = few + (few - old) * before
    assert torch.equal(extend(own, [k]), torch.cat((own, expected.repeat_interleave(3, 1)), -2))


def test_what_is_reused_is_hidden_by_no_mask():
    own = torch.tensor([[True, False]])
    assert extend_mask(own, 2, slice(0, 2), 3).tolist() == [[True, False, True, True, True]]
    assert extend_mask(own.float(), 2, slice(0, 2), 3).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert extend_mask(own, 2, slice(1, 2), 3).tolist() == [[False, True, True, True]]
    whole = torch.zeros(1, 5)
    assert extend_mask(whole, 2, slice(0, 2), 3) is whole


def test_text_before_the_context_stays_and_is_forecast_with_it(pair):
    """Taken from both ends of a sequence; without it the cache is that of the context alone."""
    k, v = pair
    first, second = ContextCache(0, 1.0), None
    first.put((0, 0), k / 2, v / 2, slice(0, 2), slice(4, 7))
    first.shrink(torch.tensor([[0, 2], [1, 2]]))
    assert first.text == 2
    for y, x in zip(got(first, (0, 0), 1.0, True), pair, strict=True):
        assert torch.equal(y, torch.stack((x[0, :, [0, 1, 4, 6]], x[1, :, [0, 1, 5, 6]])) / 2)
    second = ContextCache(5, 0.75, before=first)
    second.put((0, 0), k, v, slice(0, 2), slice(4, 7))
    second.shrink(torch.tensor([[0, 1], [0, 1]]))
    for y, x in zip(got(second, (0, 0), 0.5, True), pair, strict=True):
        torch.testing.assert_close(y[0], x[0, :, [0, 1, 4, 5]] * torch.tensor([1.5, 1.5, 1.5, 1.0])[:, None])
        torch.testing.assert_close(y[1], x[1, :, [0, 1, 4, 5]] * torch.tensor([1.5, 1.5, 1.0, 1.5])[:, None])
    for alone, both in zip(got(second, (0, 0), 0.5), got(second, (0, 0), 0.5, True), strict=True):
        assert torch.equal(alone, both[..., 2:, :])


def test_a_prompt_of_another_length_is_not_compared_with(pair):
    first = ContextCache(0, 1.0)
    first.put((0, 0), *pair, slice(0, 2), slice(4, 7))
    second = ContextCache(5, 0.75, before=first)
    second.put((0, 0), *pair, slice(0, 3), slice(4, 7))
    assert not second.changes and not first.entries and second.text == 3


def test_offloaded_to_the_host_it_is_the_same(pair):
    cache = ContextCache(0, 1.0, offload=True)
    cache.put((0, 0), *pair)
    assert all(map(torch.equal, got(cache, (0, 0), 1.0), pair))


def test_a_forecast_follows_the_straight_line_through_two_anchors_no_further_than_it_is_long(pair):
    """x(sigma) = x(1) + (1 - sigma) slope, known at 1 and at 0.75."""
    slopes = [torch.randn_like(x) for x in pair]

    def at(sigma):
        return [x + (1 - sigma) * slope for x, slope in zip(pair, slopes, strict=True)]

    first = ContextCache(0, 1.0)
    first.put((0, 0), *at(1.0))
    second = ContextCache(5, 0.75, before=first)
    second.put((0, 0), *at(0.75))
    assert not first.entries and second.nbytes == 2 * sum(x.nbytes for x in pair)
    for sigma, reached in ((0.75, 0.75), (0.6, 0.6), (0.5, 0.5), (0.1, 0.5), (0.9, 0.75)):
        for x, expected in zip(got(second, (0, 0), sigma), at(reached), strict=True):
            torch.testing.assert_close(x, expected)


def test_a_forecast_leaves_tokens_without_a_past_as_they_are(pair):
    first = ContextCache(0, 1.0)
    first.put((0, 0), *(torch.zeros_like(x) for x in pair))
    first.shrink(torch.tensor([[0, 2, 5], [1, 2, 6]]))
    second = ContextCache(5, 0.75, before=first)
    second.put((0, 0), *pair)
    second.shrink(torch.tensor([[2, 3], [0, 6]]))
    for y, x in zip(got(second, (0, 0), 0.5), pair, strict=True):
        assert torch.equal(y[0], torch.stack((2 * x[0, :, 2], x[0, :, 3]), 1))
        assert torch.equal(y[1], torch.stack((x[1, :, 0], 2 * x[1, :, 6]), 1))


def test_how_far_a_forecast_goes():
    assert forecast_weight(-0.1, -0.2) == 0.5
    assert forecast_weight(-0.5, -0.2) == 1
    assert forecast_weight(0.1, -0.2) == 0
    assert forecast_weight(-0.1, 0.0) == 0  # two anchors at one and the same sigma


def test_a_reused_step_costs_its_rows_and_its_keys():
    """By hand, for one layer of width 2: 100 tokens, of which 40 are context and 10 are kept."""
    assert layer_flops(60, 2, keys=70) == 4 * 60 * 70 * 2 + 24 * 60 * 4
    run = Run("flux1", Settings(depth=3, layers=(1,), front_layers=2, mode="reuse"), hidden=2)
    for i, (kind, tokens, keys) in enumerate([("anchor", 100, None), ("reused", 60, 70)]):
        run.steps.append(Step(i, 1.0, kind, tokens, 1.0, keys, *call_flops(run, kind, 100, tokens, keys)))
    assert speedup(run) == pytest.approx(2 * layer_flops(100, 2) / (layer_flops(100, 2) + layer_flops(60, 2, keys=70)))
