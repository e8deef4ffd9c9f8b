"""Profiles: which layers are representative (Eq. 5) in which model, and the calibration that says so, as files.

A profile is a safetensors file: what one reads stands in its metadata, the calibration in three small tensors. Nothing
in it is ever executed, and what does not fit is refused with the name of the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .calibration import Calibration

FOLDER = Path(__file__).parent / "profiles"
SUFFIX = ".safetensors"
FORMAT = "topi profile 1"
TENSORS = {"pairs": (torch.int64, 1), "sensitivity": (torch.float64, 2), "steps": (torch.int64, 1)}


def default_front_layers(depth: int) -> int:
    """Where pruning starts in a model that nobody published it for: the paper's 10 of 57 and of 60, in proportion."""
    return round(depth * 10 / 58.5)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where a model of this family, depth and width looks at its references.

    `source` says in words where the layers come from, `date` (UTC) when, `versions` of what made it. `calibration` has
    no rows where only the layers are known, as of the published ones. `name` is that of the file.
    """

    name: str
    family: str
    depth: int
    hidden: int
    layers: tuple[int, ...]
    front_layers: int
    source: str
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    calibration: Calibration

    def __post_init__(self) -> None:
        layers = self.layers
        if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= self.depth:
            raise ValueError(f"layers must be ascending and in [0, {self.depth - 1}], got {list(layers)}")
        if not 0 <= self.front_layers < self.depth:
            raise ValueError(f"front_layers must be in [0, {self.depth - 1}], got {self.front_layers}")
        if self.calibration.depth != self.depth:
            raise ValueError(f"the calibration is of {self.calibration.depth} layers, the model has {self.depth}")

    @classmethod
    def calibrated(
        cls, calibration: Calibration, top_m: int, *, name: str, family: str, hidden: int, versions: dict[str, str]
    ) -> Profile:
        """The Top-M of a calibration (Eq. 5)."""
        steps = sorted(set(calibration.steps.tolist()))
        span = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
        return cls(
            name=name,
            family=family,
            depth=calibration.depth,
            hidden=hidden,
            layers=calibration.top(top_m),
            front_layers=default_front_layers(calibration.depth),
            source=f"Top-{top_m} of {len(calibration)} image-prompt pairs over {span} steps each, by ToPi Calibrate",
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=versions,
            calibration=calibration,
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
            return replace(_profile(metadata, {key: file.get_tensor(key) for key in TENSORS}), name=name)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} is no profile that ToPi can use, or it is damaged: {what}") from None


def _profile(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Profile:
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
    return Profile(
        name="",
        family=metadata["family"],
        depth=int(metadata["depth"]),
        hidden=int(metadata["hidden"]),
        layers=tuple(int(layer) for layer in metadata["layers"].split(",")),
        front_layers=int(metadata["front_layers"]),
        source=metadata["source"],
        date=metadata["date"],
        versions=versions,
        calibration=Calibration(**tensors),
    )


def to_bytes(profile: Profile) -> bytes:
    """The file; the same profile always gives the same bytes."""
    calibration = profile.calibration
    metadata = {
        "format": FORMAT,
        "family": profile.family,
        "depth": str(profile.depth),
        "hidden": str(profile.hidden),
        "layers": ",".join(map(str, profile.layers)),
        "front_layers": str(profile.front_layers),
        "pairs": str(len(calibration)),
        "source": profile.source,
        "date": profile.date,
        "versions": json.dumps(profile.versions, sort_keys=True),
    }
    file = save({f.name: getattr(calibration, f.name).contiguous() for f in fields(calibration)}, metadata)
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
