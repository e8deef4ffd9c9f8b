"""What the families say of their models, counted on the models themselves."""

import re

import comfy.ops
import torch
from sampling import conditioning, empty, last_run, latent, layer_inputs, pack_module, patch, sample
from small_models import NETWORKS, by_family, network_class, shared
from torch import nn

NOT_OF_IMAGE_TOKENS = re.compile(r"(^|\.)(txt|add|to_add|instruct)_|mod|norm")  # text's own, and once a call
PUBLISHED = {  # widths that a layer's share of linear operations depends on; the others have those of their class
    "flux1": NETWORKS["flux1"][1],
    "flux2": NETWORKS["flux2"][1],
    "omnigen2": dict(
        hidden_size=2520, num_attention_heads=21, num_kv_heads=7, num_layers=1, axes_dim_rope=(40, 40, 40)
    ),
}


def ours(family):
    """The pack's own idea of a family."""
    return next(one for one in pack_module("nodes.engine.families").FAMILIES if one.name == family.name)


@by_family
def test_linear_operations_are_those_of_the_published_widths(family):
    """Twice the weights of a layer that an image token passes, by hidden^2, on average over the layers."""
    with torch.device("meta"):
        network = network_class(family)(operations=comfy.ops.disable_weight_init, **PUBLISHED.get(family.name, {}))
    known = ours(family)
    stacks = [value for name, value in network.named_children() if isinstance(value, nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack if "refiner" not in names(network, stack)]
    assert len(layers) == len(known.blocks(network))
    weights = sum(
        module.weight.numel()
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not NOT_OF_IMAGE_TOKENS.search(name)
    )
    assert known.linear == round(2 * weights / len(layers) / known.hidden(network) ** 2)


def names(network, child) -> str:
    return next(name for name, value in network.named_children() if value is child)


@by_family
def test_blocks_are_counted_in_the_order_they_run(family):
    known, model = ours(family), shared(family)
    blocks = known.blocks(model.model.diffusion_model)
    assert [block.kind for block in blocks] == ["double_block"] * family.double_blocks + ["single_block"] * (
        family.depth - family.double_blocks
    )
    if family.replacements:
        return
    seen = []
    handles = [
        block.module.register_forward_hook(lambda module, args, out, i=i: seen.append(i))
        for i, block in enumerate(blocks)
    ]
    sample(model, conditioning(family, [latent(family)]), latent=empty(family), steps=1)
    for handle in handles:
        handle.remove()
    assert seen == list(range(family.depth))


@by_family
def test_the_record_knows_the_size_of_a_token(family):
    """16 pixels a side in every one of these models, whether their VAE or their patch takes more of it."""
    patched, trace = patch(shared(family), **layer_inputs(family))
    sample(patched, conditioning(family, [latent(family, 8, 12)]), latent=empty(family), steps=1)
    run = last_run(trace)
    assert run.patch == family.patch and run.patch * run.cell_pixels == 16
    assert run.model.hidden == (512 if family.name == "krea2" else 256)
    (reference,) = run.anchors[0].references
    assert reference.size == (8 * family.patch // 2, 12 * family.patch // 2)
    assert reference.picture is not None
