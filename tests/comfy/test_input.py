"""The inputs of ToPi Patch and ToPi Settings; for each bad one a sentence says what was given and what is allowed."""

from itertools import product

import comfy.ldm.chroma.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.supported_models
import pytest
import torch
from sampling import conditioning, empty, kept_sets, last_run, latent, pack_module, patch, run_node, sample
from small_models import FLUX1, NETWORKS, QWEN, network_class, patcher, random_weights, shared

import nodes

SUPPORTED = ("FLUX.1", "FLUX.2", "Qwen-Image", "Mage-Flow", "JoyImage", "Krea 2", "OmniGen2", "Boogu")
PATCH = {  # id: (type, default, lowest, highest, optional); workflows that people saved depend on all of it
    "model": ("MODEL", None, None, None, False),
    "mode": ("COMBO", "reuse", None, None, False),
    "update_interval": ("INT", 0, 0, 1000, False),
    "tolerance": ("FLOAT", 0.05, 0, 1, False),
    "tau": ("FLOAT", 0.85, 0, 1, False),
    "settings": ("TOPI_SETTINGS", None, None, None, True),
}
SETTINGS = {
    "profile": ("COMBO", "auto", None, None, False),
    "layers": ("STRING", "", None, None, False),
    "front_layers": ("INT", -1, -1, 200, False),
    "first_anchor": ("INT", 0, 0, 1000, False),
    "start_percent": ("FLOAT", 0.0, 0, 1, False),
    "end_percent": ("FLOAT", 1.0, 0, 1, False),
    "min_keep": ("FLOAT", 0.0, 0, 1, False),
    "max_keep": ("FLOAT", 1.0, 0, 1, False),
    "metric": ("COMBO", "influence", None, None, False),
    "spacing": ("COMBO", "auto", None, None, False),
    "forecast": ("BOOLEAN", True, None, None, False),
    "reuse_text": ("BOOLEAN", False, None, None, False),
}


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [("ToPiPatch", PATCH, ["MODEL", "TOPI_TRACE"]), ("ToPiSettings", SETTINGS, ["TOPI_SETTINGS"])],
    ids=["ToPiPatch", "ToPiSettings"],
)
def test_inputs_and_outputs_are_those_that_workflows_rely_on(name, inputs, outputs):
    schema = nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA()
    found = {
        i.id: (i.get_io_type(), *(getattr(i, name, None) for name in ("default", "min", "max")), bool(i.optional))
        for i in schema.inputs
    }
    assert list(found) == list(inputs)  # saved values have places, no names
    assert found == inputs
    assert all(i.tooltip and not getattr(i, "advanced", None) for i in schema.inputs)
    assert [output.get_io_type() for output in schema.outputs] == outputs


def test_what_can_be_chosen():
    schemas = [nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA() for name in ("ToPiPatch", "ToPiSettings")]
    options = {i.id: i.options for schema in schemas for i in schema.inputs if hasattr(i, "options")}
    assert options["mode"] == ["reuse", "prune"]
    assert options["spacing"] == ["auto", "steps", "sigma"]
    assert options["metric"] == ["influence", "attention"]
    assert options["profile"][0] == "auto" and len(options["profile"]) >= 3


def settings_of(patched):
    """What the engine was told."""
    return patched.wrappers["outer_sample"]["topi"][0].__self__.settings


def test_the_node_alone_is_the_node_with_the_defaults_of_its_settings():
    alone, _ = run_node("ToPiPatch", model=shared(FLUX1))
    connected, _ = run_node("ToPiPatch", model=shared(FLUX1), settings=run_node("ToPiSettings")[0])
    assert settings_of(alone) == settings_of(connected)
    assert settings_of(alone) == settings_of(patch(shared(FLUX1), mode="reuse", tolerance=0.05)[0])
    assert run_node("ToPiSettings") == (pack_module("topi_core.config").Settings(),)


def test_reuse_keeps_every_token_whatever_tau_says():
    told = settings_of(patch(shared(FLUX1), mode="reuse", tau=0.3)[0])
    assert told.keeps_all and (told.tau, told.update_interval, told.spacing) == (1.0, 2, "steps")
    assert not settings_of(patch(shared(FLUX1), mode="reuse", max_keep=0.5)[0]).keeps_all


def test_prune_without_a_tolerance_is_the_paper_s_method_with_its_settings():
    """Given in full: Eq. 9 to 12 with tau 0.85, anchors every 10 steps from the first on, and the exempt layers."""
    positive, start = conditioning(FLUX1, [latent(FLUX1)]), empty(FLUX1)
    switched, trace = run_node("ToPiPatch", model=shared(FLUX1), mode="prune", tolerance=0.0)
    image = sample(switched, positive, latent=start, steps=12)
    layers = ",".join(map(str, last_run(trace).layers))
    paper = dict(
        tau=0.85, update_interval=10, layers=layers, front_layers=round(FLUX1.depth * 10 / 58.5), first_anchor=0,
        start_percent=0.0, end_percent=1.0, min_keep=0.0, max_keep=1.0, metric="influence", spacing="steps",
    )  # fmt: skip
    given, other = patch(shared(FLUX1), mode="prune", **paper)
    assert torch.equal(sample(given, positive, latent=start, steps=12), image)
    assert kept_sets(trace) == kept_sets(other)
    assert [anchor.step for anchor in last_run(trace).anchors] == [0, 10]
    assert all(0 < anchor.share < 1 for anchor in last_run(trace).anchors)


