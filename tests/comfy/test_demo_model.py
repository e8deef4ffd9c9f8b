"""The demo model's MODEL, CLIP and VAE under ComfyUI's stock nodes."""

import comfy.sd
import comfy.utils
import numpy
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from latent_preview import Latent2RGBPreviewer
from sampling import run_node

import nodes
from topi_demo import codec
from topi_demo.comfy_model import load
from topi_demo.model import SHIFT, WEIGHTS, load_weights


@pytest.fixture(scope="module")
def demo():
    return run_node("ToPiDemoModel")


@pytest.fixture(scope="module")
def positive(demo):
    """The conditioning of the quickstart."""
    _, clip, vae = demo
    (image, _) = run_node("ToPiDemoScene", seed=3, instruction="make it night")
    latent = nodes.VAEEncode().encode(vae, image)[0]
    cond = nodes.CLIPTextEncode().encode(clip, "make it night")[0]
    (cond,) = run_node("ReferenceLatent", conditioning=cond, latent=latent)
    return run_node("FluxGuidance", conditioning=cond, guidance=2.5)[0]


def sampled(model, positive, steps=3, side=128):
    negative = nodes.ConditioningZeroOut().zero_out(positive)[0]
    empty = {"samples": torch.zeros(1, 16, side // 8, side // 8)}
    with torch.inference_mode():
        return nodes.KSampler().sample(model, 1, steps, 1.0, "euler", "simple", positive, negative, empty)[0]["samples"]


def test_weights_are_small_and_complete():
    assert WEIGHTS.stat().st_size < 24_000_000
    weights, _, _ = load_weights()
    model = comfy.sd.load_diffusion_model_state_dict(dict(weights))
    assert set(model.model.diffusion_model.state_dict()) == set(weights)


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the demo model's weights are not in .*none: `make train` makes them"):
        load(tmp_path / "none")


def test_time_shift_is_that_of_the_training(demo):
    u = torch.linspace(0.01, 1, 100)
    torch.testing.assert_close(demo[0].get_model_object("model_sampling").sigma(u), SHIFT * u / (1 + (SHIFT - 1) * u))


def test_text(demo):
    _, clip, _ = demo
    ((features, values),) = nodes.CLIPTextEncode().encode(clip, "make the star blue")[0]
    assert features.shape == (1, 18, 128)
    assert values["pooled_output"].shape == (1, 128)
    ((empty, values),) = nodes.CLIPTextEncode().encode(clip, "")[0]
    assert empty.isfinite().all()
    assert values["pooled_output"].count_nonzero() == 0
    with pytest.raises(ValueError, match="does not know the words 'mauve'"):
        nodes.CLIPTextEncode().encode(clip, "make the star mauve")


def test_images_are_cropped_to_blocks_around_the_middle(demo):
    _, _, vae = demo
    image = torch.rand(2, 133, 142, 4)
    latent = nodes.VAEEncode().encode(vae, image)[0]["samples"]
    assert latent.shape == (2, 16, 16, 17)
    assert torch.equal(latent, codec.encode(image[:, 2:130, 3:139, :3].movedim(-1, 1)))


def test_tiles_change_nothing(demo):
    _, _, vae = demo
    image = torch.rand(1, 96, 128, 3)
    latent = nodes.VAEEncode().encode(vae, image)[0]
    tiled = nodes.VAEEncodeTiled().encode(vae, image, 64, 16)[0]
    assert torch.equal(latent["samples"], tiled["samples"])
    decoded = nodes.VAEDecode().decode(vae, latent)[0]
    assert decoded.shape == (1, 96, 128, 3)
    assert torch.equal(decoded, nodes.VAEDecodeTiled().decode(vae, latent, 64, 16)[0])


def test_inpainting_encode(demo):
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    latent = nodes.VAEEncodeForInpaint().encode(demo[2], torch.rand(1, 128, 128, 3), mask)[0]
    assert latent["samples"].shape == (1, 16, 16, 16)


def test_previews_show_the_mean_colours(demo):
    latent_format = demo[0].model.latent_format
    latent = 0.3 * torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    previewer = Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    shown = torch.from_numpy(numpy.array(previewer.decode_latent_to_preview(latent), dtype=float))
    mean = codec.decode(latent).unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2))[0].movedim(0, -1)
    assert (shown - 255 * mean).abs().max() <= 1


def test_custom_sampling_is_the_ksampler(demo, positive):
    model = demo[0]
    (guider,) = run_node("BasicGuider", model=model, conditioning=positive)
    (sigmas,) = run_node("BasicScheduler", model=model, scheduler="simple", steps=3)
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")
    (noise,) = run_node("RandomNoise", noise_seed=1)
    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    with torch.inference_mode():
        out = run_node(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=empty
        )[0]
    assert torch.equal(out["samples"], sampled(model, positive))


def test_sizes_and_the_reference_count(demo, positive):
    assert sampled(demo[0], positive, side=208).shape == (1, 16, 26, 26)
    without = [[positive[0][0], {**positive[0][1], "reference_latents": []}]]
    assert not torch.equal(sampled(demo[0], positive), sampled(demo[0], without))


def test_the_stock_shift_node_takes_over(demo):
    patched = ModelSamplingFlux().patch(demo[0], 1.15, 0.5, 1024, 1024)[0]
    assert patched.get_model_object("model_sampling").shift == pytest.approx(1.15)


def test_lora(demo, positive):
    model, clip, _ = demo
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, 256, generator=generator)

    def with_up(scale):
        lora = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": scale * torch.ones(768, 4)}
        return comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)[0]

    plain = sampled(model, positive)
    assert torch.equal(sampled(with_up(0.0), positive), plain)
    assert not torch.equal(sampled(with_up(0.05), positive), plain)
    assert torch.equal(sampled(model, positive), plain)
