"""Profiles: which layers are representative (Eq. 5) in which model, and the calibration that says so, as files.

A profile is a safetensors file: what one reads stands in its metadata, the calibration in three small tensors. Nothing
in it is ever executed, and what does not fit is refused with the name of the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .calibration import Calibration

FOLDER = Path(__file__).parent / "profiles"
SUFFIX = ".safetensors"
FORMAT = "topi profile 1"
WORDS, NUMBERS = ("family", "source", "date"), ("depth", "hidden", "front_layers")
"""What the metadata have beside the layers and the versions."""
TENSORS = {"pairs": (torch.int64, 1), "sensitivity": (torch.float64, 2), "steps": (torch.int64, 1)}


def default_front_layers(depth: int) -> int:
    """Where pruning starts in a model that nobody published it for: the paper's 10 of 57 and of 60, in proportion."""
    return round(depth * 10 / 58.5)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where a model of this family, depth and width looks at its references."""

    name: str  # of its file
    family: str
    depth: int
    hidden: int
    layers: tuple[int, ...]
    front_layers: int
    source: str  # of the layers, in words
    date: str = ""  # UTC
    versions: dict[str, str] = field(default_factory=dict)  # of what made it
    calibration: Calibration  # without rows where only the layers are known, as of the published ones

    def __post_init__(self) -> None:
        if not self.layers or sorted(set(self.layers) & set(range(self.depth))) != list(self.layers):
            raise ValueError(f"layers must be ascending and in [0, {self.depth - 1}], got {list(self.layers)}")
        if not 0 <= self.front_layers < self.depth:
            raise ValueError(f"front_layers must be in [0, {self.depth - 1}], got {self.front_layers}")
        if self.calibration.depth != self.depth:
            raise ValueError(f"the calibration is of {self.calibration.depth} layers, the model has {self.depth}")

    @classmethod
    def calibrated(cls, calibration: Calibration, top_m: int, **known: Any) -> Profile:
        """The Top-M of a calibration (Eq. 5); known: its name, family, hidden and versions."""
        steps = sorted(set(calibration.steps.tolist()))
        span = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
        return cls(
            depth=calibration.depth,
            layers=calibration.top(top_m),
            front_layers=default_front_layers(calibration.depth),
            source=f"Top-{top_m} of {len(calibration)} image-prompt pairs over {span} steps each, by ToPi Calibrate",
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            calibration=calibration,
            **known,
        )

    def fits(self, family: str, depth: int, hidden: int) -> bool:
        return (self.family, self.depth, self.hidden) == (family, depth, hidden)

    def check(self, family: str, depth: int, hidden: int) -> None:
        """ValueError where the profile is of another model."""
        if not self.fits(family, depth, hidden):
            raise ValueError(
                f"the profile {self.name!r} is for {self.family} with {self.depth} layers of width {self.hidden}, "
                f"this model is {family} with {depth} of width {hidden}; choose the profile 'auto', or another name"
            )


def shipped() -> dict[str, Path]:
    """The profiles of the pack by name."""
    return {path.stem: path for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}


def read(path: Path, name: str) -> Profile:
    """The profile in a file, called `name`; ValueError in one sentence that names the file where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its metadata do not say {FORMAT!r}")
            return _profile(name, metadata, {key: file.get_tensor(key) for key in TENSORS})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} is no profile that ToPi can use, or it is damaged: {what}") from None


def _profile(name: str, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Profile:
    for key, (dtype, axes) in TENSORS.items():
        found = tensors[key]
        if (found.dtype, found.ndim, len(found)) != (dtype, axes, len(tensors["pairs"])):
            raise ValueError(f"{key} is {found.dtype} of the shape {tuple(found.shape)}")
    values = tensors["sensitivity"]
    if not ((values >= 0) & (values <= 1 + 1e-4)).all():
        raise ValueError("sensitivity must be in [0, 1]")
    versions = json.loads(metadata["versions"])
    if not isinstance(versions, dict):
        raise ValueError("versions must be a JSON object")
    plain: dict[str, Any] = {key: metadata[key] for key in WORDS} | {key: int(metadata[key]) for key in NUMBERS}
    layers = tuple(map(int, metadata["layers"].split(",")))
    return Profile(name=name, layers=layers, versions=versions, calibration=Calibration(**tensors), **plain)


def to_bytes(profile: Profile) -> bytes:
    """The file; the same profile always gives the same bytes."""
    calibration = profile.calibration
    metadata = {
        "format": FORMAT,
        **{key: str(getattr(profile, key)) for key in (*WORDS, *NUMBERS)},
        "layers": ",".join(map(str, profile.layers)),
        "pairs": str(len(calibration)),
        "versions": json.dumps(profile.versions, sort_keys=True),
    }
    file = save({key: getattr(calibration, key).contiguous() for key in TENSORS}, metadata)
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:start]), sort_keys=True).encode()  # safetensors shuffles the metadata
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[start:]


def write(profile: Profile, path: Path) -> None:
    """All of the file or nothing of it, and never through a link."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(to_bytes(profile))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
