"""What the merging baselines make of cases small enough to know the answer."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from bench.baselines.merging import (
    Groups,
    bipartite,
    detail,
    dynamic_ratio,
    facilities,
    grouped,
    medoids,
    nearest,
    shared_out,
    strided,
    structure,
    windows,
)
from bench.baselines.tokens import SDTM, grids_of, merging, span
from topi_core.layout import Layout
from topi_core.plan import Call, Cut, Plan

E = torch.eye(8)


def rows(*directions) -> torch.Tensor:
    """Hidden states [1, L, 8] along these axes; a pair (i, j, share) lies between two of them."""
    made = [E[d] if isinstance(d, int) else (1 - d[2]) * E[d[0]] + d[2] * E[d[1]] for d in directions]
    return torch.stack(made)[None] * torch.arange(1, len(made) + 1)[:, None]  # lengths do not matter


def test_windows_cover_each_grid_and_are_smaller_at_its_edges():
    some = windows(((3, 4), (2, 2)), 2)
    assert [index.tolist() for index in some] == [
        [[0, 1, 4, 5], [2, 3, 6, 7], [12, 13, 14, 15]],
        [[8, 9], [10, 11]],
    ]
    assert sorted(torch.cat([index.flatten() for index in windows(((5, 7), (3, 9)), 4)]).tolist()) == list(range(62))


def test_a_merged_token_is_the_mean_of_its_members_and_they_get_copies():
    x = torch.randn(2, 5, 3)
    groups = grouped(5, torch.tensor([[1, 4], [0, 2]]), torch.tensor([[0, 0], [3, 4]]))
    assert groups.kept.tolist() == [[0, 2, 3], [1, 3, 4]] and groups.into.tolist() == [[0, 0, 1, 2, 0], [1, 0, 2, 1, 2]]
    merged = groups.merge(x)
    assert torch.allclose(merged[0, 0], x[0, [0, 1, 4]].mean(0)) and torch.equal(merged[0, 1:], x[0, [2, 3]])
    assert torch.allclose(merged[1], torch.stack([x[1, 1], x[1, [0, 3]].mean(0), x[1, [2, 4]].mean(0)]))
    for row, own in enumerate(groups.into):
        assert torch.equal(groups.unmerge(merged)[row], merged[row, own])


def test_what_was_dropped_goes_into_the_most_similar_kept_token():
    x = rows(0, 1, (0, 1, 0.4), 2, (1, 2, 0.7), (2, 1, 0.4))
    groups = nearest(x, torch.tensor([[0, 1, 3]]))
    assert groups.kept.tolist() == [[0, 1, 3]] and groups.into.tolist() == [[0, 1, 0, 2, 2, 2]]


def test_the_sources_most_like_a_destination_of_their_own_image_go():
    """Two images of 2 x 4 and 1 x 2 tokens: the first tokens of their windows stay, and three others go."""
    x = rows(0, (0, 1, 0.45), 1, (1, 7, 0.3), (1, 0, 0.1), 7, 7, (7, 0, 0.45), 5, (5, 1, 0.2))
    destinations, sources = strided(x, ((2, 4), (1, 2)), 2)
    assert [index.tolist() for index in destinations] == [[[0, 2]], [[8]]]
    assert [index.tolist() for index in sources] == [[[1, 3, 4, 5, 6, 7]], [[9]]]
    groups = bipartite(x, destinations, sources, 3)
    assert groups.kept.tolist() == [[0, 1, 2, 5, 6, 7, 8]]
    into = groups.kept[0, groups.into[0]].tolist()
    assert into == [0, 1, 2, 2, 2, 5, 6, 7, 8, 8]  # 9 is like 8, though 2 lies nearer to it than other tokens do


def test_facilities_are_the_medoids_of_clusters():
    """Three clusters at right angles to one another, of which each has one token in its middle."""
    angles = torch.tensor([-0.2, 0.0, 0.2]).repeat(3)
    x = torch.zeros(9, 6)
    for i, angle in enumerate(angles):
        x[i, 2 * (i // 3)], x[i, 2 * (i // 3) + 1] = angle.cos(), angle.sin()
    assert medoids(x @ x.T, 3).tolist() == [1, 4, 7]
    shuffled = x[[2, 0, 4, 1, 8, 5, 7, 3, 6]]
    assert medoids(torch.stack([x @ x.T, shuffled @ shuffled.T]), 3).tolist() == [[1, 4, 7], [2, 3, 6]]


def test_the_greedy_choice_is_near_the_best_one():
    """Greedily 1 - 1/e of the best value at least, where similarities are moved to start at 0."""
    x = torch.nn.functional.normalize(torch.randn(10, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    similarity = x @ x.T + 1
    best = max(similarity[:, list(some)].amax(1).sum() for some in combinations(range(10), 3))
    assert similarity[:, medoids(similarity - 1, 3)].amax(1).sum() >= (1 - 1 / math.e) * best


def test_shares_merge_by_means_and_their_transpose_gives_them_back():
    x, grids = torch.randn(2, 20, 6), ((4, 5),)
    chosen = facilities(x, grids, 4, 0.5)
    assert [index.shape for index in chosen] == [(2, 1, 8), (2, 1, 2)]  # of 16 tokens, and of 4 at the edge
    shares = shared_out(x, grids, 4, chosen, 0.5)
    assert shares.kept.tolist() == [sorted(row) for row in torch.cat([i.flatten(1) for i in chosen], 1).tolist()]
    dense = torch.zeros(2, 10, 20)  # [B, K, L]
    for tokens, places, part in shares.parts:
        for b in range(2):
            dense[b][places[b, 0][:, None], tokens[0]] = part[b, 0]
    assert torch.allclose(dense.sum(1), torch.ones(2, 20))
    merged = shares.merge(x)
    assert torch.allclose(merged, dense / dense.sum(-1, keepdim=True) @ x, atol=1e-6)
    assert torch.allclose(shares.unmerge(merged), dense.mT @ merged, atol=1e-6)


def test_sharp_shares_are_groups():
    x, grids = rows(0, 1, 0, 1, 2, 2), ((2, 3),)
    shares = shared_out(x, grids, 4, facilities(x, grids, 4, 0.5), 1e-3)
    assert shares.kept.tolist() == [[0, 1, 4]]
    groups = Groups(shares.kept, torch.tensor([[0, 1, 0, 1, 2, 2]]))
    assert torch.allclose(shares.merge(x), groups.merge(x))
    assert torch.allclose(shares.unmerge(shares.merge(x)), groups.unmerge(groups.merge(x)))


def test_the_dynamic_ratio_falls_from_a_half_to_a_tenth():
    assert dynamic_ratio(0, 0.3, 0.2) == pytest.approx(0.5)
    assert dynamic_ratio(1, 0.3, 0.2) == pytest.approx(0.1)
    assert dynamic_ratio(0.5, 0.3, 0.2) == pytest.approx(0.1 + 0.4 * math.sqrt(0.5))


def test_structure_merges_uniform_windows_and_prefers_old_ones():
    """2 x 6 tokens: the middle window is one direction, the first nearly, the last not at all."""
    x = rows(0, 0, 1, 1, 2, 3, 0, (0, 5, 0.1), 1, 1, 4, 5)
    young = torch.zeros(1, 12)
    one, two = (structure(x, (2, 6), young, count, 0.05) for count in (1, 2))
    assert one.kept.tolist() == [[0, 1, 2, 4, 5, 6, 7, 10, 11]]
    assert two.kept[0, two.into[0]].tolist() == [0, 0, 2, 2, 4, 5, 0, 0, 2, 2, 10, 11]
    old = young.clone()
    old[:, [0, 1, 6, 7]] = 3
    assert structure(x, (2, 6), old, 1, 0.05).kept.tolist() == [[0, 2, 3, 4, 5, 8, 9, 10, 11]]


def test_detail_merges_into_the_oldest_token_of_a_window():
    x = rows(0, (0, 1, 0.1), 2, 3, (0, 1, 0.2), 5, (2, 3, 0.3), 4)
    age = torch.tensor([[0.0, 2, 0, 1, 0, 1, 0, 0]])
    groups = detail(x, (2, 4), age, 2)
    assert groups.kept[0, groups.into[0]].tolist() == [1, 1, 2, 3, 1, 5, 6, 7]


@pytest.mark.parametrize(
    "order", [("text", "target", "references"), ("text", "references", "target"), ("target", "references", "text")]
)
@pytest.mark.parametrize("of", ["target", "references", "images"])
def test_a_cut_that_merges_keeps_what_stands_around(order, of):
    """Rows, hidden states and counts, on the whole sequence and on what reuse leaves of it."""
    layout = Layout(3, (2, 2), ((1, 4),), order)
    bases = [Cut(), Cut(2, None, torch.arange(4)[None], True)] if of == "target" else [Cut()]
    for base in bases:
        at, x = span(base, of, layout), torch.randn(2, layout.tokens, 3)
        length, plain = at.stop - at.start, base.rows(layout).expand(2, -1)
        assert length == sum(math.prod(grid) for grid in grids_of(layout, of))
        groups = grouped(length, torch.tensor([[1], [2]]), torch.tensor([[0], [3]]))
        cut = merging(base, of, 1, lambda _, groups=groups: groups)
        short = cut.gather(x, layout)
        assert short.shape[1] == cut.tokens(layout) == base.tokens(layout) - 1
        expected = torch.stack(
            [torch.cat([row[: at.start + i], row[at.start + i + 1 :]]) for row, i in zip(plain, (1, 2), strict=True)]
        )
        assert torch.equal(cut.rows(layout), expected)
        assert cut.keys(layout).shape[1] == cut.key_tokens(layout) == base.key_tokens(layout) - 1
        gone = [plain[row, at.start + i].item() for row, i in enumerate((1, 2))]
        assert all(token not in own for token, own in zip(gone, cut.keys(layout).tolist(), strict=True))
        whole = base.gather(x, layout)
        assert torch.allclose(cut.unmerge(short, layout), whole, atol=1e-6)  # blocks that change nothing
        assert torch.allclose(cut.unmerge(short + 1, layout)[:, at], whole[:, at] + 1, atol=1e-6)


def test_images_that_do_not_stand_together_are_refused():
    layout = Layout(3, (2, 2), ((1, 4),), ("target", "text", "references"))
    with pytest.raises(ValueError, match="stand together"):
        span(Cut(), "images", layout)


CALL = Call(1, 0.5, Layout(2, (2, 4), ((1, 2),)), ("a prompt",), 1, torch.device("cpu"), steps=4)


def protected(sdtm: SDTM, change: torch.Tensor) -> None:
    """As if a protected step had told this change of each token."""
    sdtm.change[CALL.conds] = change
    sdtm.age[CALL.conds] = torch.zeros(1, 8)


def test_sdtm_mixes_the_kept_change_into_what_was_merged():
    """One window of two is merged: its tokens get a tenth of the new change and nine tenths of their own old one."""
    sdtm, plan, kept = SDTM("target", 3 / 8, deviation=0.0), Plan(), torch.randn(1, 8, 8)
    protected(sdtm, kept)
    assert sdtm.apply(plan, CALL) and plan.kind == "pruned" and plan.cut.tokens(CALL.layout) == 12 - 3
    x = torch.cat([torch.randn(1, 2, 8), rows(0, 0, 1, 2, 0, 0, 3, 4), torch.randn(1, 2, 8)], 1)
    short = plan.cut.gather(x, CALL.layout)
    assert plan.cut.rows(CALL.layout).tolist() == [[0, 1, 2, 4, 5, 8, 9, 10, 11]]
    (behind,) = plan.output
    out, before = behind(short + 1, CALL.layout)[0, 2:10], x[0, 2:10]
    merged, others = [0, 1, 4, 5], [2, 3, 6, 7]
    assert torch.allclose(out[others], before[others] + 1)
    assert torch.allclose(out[merged], before[merged] + 0.1 + 0.9 * kept[0, merged], atol=1e-6)
    sdtm.commit(plan, CALL, out)
    assert sdtm.age[CALL.conds].tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_sdtm_learns_at_a_protected_step():
    sdtm, plan, x = SDTM("target", 0.3), Plan(), torch.randn(1, 12, 8)
    assert sdtm.apply(plan, replace(CALL, step=3)) and plan.cut is None and plan.kind == "full"
    (see,), (behind,) = plan.inputs[0], plan.output
    see(0, x, CALL.layout)
    assert behind(x * 3, CALL.layout) is not None
    sdtm.commit(plan, CALL, x)
    assert torch.allclose(sdtm.change[CALL.conds], 2 * x[:, 2:10])
    assert sdtm.free() and not sdtm.free()


def test_sdtm_must_begin_where_the_cut_that_it_merges_begins():
    sdtm = SDTM("target", 0.3, beside=True)
    protected(sdtm, torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="first_layer must be 2"):
        sdtm.apply(Plan("pruned", Cut(kept=torch.zeros(1, 1, dtype=torch.long)), first_layer=2), CALL)
