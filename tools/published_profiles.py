"""The paper's layers as the profiles that the pack ships: `python -m tools.published_profiles`."""

from __future__ import annotations

import argparse

from topi_core.calibration import Calibration
from topi_core.profiles import FOLDER, SUFFIX, Profile, write

PUBLISHED = {
    "flux1-kontext": ("flux1", 57, (13, 18, 31), "FLUX.1 Kontext"),
    "qwen-image-edit": ("qwen_image", 60, (35, 37, 42), "Qwen-Image-Edit"),
}
"""Name -> family, depth, layers, model: arXiv 2602.01609, appendix C.3. Both are 3072 wide and exempt 10 layers."""


def write_published() -> None:
    """Writes them, the same bytes each time."""
    for name, (family, depth, layers, model) in PUBLISHED.items():
        source = f"arXiv 2602.01609, C.3 and 5.1: {model}, 48 image-prompt pairs, whose scores are not published"
        profile = Profile(
            name=name,
            family=family,
            depth=depth,
            hidden=3072,
            layers=layers,
            front_layers=10,
            source=source,
            date="2026-02",
            calibration=Calibration.of(depth),
        )
        write(profile, FOLDER / f"{name}{SUFFIX}")


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.published_profiles", description=__doc__).parse_args()
    write_published()


if __name__ == "__main__":
    main()
