"""The scores that the benchmark compares influence with."""

import torch

from bench.baselines.scorers import random_score, similarity
from topi_core.layout import Layout

LAYOUT = Layout(3, (4, 5), ((2, 3), (3, 3)))


def test_similarity_follows_the_direction_of_the_target():
    hidden = torch.zeros(1, LAYOUT.tokens, 4)
    hidden[:, LAYOUT.target, 0] = 5.0
    hidden[:, LAYOUT.reference, 1] = 1.0
    hidden[0, LAYOUT.reference.start + 2] = torch.tensor([9.0, 0, 0, 0])
    hidden[0, LAYOUT.reference.start + 3] = torch.tensor([-1.0, 0, 0, 0])
    score = similarity(hidden, LAYOUT)[0]
    assert score[2] == 1 and score[3] == 0 and score[4] == 0.5


def test_random_score_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    generator, layout = torch.Generator().manual_seed(3), Layout(1, (2, 2), ((5, 10),))
    score = random_score(generator, torch.zeros(4, 9, 8), layout, prompts=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*score.chunk(2)) and (score - 1).abs().max() < 1e-5
    assert score[:2].unique().numel() == 100
