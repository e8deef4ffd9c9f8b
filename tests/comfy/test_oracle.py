"""The oracle itself, before anything is compared with it."""

import torch
from oracle import Oracle
from sampling import conditioning, difference, empty, latent, sample
from small_models import by_family, shared


@by_family
def test_oracle_that_drops_nothing_changes_nothing(family):
    """Its recording leaves the image as it is, bit by bit."""
    model, start = shared(family), empty(family)
    positive = conditioning(family, [latent(family)])
    oracle = Oracle(family, update_interval=2, drop=False)
    assert torch.equal(sample(oracle.attach(model), positive, latent=start), sample(model, positive, latent=start))
    assert [step for step, _ in oracle.anchors] == [0, 2]


@by_family
def test_dropping_matters(family):
    """On these models the reference is used, attention is uneven, and what is dropped shows in the image."""
    model, start = shared(family), empty(family)
    positive = conditioning(family, [latent(family)])
    full = sample(model, positive, latent=start)
    oracle = Oracle(family, tau=0.8)
    pruned = sample(oracle.attach(model), positive, latent=start)
    ((_, (kept,)),) = oracle.anchors
    assert 0.2 < len(kept) / 64 < 0.79
    assert difference(pruned, full) > 1e-3
    assert difference(sample(model, conditioning(family), latent=start), full) > 1e-2
