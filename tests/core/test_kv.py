"""Keys and values that are kept from anchor to anchor."""

import pytest
import torch

from topi_core.kv import Extrapolation, KVCache, KVStore, extend, extend_mask, extrapolation_weight

CPU = torch.device("cpu")


def got(cache: KVCache, site, sigma: float, text: bool = False) -> list[torch.Tensor]:
    """Keys and values as an attention sees them."""
    return [extend(each.held[0], slice(0, 0), [each]) for each in cache.read(site, CPU, sigma, text)]


def held(*args, step=0, sigma=1.0, cache=None, extrapolate=True, **kwargs) -> KVCache:
    """A cache after an anchor whose first attention got these arguments of `put`."""
    cache = cache or KVCache(**kwargs)
    cache.open(step, sigma, extrapolate)
    cache.put((0, 0), *args)
    return cache


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 4, generator=generator) for _ in range(2)]


def test_a_cache_holds_copies(pair):
    cache = held(*pair)
    expected = [x.clone() for x in pair]
    for x in pair:
        x.zero_()
    assert all(map(torch.equal, got(cache, (0, 0), 1.0), expected))


def test_shrinking_keeps_each_images_own_tokens(pair):
    cache = held(*pair)
    cache.put((0, 1), *(x.transpose(1, 2).flatten(2) for x in pair))  # heads that are split later
    kept = torch.tensor([[0, 2, 5], [1, 2, 6]])
    cache.shrink(kept)
    for heads_first, flat, x in zip(*(got(cache, (0, i), 1.0) for i in (0, 1)), pair, strict=True):
        for image, own in enumerate(kept):
            assert torch.equal(heads_first[image], x[image][:, own])
            assert torch.equal(flat[image], x[image][:, own].transpose(0, 1).flatten(1))


def test_keeping_every_token_changes_nothing(pair):
    cache = held(*pair)
    cache.shrink(torch.arange(7).expand(2, 7))
    assert all(map(torch.equal, got(cache, (0, 0), 1.0), pair))
    assert cache.nbytes == sum(x.nbytes for x in pair)


@pytest.mark.parametrize("flat", [False, True], ids=["heads first", "heads split later"])
def test_extending_equals_concatenating(pair, flat):
    k, cached = pair
    if flat:
        k, cached = (x.transpose(1, 2).flatten(2) for x in pair)
    as_it_was = extend(k, slice(0, 7), [Extrapolation((cached[:1],)), Extrapolation((cached[1:],))])
    assert torch.equal(as_it_was, torch.cat((k, cached), -2))
    ahead = extend(k, slice(0, 7), [Extrapolation((cached[:1],)), Extrapolation((cached[1:],), (k[1:],), 0.5)])
    assert torch.equal(ahead, torch.cat((k, torch.cat((cached[:1], cached[1:].add(k[1:], alpha=0.5)))), -2))


@pytest.mark.parametrize("before", [False, True], ids=["as it was", "forecast"])
def test_heads_that_share_their_keys_are_held_once(before):
    few = torch.arange(48.0).view(2, 2, 3, 4)
    old = few / 2
    cache = held(*(old.repeat_interleave(3, 1),) * 2, key_heads=2)
    held(*(few.repeat_interleave(3, 1),) * 2, step=5, sigma=0.75, cache=cache, extrapolate=before)
    assert cache.nbytes == (2 if before else 1) * 2 * few.nbytes
    own = torch.randn(2, 6, 5, 4)
    k, _ = cache.read((0, 0), CPU, 0.5)
    expected = few + (few - old) * before
    assert torch.equal(extend(own, slice(0, 5), [k]), torch.cat((own, expected.repeat_interleave(3, 1)), -2))


def test_what_is_reused_is_hidden_by_no_mask():
    own = torch.tensor([[True, False]])
    assert extend_mask(own, 2, slice(0, 2), 3).tolist() == [[True, False, True, True, True]]
    assert extend_mask(own.float(), 2, slice(0, 2), 3).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert extend_mask(own, 2, slice(1, 2), 3).tolist() == [[False, True, True, True]]
    whole = torch.zeros(1, 5)
    assert extend_mask(whole, 2, slice(0, 2), 3) is whole


def test_text_before_the_references_stays_and_is_forecast_with_it(pair):
    """Taken from both ends of a sequence; without it the cache is that of the references alone."""
    k, v = pair
    cache = held(k / 2, v / 2, slice(0, 2), slice(4, 7))
    cache.shrink(torch.tensor([[0, 2], [1, 2]]))
    assert cache.text == 2
    for y, x in zip(got(cache, (0, 0), 1.0, True), pair, strict=True):
        assert torch.equal(y, torch.stack((x[0, :, [0, 1, 4, 6]], x[1, :, [0, 1, 5, 6]])) / 2)
    held(k, v, slice(0, 2), slice(4, 7), step=5, sigma=0.75, cache=cache)
    cache.shrink(torch.tensor([[0, 1], [0, 1]]))
    for y, x in zip(got(cache, (0, 0), 0.5, True), pair, strict=True):
        torch.testing.assert_close(y[0], x[0, :, [0, 1, 4, 5]] * torch.tensor([1.5, 1.5, 1.5, 1.0])[:, None])
        torch.testing.assert_close(y[1], x[1, :, [0, 1, 4, 5]] * torch.tensor([1.5, 1.5, 1.0, 1.5])[:, None])
    for alone, both in zip(got(cache, (0, 0), 0.5), got(cache, (0, 0), 0.5, True), strict=True):
        assert torch.equal(alone, both[..., 2:, :])


