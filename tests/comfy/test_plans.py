"""What a plan can ask for, carried out on every family: to see a block's input, and to act behind the last block."""

import pytest
import torch
from sampling import conditioning, empty, latent, pack_module, sample
from small_models import by_family, shared


def with_saving(family, saving, **settings):
    """A small model with one more saving beside what its settings save."""
    attach, config = pack_module("nodes.engine.attach"), pack_module("topi_core.config")

    class With(attach.Patch):
        def savings(self, *run):
            return [*super().savings(*run), saving]

    known = pack_module("nodes.engine.families").family_of(shared(family).model.diffusion_model)
    model = config.Model(family=known.name, depth=family.depth, hidden=256, layers=family.layers, front_layers=1)
    trace = pack_module("topi_core.trace").Trace()
    return attach.attach(shared(family), With(known, model, config.Settings(**settings), trace))


def saving_that(change):
    """Looks at every input at an anchor, and acts behind the last block of every call."""
    seen = {"input": [], "output": []}

    class Acts(pack_module("topi_core.plan").Saving):
        def observe(self, plan, call):
            plan.on_input(
                lambda layer, hidden, layout: seen["input"].append((layer, hidden.shape[1] - layout.tokens)), depth
            )
            return self.apply(plan, call)

        def apply(self, plan, call):
            def behind(hidden, layout):
                rows = layout.tokens if plan.cut is None else plan.cut.tokens(layout)
                seen["output"].append(hidden.shape[1] - rows)
                return change(hidden)

            plan.output.append(behind)
            return True

    depth = []
    return Acts(), seen, depth


@by_family
@pytest.mark.parametrize("mode", ["reuse", "prune"])
def test_before_the_blocks_and_behind_the_last_one(family, mode):
    anchors = pack_module("topi_core.config").AnchorSettings(update_interval=10)
    settings, positive = {"mode": mode, "anchors": anchors}, conditioning(family, [latent(family)])
    plain = sample(
        with_saving(family, pack_module("topi_core.plan").Saving(), **settings), positive, latent=empty(family)
    )
    for change, same in ((lambda hidden: hidden, True), (lambda hidden: hidden * 1.5, False)):
        saving, seen, layers = saving_that(change)
        layers += range(family.depth)
        image = sample(with_saving(family, saving, **settings), positive, latent=empty(family))
        assert torch.equal(image, plain) is same
        assert seen["input"] == [(layer, 0) for layer in range(family.depth)]  # the one anchor
        assert seen["output"] == [0] * 4  # every step, whatever of the sequence it computes