@pytest.mark.parametrize(
    ("inputs", "given", "allowed"),
    [
        ({"layers": "a,b"}, "a,b", ","),
        ({"layers": "1;2"}, "1;2", ","),
        ({"layers": "1,,2"}, "1,,2", ","),
        ({"layers": "1.5"}, "1.5", ","),
        ({"layers": "99"}, "99", "7"),
        ({"layers": "8"}, "8", "7"),
        ({"layers": "-1"}, "-1", "7"),
        ({"front_layers": 8}, "8", "7"),
        ({"front_layers": 200}, "200", "7"),
        ({"front_layers": -2}, "-2", "0"),
        ({"min_keep": 0.6, "max_keep": 0.4}, "0.6", "0.4"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "0.6", "0.4"),
        ({"profile": "no such profile"}, "no such profile", "auto"),
        ({"mode": "merge"}, "merge", "prune"),
        ({"metric": "luck"}, "luck", "influence"),
        ({"spacing": "even"}, "even", "sigma"),
        ({"tau": 1.3}, "1.3", "1"),
        ({"tau": -0.1}, "-0.1", "0"),
        ({"tolerance": 1.5}, "1.5", "1"),
        ({"tolerance": float("nan")}, "nan", "1"),
        ({"tau": float("nan")}, "nan", "1"),
        ({"update_interval": -1}, "-1", "1000"),
        ({"update_interval": 1001}, "1001", "1000"),
        ({"first_anchor": -1}, "-1", "0"),
        ({"min_keep": -0.5}, "-0.5", "0"),
        ({"max_keep": 1.5}, "1.5", "1"),
        ({"start_percent": 2.0}, "2.0", "1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_when_the_node_runs(inputs, given, allowed):
    with pytest.raises(ValueError) as refusal:
        patch(shared(FLUX1), **({"layers": "1,4", "front_layers": 2} | inputs))
    sentence = str(refusal.value)
    assert given in sentence and allowed in sentence.replace(given, "", 1)
    assert next(iter(inputs)) in sentence
    assert "\n" not in sentence


def test_a_profile_of_another_model_is_refused_in_one_sentence():
    """Also where the layers are typed, which would need none."""
    schema = nodes.NODE_CLASS_MAPPINGS["ToPiSettings"].GET_SCHEMA()
    profiles = next(i.options for i in schema.inputs if i.id == "profile")[1:]
    for profile, typed in product(profiles, ({}, {"layers": "1,4", "front_layers": 2})):
        with pytest.raises(ValueError, match=profile) as refusal:
            patch(shared(FLUX1), profile=profile, **typed)
        sentence = str(refusal.value)
        assert "\n" not in sentence
        if profile == "flux1-kontext":  # of the same family
            assert "57" in sentence and "8" in sentence


def test_layers_may_have_spaces_and_come_in_any_order():
    _, trace = patched = patch(shared(FLUX1), layers=" 6, 1 ,4", front_layers=2)
    sample(patched[0], conditioning(FLUX1, [latent(FLUX1)]), latent=empty(FLUX1), steps=2)
    assert sorted(last_run(trace).layers) == [1, 4, 6]


def chroma():
    """Built like FLUX, with another class of network."""
    settings = dict(
        in_channels=64, out_channels=64, context_in_dim=48, hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=256,
        hidden_dim=64, n_layers=1, txt_ids_dims=[], vec_in_dim=None,
    )  # fmt: skip
    network = comfy.ldm.chroma.model.Chroma(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **settings)
    return patcher(comfy.supported_models.Chroma(settings | {"image_model": "chroma"}), random_weights(network, 1))


def stable_diffusion():
    settings = dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=48,
        num_heads=4, use_spatial_transformer=True, legacy=False, use_linear_in_transformer=False, adm_in_channels=None,
        use_temporal_attention=False,
    )  # fmt: skip
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    network = unet(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **settings)
    return patcher(comfy.supported_models.SD15(settings), random_weights(network, 1))


def with_network(cls, **settings):
    """A model whose network another pack has replaced: the class counts, so it gets no weights."""
    with torch.device("meta"):
        network = cls(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **settings)
    model = shared(FLUX1).clone()
    model.add_object_patch("diffusion_model", network)
    return model


def nunchaku():
    """An engine's own network in place of ComfyUI's, often made from its class."""
    engine = type("NunchakuQwenImageTransformer2DModel", (network_class(QWEN),), {})
    return with_network(engine, **NETWORKS["qwen_image"][1])


def z_image_omni():
    """Its output is cut out at a place behind the references, so none of them can go."""
    settings = dict(n_layers=1, n_refiner_layers=1, cap_feat_dim=48, pad_tokens_multiple=32, siglip_feat_dim=16)
    return with_network(comfy.ldm.lumina.model.NextDiT, **settings)


def hidream_o1():
    """It keeps keys and values of its references itself."""
    small = {"hidden_size": 64, "num_hidden_layers": 1}
    hidream = pytest.importorskip("comfy.ldm.hidream_o1.model", reason="an older ComfyUI has no HiDream-O1")
    return with_network(hidream.HiDreamO1Transformer, text_config_overrides=small)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (chroma, "Chroma"),
        (stable_diffusion, "UNetModel"),
        (nunchaku, "NunchakuQwenImageTransformer2DModel"),
        (z_image_omni, "NextDiT"),
        (hidream_o1, "HiDreamO1Transformer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unsupported_model_is_named_with_the_supported_ones(make, name):
    with pytest.raises(ValueError) as refusal:
        patch(make())
    sentence = str(refusal.value)
    assert name in sentence and all(known in sentence for known in SUPPORTED)
    assert "\n" not in sentence