def test_a_prompt_of_another_length_is_not_compared_with(pair):
    cache = held(*pair, slice(0, 2), slice(4, 7))
    held(*pair, slice(0, 3), slice(4, 7), step=5, sigma=0.75, cache=cache)
    assert not cache.changes and cache.text == 3


def test_offloaded_to_the_host_it_is_the_same(pair):
    cache = held(*pair, location="host")
    assert all(map(torch.equal, got(cache, (0, 0), 1.0), pair))


def test_a_forecast_follows_the_straight_line_through_two_anchors_no_further_than_it_is_long(pair):
    """x(sigma) = x(1) + (1 - sigma) slope, known at 1 and at 0.75."""
    slopes = [torch.randn_like(x) for x in pair]

    def at(sigma):
        return [x + (1 - sigma) * slope for x, slope in zip(pair, slopes, strict=True)]

    cache = held(*at(1.0))
    held(*at(0.75), step=5, sigma=0.75, cache=cache)
    assert cache.nbytes == 2 * sum(x.nbytes for x in pair)
    for sigma, reached in ((0.75, 0.75), (0.6, 0.6), (0.5, 0.5), (0.1, 0.5), (0.9, 0.75)):
        for x, expected in zip(got(cache, (0, 0), sigma), at(reached), strict=True):
            torch.testing.assert_close(x, expected)


def test_a_forecast_leaves_tokens_without_a_past_as_they_are(pair):
    cache = held(*(torch.zeros_like(x) for x in pair))
    cache.shrink(torch.tensor([[0, 2, 5], [1, 2, 6]]))
    held(*pair, step=5, sigma=0.75, cache=cache)
    cache.shrink(torch.tensor([[2, 3], [0, 6]]))
    for y, x in zip(got(cache, (0, 0), 0.5), pair, strict=True):
        assert torch.equal(y[0], torch.stack((2 * x[0, :, 2], x[0, :, 3]), 1))
        assert torch.equal(y[1], torch.stack((x[1, :, 0], 2 * x[1, :, 6]), 1))


def test_how_far_a_forecast_goes():
    assert extrapolation_weight(-0.1, -0.2) == 0.5
    assert extrapolation_weight(-0.5, -0.2) == 1
    assert extrapolation_weight(0.1, -0.2) == 0
    assert extrapolation_weight(-0.1, 0.0) == 0  # two anchors at one and the same sigma


def test_an_anchor_that_never_comes_changes_nothing(pair):
    """A cache inside of ToPi may keep the network from running."""
    cache = held(*pair)
    cache.open(5, 0.75, True)
    assert cache.step == 0 and all(map(torch.equal, got(cache, (0, 0), 0.75), pair))


def test_a_second_call_of_an_anchor_takes_the_place_of_the_first(pair):
    """It is the first one that found what changed since the anchor before."""
    cache = held(*(torch.zeros_like(x) for x in pair))
    held(*pair, step=5, sigma=0.75, cache=cache)
    held(*(2 * x for x in pair), step=5, sigma=0.7, cache=cache)
    for y, x in zip(got(cache, (0, 0), 0.45), pair, strict=True):
        torch.testing.assert_close(y, 2 * x + x)


def test_an_anchor_that_does_not_reach_every_attention_says_so(pair):
    cache = held(*pair)
    cache.put((1, 0), *pair)
    assert cache.missing(2) == [] and cache.missing(3) == [2]
    held(*pair, step=5, sigma=0.75, cache=cache)
    assert cache.missing(2) == [1] and set(cache.entries) == {(0, 0)}
    with pytest.raises(RuntimeError, match="saw no attention in layer 1"):
        cache.read((1, 0), CPU, 0.75)


def test_one_object_is_updated_in_place(pair):
    """From anchor to anchor: the change lies where the old keys and values lay."""
    store = KVStore(extrapolate=True)
    first = store.open(["cond"], 0, 1.0, 1.0, lambda size, back=0: "device")[0]
    first.put((0, 0), *pair)
    was = [x[0].data_ptr() for x in first.entries[0, 0]]
    second = store.open(["cond"], 5, 0.75, 1.0, lambda size, back=0: "device")[0]
    second.put((0, 0), *pair)
    assert second is first and [x[0].data_ptr() for x in first.changes[0, 0]] == was
