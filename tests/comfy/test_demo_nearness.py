"""The yardstick's own measuring, by ComfyUI's hooks alone."""

import pytest
import torch
from sampling import run_node

from bench import nearness
from bench.nearness import AttentionRecord, Velocities, captions, measure, some_steps
from topi_core.layout import Layout
from topi_demo.evaluate import AttentionShare, edit, held_out
from topi_demo.model import WEIGHTS


@pytest.fixture(scope="module")
def objects():
    return run_node("ToPiDemoModel")


def wrapped(objects, velocities):
    model = objects[0].clone()
    model.set_model_unet_function_wrapper(velocities)
    return model, *objects[1:]


@torch.inference_mode()
def test_what_is_measured_changes_nothing(objects):
    batch, record, velocities = held_out("put", 2), AttentionRecord(64), Velocities()
    image = edit(wrapped(objects, velocities), batch, 0, 3, listen=record)
    assert torch.equal(image, edit(objects, batch, 0, 3))
    assert len(velocities.kept) == 3
    for course in (record.keys, record.values, record.shares):
        assert [len(layers) for layers in course] == [12, 12, 12]
    assert record.keys[0] == record.values[0] == [0.0] * 12
    assert min(record.keys[2]) > 0


@torch.inference_mode()
def test_shares_are_the_context_sensitivity(objects):
    batch, record = held_out("night", 2), AttentionRecord(64)
    listen = AttentionShare(Layout(18, (8, 8), ((8, 8),)))
    edit(objects, batch, 0, 2, listen=record)
    edit(objects, batch, 0, 2, listen=listen)
    for mine, theirs in zip(record.shares, listen.shares, strict=True):
        assert mine == pytest.approx([theirs[layer] for layer in range(12)], abs=1e-5)


@torch.inference_mode()
def test_every_second_velocity_held_is_half_of_the_steps(objects):
    """Euler with a velocity that is held over two steps takes one step of twice the length."""
    import comfy.sample

    model, clip, _ = objects
    features, pooled = clip.encode_from_tokens(clip.tokenize("red star on teal background"), return_pooled=True)
    cond = [[features, {"pooled_output": pooled, "guidance": 2.5}]]
    empty = torch.zeros(1, 16, 16, 16)
    noise = comfy.sample.prepare_noise(empty, 0)
    sigmas = model.get_model_object("model_sampling").sigma(torch.linspace(1, 0, 9))

    def sampled(model, sigmas):
        sampler = comfy.samplers.sampler_object("euler")
        return comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, cond, cond, empty, disable_pbar=True)

    held, *_ = wrapped(objects, Velocities(frozenset((0, 2, 4, 6))))
    torch.testing.assert_close(sampled(held, sigmas), sampled(model, sigmas[::2]), atol=1e-4, rtol=0)


def test_a_line_is_continued():
    def apply_model(x, timestep):
        return x - timestep * (2 + 3 * timestep) * torch.ones_like(x)

    velocities, x = Velocities(frozenset((0, 1)), linear=True), torch.zeros(1, 2, 2, 2)
    for sigma in (1.0, 0.8, 0.5):
        denoised = velocities(apply_model, {"input": x, "timestep": torch.tensor([sigma]), "c": {}})
        torch.testing.assert_close(denoised, apply_model(x, torch.tensor(sigma)))
    assert len(velocities.kept) == 2


def test_some_steps():
    assert sorted(some_steps(20, 2)) == [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19]
    assert sorted(some_steps(20, 4)) == [0, 1, 2, 6, 10, 14, 18, 19]


def test_captions_have_no_reference():
    batch = captions(2)
    assert batch.references == [] and len(batch.instructions) == 2 and batch.expected.shape == (2, 3, 128, 128)


def test_rows_and_table():
    rows = list(measure(1, 0, 8, 128, 1.0, ["night", "snow", nearness.CAPTIONS], WEIGHTS, set()))
    night, snow, text = rows
    assert night["to_expected"].keys() == {"2", "4", "8"} and not snow["to_expected"] and not text["to_expected"]
    assert len(night["cosine"]) == 7 and len(night["keys"]) == 8 and text["keys"] == [[]] * 8
    assert not list(measure(1, 0, 8, 128, 1.0, ["night"], WEIGHTS, {nearness.key(night)}))
    head, _, *lines = nearness.markdown(rows).splitlines()
    assert head == "| 8 steps, 128 pixels, CFG 1 | global | open | text to image | published | of |"
    assert all(line.count("|") == head.count("|") for line in lines)
