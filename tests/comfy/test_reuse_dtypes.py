"""The mode "reuse" on weights in few bits, and on a part of the schedule."""

import pytest
import torch
from oracle import FLOAT_ERROR
from reuse_oracle import compare_reuse
from sampling import conditioning, empty, kinds, last_run, latent, layer_inputs, patch, sample
from small_models import by_family, load, shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@by_family
def test_weights_in_few_bits(family, dtype):
    """An anchor at every step is bit-equal; what is reused is near to the oracle but for rounding.

    With the tokens that one anchor chose, and with all of them: a second anchor sees a picture that has been rounded,
    and may choose others than the oracle's.
    """
    model, start = load(family, dtype), empty(family)
    assert model.model.diffusion_model.dtype == dtype
    positive = conditioning(family, [latent(family)])
    anchors, _ = patch(model, mode="reuse", update_interval=1, **layer_inputs(family))
    assert torch.equal(sample(anchors, positive, latent=start), sample(model, positive, latent=start))
    rounding = max(4 * torch.finfo(model.model.get_dtype_inference()).eps, FLOAT_ERROR)
    sampling = dict(latent=start, rounding=rounding)
    _, trace = compare_reuse(family, model, positive, steps=2, **sampling)
    assert kinds(trace) == ["anchor", "reused"]
    for forecast in (True, False):
        inputs = {"max_keep": 1.0, "update_interval": 2, "forecast": forecast}
        _, trace = compare_reuse(family, model, positive, inputs=inputs, **sampling)
        assert kinds(trace) == ["anchor", "reused"] * 2 and last_run(trace).forecast == forecast


@pytest.mark.parametrize("forecast", [True, False])
@by_family
def test_img2img(family, forecast):
    """denoise below 1: the schedule is the part that is sampled, and its first step is an anchor."""
    positive, start = conditioning(family, [latent(family)]), latent(family, seed=4)
    inputs = {"update_interval": 2, "forecast": forecast}
    _, trace = compare_reuse(family, shared(family), positive, inputs=inputs, latent=start, denoise=0.6)
    assert kinds(trace) == ["anchor", "reused"] * 2 and last_run(trace).forecast == forecast
    assert last_run(trace).steps[0].sigma < 0.95
