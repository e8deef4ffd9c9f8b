"""ToPi on models that ComfyUI compiles. The backend "eager" of torch.compile is Dynamo without a code generator."""

import shutil

import pytest
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from sampling import conditioning, difference, empty, kinds, latent, layer_inputs, pack_module, patch, run_node, sample
from small_models import FLUX1, KREA, QWEN, by_family, load, shared

MODES = {"prune": {"tau": 0.5, "update_interval": 2}, "reuse": {"mode": "reuse", "update_interval": 2}}


@pytest.fixture(autouse=True)
def forgotten():
    """What other tests compiled, as there is a limit to how much is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model, backend="eager", **how):
    """What TorchCompileModel does, with any backend."""
    model = model.clone()
    set_torch_compile_wrapper(model, backend=backend, **{"options": {"guard_filter_fn": _no_options}} | how)
    return model


def _no_options(guards):
    return ["transformer_options" not in guard.name for guard in guards]


def edit(family, model, mode="reuse", **inputs):
    """An image with guidance and the kinds of its steps."""
    patched, trace = patch(model, **layer_inputs(family), **MODES[mode] | inputs)
    return guided(family, patched), kinds(trace)


def guided(family, model):
    refs = [latent(family)]
    return sample(model, conditioning(family, refs), conditioning(family, refs, seed=1), cfg=2.0, latent=empty(family))


def graphs() -> int:
    """How many graphs torch has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@by_family
def test_a_compiled_model_makes_the_same_image(family):
    model = compiled(load(family))
    for mode in MODES:
        image, steps = edit(family, model, mode)
        expected, expected_steps = edit(family, shared(family), mode)
        assert torch.equal(image, expected), mode
        assert steps == expected_steps and {"pruned", "reused"} & set(steps)
    assert graphs() > 0


def test_a_second_run_compiles_nothing():
    model = compiled(load(FLUX1))
    for mode in MODES:
        edit(FLUX1, model, mode)
    before = graphs()
    for mode in MODES:
        edit(FLUX1, model, mode)
    assert graphs() == before > 0


def test_many_lengths_of_the_sequence_are_few_graphs():
    """Anchors that keep other numbers of tokens do not compile anew."""
    model = compiled(load(FLUX1))
    for tau in (0.5, 0.6, 0.7):
        edit(FLUX1, model, "prune", tau=tau)
    before = graphs()
    for tau in (0.3, 0.4, 0.8, 0.9):
        edit(FLUX1, model, "prune", tau=tau)
    assert graphs() == before


@pytest.mark.parametrize("order", ["before", "after"])
def test_compiling_before_or_after(order):
    expected, _ = edit(FLUX1, shared(FLUX1))
    if order == "before":
        assert torch.equal(edit(FLUX1, compiled(load(FLUX1)))[0], expected)
        return
    patched, trace = patch(load(FLUX1), **layer_inputs(FLUX1), **MODES["reuse"])
    assert torch.equal(guided(FLUX1, compiled(patched)), expected) and "reused" in kinds(trace)


@torch._dynamo.config.patch(recompile_limit=64)
def test_code_compiled_without_topi_is_not_taken_for_its_own():
    """Its guards leave out what ToPi changes. Torch keeps it by block where a patch in there is no part of it."""

    @torch.compiler.disable
    def attn1_patch(q, k, v, **_):
        return {"q": q, "k": k, "v": v}

    model, images, compiled_by_run = load(FLUX1).clone(), [], []
    model.set_model_attn1_patch(attn1_patch)
    topi = compiled(model)
    for backend in ("aot_eager", "eager"):
        torch._dynamo.reset()
        guided(FLUX1, compiled(model, backend, keys=["diffusion_model.double_blocks.0"]))
        before = graphs()
        images.append(edit(FLUX1, topi)[0])
        compiled_by_run.append(graphs() - before)
    assert torch.equal(*images)
    assert compiled_by_run[0] == compiled_by_run[1] > 0


@pytest.mark.parametrize("family", [FLUX1, QWEN, KREA], ids=lambda f: f.name)
def test_another_packs_attention_is_still_called(family):
    seen = []

    def override(function, *args, **kwargs):
        seen.append(args[0].shape)
        return function(*args, **kwargs) * 1.02

    images = []
    for model in (compiled(load(family)), shared(family)):
        own = model.clone()
        own.model_options["transformer_options"]["optimized_attention_override"] = override
        seen.clear()
        images.append((edit(family, own)[0], list(seen)))
    assert torch.equal(images[0][0], images[1][0]) and images[0][1] == images[1][1] != []
    assert difference(images[0][0], edit(family, shared(family))[0]) > 1e-3


@pytest.mark.parametrize("family", [FLUX1, KREA], ids=lambda f: f.name)
@pytest.mark.parametrize("error", [None, RuntimeError("stop")], ids=["done", "error"])
def test_blocks_are_as_before_when_a_run_ends(family, error):
    model, own = compiled(load(family)), object()
    network = model.model.diffusion_model
    blocks = [module for module in network.modules() if hasattr(module, "forward")]
    special = next(module for name, module in network.named_modules() if name.endswith("blocks.1"))
    special.forward = special.forward  # as a pack that changes one block does
    before = [vars(block).get("forward", own) for block in blocks]

    def callback(*_):
        if error:
            raise error

    patched, _ = patch(model, **layer_inputs(family), **MODES["reuse"])
    try:
        sample(patched, conditioning(family, [latent(family)]), latent=empty(family), callback=callback)
    except RuntimeError as raised:
        assert raised is error
    assert [vars(block).get("forward", own) for block in blocks] == before
    assert patched.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_the_nodes_own_backend():
    """TorchCompileModel's inductor, on a graph of one operation: a model takes minutes on a CPU."""
    model = run_node("TorchCompileModel", model=shared(FLUX1), backend="inductor")[0]
    options = create_model_options_clone(model.model_options | {"transformer_options": {"wrappers": model.wrappers}})
    how = pack_module("nodes.engine.compiled").take_over(options, model).how
    assert how["backend"].backend == "inductor"
    for mode in (how["mode"], "max-autotune-no-cudagraphs"):
        function = torch.compile(lambda x: x * 2, **how | {"mode": mode})
        assert torch.equal(function(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"fullgraph": True}, "fullgraph"),
        ({"backend": "cudagraphs"}, "CUDA graphs"),
        ({"backend": "inductor", "options": None, "mode": "reduce-overhead"}, "CUDA graphs"),
        ({"backend": "inductor", "options": None, "mode": "max-autotune"}, "CUDA graphs"),
        ({"backend": "inductor", "options": {"triton.cudagraphs": True}}, "CUDA graphs"),
    ],
)
def test_what_cannot_work_is_refused_when_sampling_starts(how, sentence):
    with pytest.raises((RuntimeError, ValueError), match=sentence) as refusal:
        edit(FLUX1, compiled(shared(FLUX1), **how))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["diffusion_model", "diffusion_model.double_blocks.0"])
def test_a_network_compiled_by_another_pack_is_refused(name):
    """Its guards are not known."""
    patched = patch(shared(FLUX1), **layer_inputs(FLUX1))[0]
    patched.add_object_patch(name, torch.compile(patched.get_model_object(name), backend="eager"))
    with pytest.raises(RuntimeError, match="TorchCompileModel") as refusal:
        guided(FLUX1, patched)
    assert "\n" not in str(refusal.value)
