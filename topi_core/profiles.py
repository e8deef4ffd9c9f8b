"""Representative layers (Eq. 5) by model: the published ones, and a guess by relative depth for the others."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where a model of this family and depth looks at its references; `source` says who found out, and how."""

    name: str
    family: str
    depth: int
    layers: tuple[int, ...]
    front_layers: int
    source: str

    def scaled(self, depth: int) -> Profile:
        """The same places in a stack of another depth: a guess, not a calibration."""
        layers = sorted({layer * depth // self.depth for layer in self.layers})
        return replace(self, depth=depth, layers=tuple(layers), front_layers=self.front_layers * depth // self.depth)


def shipped() -> dict[str, Profile]:
    """All profiles of the pack by name."""
    profiles = {}
    for path in sorted(FOLDER.glob("*.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        profiles[path.stem] = Profile(name=path.stem, **fields | {"layers": tuple(fields["layers"])})
    return profiles


def automatic(family: str, depth: int) -> tuple[Profile, bool]:
    """The profile for a model, and whether it is a guess: its family's, or else FLUX.1 Kontext's, scaled to `depth`."""
    profiles = shipped().values()
    kin = [p for p in profiles if p.family == family] or [p for p in profiles if p.family == "flux1"]
    exact = [p for p in kin if (p.family, p.depth) == (family, depth)]
    return (exact[0], False) if exact else (kin[0].scaled(depth), True)


def named(name: str, family: str, depth: int) -> Profile:
    """The profile of this name; ValueError when there is none, or when it was made for another model."""
    profiles = shipped()
    if name not in profiles:
        raise ValueError(f"there is no profile {name!r}; there are: auto, {', '.join(profiles)}")
    profile = profiles[name]
    if (profile.family, profile.depth) != (family, depth):
        raise ValueError(
            f"the profile {name!r} is for {profile.family} with {profile.depth} layers, "
            f"this model is {family} with {depth}; choose the profile 'auto', or give layers and front_layers"
        )
    return profile
