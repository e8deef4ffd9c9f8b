"""Where profiles lie: the pack's own, and the user's in ComfyUI's folders `models/topi` and `output/topi`.

ToPi Save Profile writes into the latter, and both are ComfyUI's model folder `topi`, as it does it with LoRAs; more can
be named in its `extra_model_paths.yaml`. Nothing outside of them is read or written.
"""

import logging
import os
import re
from pathlib import Path

import folder_paths

from ...topi_core import profiles
from ...topi_core.profiles import SUFFIX, Profile

FOLDER = "topi"
PLAIN = re.compile(r"[\w%+()-][\w%+() .-]{0,99}")
"""What a file, or a folder, may be called: nothing hidden, no way up, no drive."""

log = logging.getLogger(__name__)


def register() -> None:
    """Makes both folders known to ComfyUI; they need not be there."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(_output()))
    folder_paths.folder_names_and_paths[FOLDER][1].add(SUFFIX)


def _output() -> Path:
    return Path(folder_paths.get_output_directory(), FOLDER)


def _own() -> dict[str, Path]:
    """The user's profiles by name, like `mine.safetensors` or `flux/mine.safetensors`; links that lead out are not."""
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for path in sorted(root.rglob(f"*{SUFFIX}")):
            if path.is_file() and path.resolve().is_relative_to(root.resolve()):
                found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def names() -> list[str]:
    """The shipped profiles, then the user's. Files are not looked into: one that is none is refused when it is used."""
    return [*profiles.shipped(), *sorted(_own())]


def state(name: str) -> list[tuple[str, int, int]]:
    """What a choice of profile depends on, for ComfyUI's cache: the user's files that it may read."""
    chosen = {n: path.stat() for n, path in _own().items() if name in ("auto", n)}
    return sorted((n, stat.st_mtime_ns, stat.st_size) for n, stat in chosen.items())


def named(name: str, family: str, depth: int, hidden: int) -> Profile:
    """The profile of this name; ValueError where there is none, it cannot be read, or it is of another model."""
    known = profiles.shipped() | _own()
    if name not in known:
        raise ValueError(f"there is no profile {name!r}; there are: auto, {', '.join(known)}")
    profile = profiles.read(known[name], name)
    profile.check(family, depth, hidden)
    return profile


def automatic(family: str, depth: int, hidden: int) -> Profile | None:
    """The profile for a model by what it is: the newest of the user's that fit, else a shipped one, else none."""
    own, pack = [], [profiles.read(path, name) for name, path in profiles.shipped().items()]
    for name, path in _own().items():
        try:
            own.append(profiles.read(path, name))
        except ValueError as error:  # one that cannot be read is left out
            log.warning("ToPi: %s", error)
    own.sort(key=lambda profile: profile.date, reverse=True)
    return next((profile for profile in [*own, *pack] if profile.fits(family, depth, hidden)), None)


def target(name: str) -> Path:
    """The file in `output/topi` for a profile of this name; its folder is made. ValueError for what leads elsewhere."""
    parts = name.strip().removesuffix(SUFFIX).replace("\\", "/").split("/")
    if not all(PLAIN.fullmatch(part) for part in parts):
        raise ValueError(
            f"name must be that of a file in output/{FOLDER}, like 'my-model' or 'flux/my-model', with letters, "
            f"digits, spaces and . _ - + ( ) %, got {name!r}"
        )
    root = _output()
    root.mkdir(parents=True, exist_ok=True)
    try:
        folder, file, *_ = folder_paths.get_save_image_path("/".join(parts), str(root))
    except Exception as error:  # ComfyUI's own, of no particular class
        raise ValueError(f"name leads out of output/{FOLDER} through a link, got {name!r}") from error
    path = Path(folder, file + SUFFIX)
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"name leads out of output/{FOLDER} through a link, got {name!r}")
    return path
