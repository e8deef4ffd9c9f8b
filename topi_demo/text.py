"""The demo model's text encoder: word vectors that know their neighbours and their place.

The vocabulary is the words of the grammar in `edits.py`; any other word is refused by name.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .edits import GRAMMAR, SLOTS
from .scenes import SURFACES

LENGTH = 18
WIDTH = 128

_EXTRA = ("a", "an", "and", "on", "striped", "background", *SURFACES)
_WORDS = (
    {word for _, sentence in GRAMMAR.values() for word in re.sub(r"\{\w+\}", "", sentence).split()}
    | {word for words in SLOTS.values() for word in words}
    | set(_EXTRA)
)
# Words that came after the first weights stand last, so that the others keep the rows that they have there.
_LATER = (
    *("add", "cloudy", "clouds", "foggy", "front", "grainy", "grass", "ground", "out", "painting"),
    *("snow", "something", "somewhere", "spotted", "starry", "waves", "woven"),
)
VOCABULARY: tuple[str, ...] = (*sorted(_WORDS.difference(_LATER)), *_LATER)
_INDEX = {word: i + 1 for i, word in enumerate(VOCABULARY)}  # 0 is the padding


def tokenize(text: str) -> list[int]:
    """Word numbers, padded with 0 to LENGTH; ValueError names what is unknown or too long."""
    words = re.sub(r"[.,!]", " ", text.lower()).split()
    unknown = [word for word in words if word not in _INDEX]
    if unknown:
        raise ValueError(
            f"the demo model does not know the words {', '.join(map(repr, unknown))}; it knows: {' '.join(VOCABULARY)}"
        )
    if len(words) > LENGTH:
        raise ValueError(f"the demo model reads at most {LENGTH} words, got {len(words)}")
    return [_INDEX[word] for word in words] + [0] * (LENGTH - len(words))


class TextEncoder(nn.Module):
    """tokens [B, X] -> word features [B, X, 128] and their mean [B, 128].

    comfy-test's linter asks for ComfyUI's `operations` here. It is trained without ComfyUI, and `comfy.sd.CLIP` loads
    it as a whole, 0.2 MB in float32: there is nothing to cast and nothing to swap out.
    """

    def __init__(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        to = {"dtype": dtype, "device": device}
        self.word = nn.Embedding(len(VOCABULARY) + 1, WIDTH, **to)
        self.place = nn.Embedding(LENGTH, WIDTH, **to)
        self.neighbours = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, **to)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        words = self.word(tokens) + self.place.weight
        features = words + self.neighbours(words.mT).mT
        present = (tokens > 0).unsqueeze(-1).to(features.dtype)
        pooled = (features * present).sum(1) / present.sum(1).clamp(min=1)
        return features, pooled
