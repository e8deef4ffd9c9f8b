"""Context sensitivity (Eq. 4), the Top-M (Eq. 5), and the merging of calibrations."""

import math

import pytest
import torch

from topi_core.calibration import Calibration, Listening, sensitivity, sensitivity_plain, top_layers
from topi_core.influence import attention_received
from topi_core.layout import Layout

LAYOUT = Layout(3, (4, 5), ((2, 3), (3, 3)))


def qk(rows=2, heads=3, width=8):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(rows, heads, LAYOUT.tokens, width, generator=generator).double() for _ in range(2)]


def test_sensitivity_equals_equation_4_written_out():
    q, k = qk()
    expected = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(LAYOUT.target.start, LAYOUT.target.stop):
                weights = [math.exp(q[b, h, i] @ k[b, h, j] / 8**0.5) for j in range(LAYOUT.tokens)]
                expected[b] += sum(weights[LAYOUT.reference]) / sum(weights)
    torch.testing.assert_close(sensitivity_plain(q, k, LAYOUT), expected)
    share = sensitivity(attention_received(q, k, LAYOUT), LAYOUT)
    torch.testing.assert_close(share * 3 * LAYOUT.target_tokens, expected)


def test_a_mask_is_respected():
    q, k = qk()
    mask = torch.randn(2, 1, LAYOUT.tokens, LAYOUT.tokens, generator=torch.Generator().manual_seed(1)).double()
    share = sensitivity(attention_received(q, k, LAYOUT, mask), LAYOUT)
    torch.testing.assert_close(share * 3 * LAYOUT.target_tokens, sensitivity_plain(q, k, LAYOUT, mask))


def test_patterns_whose_answer_is_known_by_hand():
    """2 text, 4 target and 4 context tokens. Equal attention for all: 4 of 10. One context token six times as strong as
    each of the others: 6 + 3 of 15. A text token that outweighs everything: nothing is left."""
    layout = Layout(2, (2, 2), ((1, 4),))
    q = torch.ones(1, 2, 10, 1, dtype=torch.float64)
    layers = {"equal": {}, "six times": {7: math.log(6)}, "text": {0: 100.0}}
    shares = []
    for strong in layers.values():
        k = torch.zeros(1, 2, 10, 1, dtype=torch.float64)
        for token, logit in strong.items():
            k[:, :, token] = logit
        shares.append(sensitivity(attention_received(q, k, layout), layout))
    torch.testing.assert_close(torch.cat(shares), torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64))
    assert top_layers(torch.cat(shares), 2) == (0, 1)
    assert top_layers(torch.cat(shares), 1) == (1,)


def test_top_m_of_equal_layers_takes_the_first_and_refuses_what_is_not_there():
    assert top_layers(torch.tensor([0.1, 0.5, 0.5, 0.5]), 2) == (1, 2)
    for m in (0, 5):
        with pytest.raises(ValueError, match=rf"top_m must be in \[1, 4\] for a model of 4 layers, got {m}"):
            top_layers(torch.zeros(4), m)


def rows(pairs, depth=7):
    """Their values depend on the pair alone."""
    return [(p, torch.rand(depth, generator=torch.Generator().manual_seed(p), dtype=torch.float64), 20) for p in pairs]


def test_two_runs_of_24_pairs_are_one_of_48_bit_by_bit():
    every = Calibration.of(7, rows(range(48)))
    first, second = Calibration.of(7, rows(range(0, 48, 2))), Calibration.of(7, rows(range(47, 0, -2)))
    for both in (first.merge(second), second.merge(first)):
        assert both.equals(every)
        assert torch.equal(both.mean(), every.mean()) and torch.equal(both.deviation(), every.deviation())
    one_by_one = Calibration.of(7)
    for row in rows(range(48)):
        one_by_one = one_by_one.merge(Calibration.of(7, [row]))
    assert one_by_one.equals(every)


def test_a_pair_counts_once_and_its_newer_measure_stays():
    old, new = Calibration.of(2, rows([1, 2, 3], 2)), Calibration.of(2, [(2, torch.tensor([0.25, 0.75]), 4)])
    both = old.merge(new)
    assert both.pairs.tolist() == [1, 2, 3]
    assert both.sensitivity[1].tolist() == [0.25, 0.75] and both.steps.tolist() == [20, 4, 20]
    assert old.merge(old).equals(old)
    with pytest.raises(ValueError, match="of 2 and of 3 layers cannot be merged"):
        old.merge(Calibration.of(3))


def test_spread_by_hand():
    values = [(0, [0.1, 0.5, 0.9]), (1, [0.3, 0.5, 0.4])]
    calibration = Calibration.of(3, [(pair, torch.tensor(row), 1) for pair, row in values])
    torch.testing.assert_close(calibration.mean().float(), torch.tensor([0.2, 0.5, 0.65]))
    torch.testing.assert_close(calibration.deviation().float(), torch.tensor([0.02, 0, 0.125]).sqrt())
    assert calibration.top(1) == (2,)
    assert calibration.agreement((2,)) == (0.5,)
    assert calibration.agreement((1, 2)) == (1.0, 1.0)
    assert Calibration.of(3, [(0, torch.tensor([0.1, 0.5, 0.9]), 1)]).deviation().tolist() == [0, 0, 0]


def test_a_run_averages_the_calls_of_a_step_then_the_steps():
    run = Listening(2, pairs=(5, -3))
    for step, values in ((0, 0.2), (0, 0.4), (3, 0.9)):  # a sampler, or guidance, that calls twice in the first step
        run.add(step, torch.tensor([[values, 0.0], [values / 2, 1.0]]))
    calibration = run.calibration()
    assert calibration.pairs.tolist() == [-3, 5] and calibration.steps.tolist() == [2, 2]
    torch.testing.assert_close(calibration.sensitivity.float(), torch.tensor([[0.3, 1.0], [0.6, 0.0]]))
    with pytest.raises(ValueError, match="no reference reached the model"):
        Listening(2, pairs=(1,)).calibration()
