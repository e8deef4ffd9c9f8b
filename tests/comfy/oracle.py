"""ToPi told a second time, in the slowest and plainest way, to compare the pack with.

Nothing is ever gathered: every token stays in the sequence, and the keys of dropped tokens are hidden from all queries.
The influence (Eq. 9) is computed a head at a time in float64 with a full attention matrix, always on the CPU. It shares
no code with the pack and uses other hooks: one attention override for everything, no block replacement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from comfy.patcher_extension import WrappersMP
from sampling import difference, kept_sets, kinds, layer_inputs, patch, sample
from small_models import Family
from torch import Tensor

HIDDEN = -1e30  # a logit that no softmax sees
FLOAT_ERROR = 1e-5  # of float32 over a whole run, as a share of the largest value; a dropped token shows at 1e-2


@dataclass
class Selection:
    """What is known about one set of references."""

    refs: list[Tensor]
    target: int
    step: int | None = None  # the anchor that `influence` is from
    influence: list[Tensor] = field(default_factory=list)  # [C] for each image


class Oracle:
    """A model with ToPi's meaning and none of its savings. `anchors` lists (step, kept tokens of each image)."""

    added_text = 0
    """Tokens that another patch puts before the prompt's, inside of the network."""

    def __init__(
        self,
        family: Family,
        *,
        tau: float = 0.85,
        update_interval: int = 10,
        first_anchor: int = 0,
        layers: Iterable[int] | None = None,
        front_layers: int | None = None,
        min_keep: float = 0.0,
        max_keep: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        metric: str = "influence",
        drop: bool = True,
    ):
        self.family = family
        self.tau, self.interval, self.first = tau, update_interval, first_anchor
        self.layers = set(layers or family.layers)
        self.front = family.front_layers if front_layers is None else front_layers
        self.min_keep, self.max_keep = min_keep, max_keep
        self.window = start_percent, end_percent
        self.use_values = {"influence": True, "attention": False}[metric]
        self.drop = drop
        self.selections: list[Selection] = []
        self.calls: list[tuple[int, str, list[int]]] = []  # (step, kind, cond_or_uncond)
        self.noted: dict[tuple[int, int], list[list[int]]] = {}  # (step, references) -> kept tokens of each image

    def attach(self, model):
        model = model.clone()
        options = model.model_options["transformer_options"]
        self.previous = options.get("optimized_attention_override", lambda func, *args, **kwargs: func(*args, **kwargs))
        options["optimized_attention_override"] = self.attend
        wrapped = WrappersMP.APPLY_MODEL if self.family.references_at is None else WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(wrapped, "oracle", self.call)
        self.percent_to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        return model

    @property
    def anchors(self) -> list[tuple[int, list[list[int]]]]:
        return sorted((step, kept) for (step, _), kept in self.noted.items())

    def call(self, executor, *args, **kwargs):
        """Around one forward pass: who is in the batch, and what has to happen to it."""
        options = next(a for a in args if isinstance(a, dict) and "cond_or_uncond" in a)
        outside = self.family.references_at is None
        refs = kwargs.get("ref_latents") if outside else args[self.family.references_at]
        if not refs:
            self.rows = None
            return executor(*args, **kwargs)
        x, text = args[0], args[3 if outside else 2]
        self.text = self.family.text_tokens if self.family.name == "flux2" else text.shape[1]
        self.text += self.added_text
        self.target = self.tokens(x)
        self.context = sum(self.tokens(r) for r in refs)
        self.joint = self.text + self.target + self.context
        self.layer = -1  # that attended last
        chunks = len(options["cond_or_uncond"])
        images = x.shape[0] // chunks
        sigma, sigmas = options["sigmas"].flatten()[0], options["sample_sigmas"]
        step = min(int((sigmas >= sigma - 1e-6 * sigmas.max()).sum()) - 1, len(sigmas) - 2)
        self.rows = []  # (selection, image) of each row
        for chunk in range(chunks):
            mine = [r[chunk * images : (chunk + 1) * images] for r in refs]
            self.rows += [(self.find(mine), image) for image in range(images)]
        kind = self.kind(step, float(sigma))
        self.kept = None
        self.record = kind == "anchor"
        if kind == "anchor":
            for selection, _ in self.rows:
                if selection.step != step:
                    selection.step = step
                    selection.influence = [torch.zeros(self.context, dtype=torch.float64) for _ in range(images)]
        elif kind == "pruned" and self.drop:
            self.kept = self.choose()
        self.calls.append((step, kind, list(options["cond_or_uncond"])))
        self.computed = False
        out = executor(*args, **kwargs)
        assert self.computed, "attach the oracle after a cache, so that skipped steps never reach it"
        assert self.layer == self.family.depth - 1
        if kind == "anchor":
            self.note(step)
        return out

    def tokens(self, image: Tensor) -> int:
        height, width = image.shape[-2:]
        frames = image.shape[2] if image.ndim == 5 else 1
        return frames * math.ceil(height / self.family.patch) * math.ceil(width / self.family.patch)

    def place(self, part: str, length: int) -> slice:
        """Where text, target or context ("x", "t", "c") stand among all tokens, or among those of the images."""
        lengths = {"x": self.text if length == self.joint else 0, "t": self.target, "c": self.context}
        before, _ = self.family.order.split(part)
        start = sum(lengths[other] for other in before)
        return slice(start, start + lengths[part])

    def find(self, refs: list[Tensor]) -> Selection:
        """By content; regions of other sizes score apart."""
        for selection in self.selections:
            if selection.target == self.target and _same(selection.refs, refs):
                return selection
        self.selections.append(Selection([r.clone() for r in refs], self.target))
        return self.selections[-1]

    def kind(self, step: int, sigma: float) -> str:
        """Eq. 11; an anchor that was never computed is made up for at the next step that is.

        The rows of a call are as long as one another, so all of them keep everything when one has to.
        """
        start, end = map(self.percent_to_sigma, self.window)
        if step < self.first or not end < sigma <= start:
            return "full"
        return "anchor" if any(self.due(selection.step, step) for selection, _ in self.rows) else "pruned"

    def due(self, last: int | None, step: int) -> bool:
        period = (step - self.first) // self.interval
        return last is None or step == last or period > (last - self.first) // self.interval

    def attend(self, func, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, **kwargs):
        """Every attention of the network. Those over all tokens are one a layer; Boogu has others within its layers."""
        self.computed = True
        if self.rows is None:
            return self.previous(func, q, k, v, heads, mask=mask, **kwargs)
        dim = 2 if kwargs.get("skip_reshape", False) else 1  # of the tokens
        length = k.shape[dim]
        if length == self.joint:
            self.layer += 1
            if self.record and self.layer in self.layers:
                self.score(*(x if dim == 2 else _heads_first(x, heads) for x in (q, k, v)), mask)
        if length == self.joint or (self.layer >= 0 and length == self.target + self.context):
            k, v, mask = self.change(k, v, mask, self.place("c", length), dim)
        return self.previous(func, q, k, v, heads, mask=mask, **kwargs)

    def change(self, k: Tensor, v: Tensor, mask: Tensor | None, context: slice, dim: int) -> tuple:
        """What an attention of `self.layer` gets, with the context at this place of the dimension of tokens."""
        if self.kept is None or self.layer < self.front:
            return k, v, mask
        return k, v, self.hide(k, mask, context, dim)

    def hide(self, k: Tensor, mask: Tensor | None, context: slice, dim: int) -> Tensor:
        """The mask, and no dropped token."""
        hidden = torch.zeros(k.shape[0], k.shape[dim], dtype=k.dtype)
        hidden[:, context].masked_fill_(~self.kept, HIDDEN)
        hidden = hidden[:, None, None].to(k.device)
        return hidden if mask is None else hidden + four_axes(mask)

    def score(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Eq. 9, one head of one row at a time."""
        target, context = self.place("t", self.joint), self.place("c", self.joint)
        shared = q.shape[1] // k.shape[1]  # heads of queries that use the same keys
        q, k, v = q.cpu(), k.cpu(), v.cpu()
        if mask is not None:
            mask = four_axes(mask).cpu().double().expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        for row, (selection, image) in enumerate(self.rows):
            for head in range(q.shape[1]):
                keys, values = k[row, head // shared].double(), v[row, head // shared].double()
                logits = q[row, head, target].double() @ keys.T / q.shape[-1] ** 0.5
                if mask is not None:
                    logits = logits + mask[row, head, target]
                received = logits.softmax(-1).sum(0)[context]
                selection.influence[image] += received * (values[context].norm(dim=-1) if self.use_values else 1.0)

    def select(self, influence: Tensor, count: int | None = None) -> list[int]:
        """Eq. 10 by adding up one token after the other; or the `count` most influential tokens."""
        order = sorted(range(len(influence)), key=lambda j: -influence[j].item())
        total, held, wanted = influence.sum().item(), 0.0, 0
        for j in order:
            if held >= self.tau * total:
                break
            held, wanted = held + influence[j].item(), wanted + 1
        lowest, highest = math.ceil(self.min_keep * len(order)), math.floor(self.max_keep * len(order))
        wanted = min(max(wanted, lowest), highest)
        return sorted(order[: wanted if count is None else count])

    def choose(self) -> Tensor:
        """Kept tokens of every row of this call [B, C]; rows are filled up to the longest."""
        influences = [selection.influence[image] for selection, image in self.rows]
        longest = max(len(self.select(influence)) for influence in influences)
        kept = torch.zeros(len(self.rows), self.context, dtype=torch.bool)
        for row, influence in enumerate(influences):
            kept[row, self.select(influence, longest)] = True
        return kept

    def note(self, step: int) -> None:
        for number, selection in enumerate(self.selections):
            if selection.step == step:
                self.noted[step, number] = [self.select(influence) for influence in selection.influence]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, all heads] -> [B, heads, tokens, D]"""
    return x.reshape(*x.shape[:2], heads, -1).movedim(2, 1)


def four_axes(mask: Tensor) -> Tensor:
    """[B, heads, queries, keys] of any mask that ComfyUI's attention takes."""
    if mask.ndim == 2:
        mask = mask[None]
    return mask[:, None] if mask.ndim == 3 else mask


def compare(
    family: Family,
    model,
    positive: list,
    negative: list | None = None,
    *,
    inputs: dict | None = None,
    layers: tuple[int, ...] | None = None,
    **sampling,
) -> tuple[Tensor, object, Oracle]:
    """Samples with ToPi Patch and with the oracle: the same tokens are kept at the same steps, and the images agree."""
    inputs = {"tau": 0.8, "update_interval": 3} | (inputs or {})
    typed = {"layers": ",".join(map(str, layers))} if layers else {}
    patched, trace = patch(model, **layer_inputs(family, inputs.get("front_layers")) | inputs | typed)
    image = sample(patched, positive, negative, **sampling)
    oracle = Oracle(family, layers=layers, **inputs)
    expected = sample(oracle.attach(model), positive, negative, **sampling)
    assert kept_sets(trace) == oracle.anchors
    assert difference(image, expected) < FLOAT_ERROR
    assert set(kinds(trace)) <= {"full", "anchor", "pruned"} and "pruned" in kinds(trace)
    return image, trace, oracle
