"""Profiles as files: what is written comes back, and what is none is refused by name."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save, save_file

from tools import published_profiles
from topi_core import profiles
from topi_core.calibration import Calibration
from topi_core.profiles import Profile, default_front_layers, read, to_bytes, write


def calibration(pairs=3, depth=8):
    values = torch.rand(pairs, depth, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Calibration.of(depth, [(i, row, 20) for i, row in enumerate(values)])


def profile(**changes):
    made = dict(family="flux1", hidden=256, name="mine", versions={"torch": "2"})
    return Profile.calibrated(calibration(), 3, **made | changes)


def test_what_is_written_comes_back(tmp_path):
    path, made = tmp_path / "a.safetensors", profile()
    write(made, path)
    again = read(path, "mine")
    assert again.calibration.equals(made.calibration)
    assert (again.layers, again.front_layers) == (calibration().top(3), 1)
    assert "Top-3 of 3 image-prompt pairs over 20 steps each" in again.source
    assert to_bytes(again) == to_bytes(made) == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_profile_is_readable_without_topi(tmp_path):
    """By anything that knows safetensors: its metadata are words."""
    data = to_bytes(profile())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["layers"] == ",".join(map(str, calibration().top(3)))
    assert {"family", "depth", "hidden", "front_layers", "pairs", "date", "versions"} <= set(header["__metadata__"])


def test_shipped_profiles_are_what_the_commands_write(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    monkeypatch.setattr(published_profiles, "FOLDER", tmp_path)
    published_profiles.write_published()
    written = profiles.shipped()
    monkeypatch.undo()
    assert set(written) == set(published_profiles.PUBLISHED)
    for name, path in written.items():
        assert path.read_bytes() == profiles.shipped()[name].read_bytes()
        assert "2602.01609" in read(path, name).source
    for name, path in profiles.shipped().items():
        assert path.stat().st_size < 100_000
        assert read(path, name).source


def test_published_layers():
    for name, layers in (("flux1-kontext", (13, 18, 31)), ("qwen-image-edit", (35, 37, 42))):
        known = read(profiles.shipped()[name], name)
        assert (known.layers, known.front_layers, known.hidden) == (layers, 10, 3072)


def test_front_layers_in_proportion_to_the_published_ones():
    assert default_front_layers(57) == default_front_layers(60) == 10
    assert default_front_layers(12) == 2
    assert all(0 <= default_front_layers(depth) < depth for depth in range(1, 200))


def damaged(data):
    half = len(data) // 2
    return data[:half] + b"\x00" * 40 + data[half + 40 :]


TENSORS = {"pairs": torch.arange(3), "sensitivity": torch.rand(3, 8).double(), "steps": torch.arange(3)}
METADATA = {
    "format": profiles.FORMAT, "family": "flux1", "depth": "8", "hidden": "256", "layers": "1,2", "front_layers": "1",
    "source": "", "date": "", "versions": "{}",
}  # fmt: skip


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('pickle was loaded')",)


BAD = {
    "empty": b"",
    "no safetensors": b"hello, this is no profile at all",
    "truncated": to_bytes(profile())[:-5],
    "cut in the header": to_bytes(profile())[:100],
    "damaged": damaged(to_bytes(profile())),
    "a pickle": pickle.dumps(Trap()),
    "a model's weights": save({"weight": torch.zeros(4, 4)}),
    "another program's": save(TENSORS, {"format": "pt"}),
    "without layers": save(TENSORS, {k: v for k, v in METADATA.items() if k != "layers"}),
    "layers that are no numbers": save(TENSORS, METADATA | {"layers": "a,b"}),
    "layers beyond its depth": save(TENSORS, METADATA | {"layers": "1,8"}),
    "layers twice": save(TENSORS, METADATA | {"layers": "1,1"}),
    "front layers beyond its depth": save(TENSORS, METADATA | {"front_layers": "8"}),
    "another depth": save(TENSORS, METADATA | {"depth": "9"}),
    "versions that are no object": save(TENSORS, METADATA | {"versions": "[1]"}),
    "versions that are no JSON": save(TENSORS, METADATA | {"versions": "{"}),
    "without pairs": save({k: v for k, v in TENSORS.items() if k != "pairs"}, METADATA),
    "fewer pairs": save(TENSORS | {"pairs": torch.arange(2)}, METADATA),
    "pairs of two axes": save(TENSORS | {"pairs": torch.zeros(3, 1, dtype=torch.int64)}, METADATA),
    "a number for a tensor": save(TENSORS | {"steps": torch.tensor(3)}, METADATA),
    "another type": save(TENSORS | {"sensitivity": torch.rand(3, 8)}, METADATA),
    "not finite": save(TENSORS | {"sensitivity": torch.full((3, 8), float("nan")).double()}, METADATA),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_profile_is_refused_in_one_sentence_that_names_the_file(tmp_path, kind):
    path = tmp_path / "strange.safetensors"
    path.write_bytes(BAD[kind])
    with pytest.raises(ValueError, match=re.escape(str(path))) as refusal:
        read(path, "strange")
    assert "\n" not in str(refusal.value)


def test_the_tests_own_file_is_sound(tmp_path):
    """Each of the bad ones differs from it in one thing."""
    save_file(TENSORS, tmp_path / "a.safetensors", METADATA)
    assert read(tmp_path / "a.safetensors", "a").layers == (1, 2)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "b.safetensors").mkdir()
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is no profile"):
            read(tmp_path / f"{name}.safetensors", name)


@pytest.mark.parametrize("other", [("flux2", 8, 256), ("flux1", 12, 256), ("flux1", 8, 3072)])
def test_another_model_is_refused(other):
    made = profile()
    made.check("flux1", 8, 256)
    assert not made.fits(*other)
    with pytest.raises(ValueError) as refusal:
        made.check(*other)
    assert all(str(word) in str(refusal.value) for word in ("mine", "flux1", 8, 256, *other))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(profile(), path)
    before = path.read_bytes()
    monkeypatch.setattr(profiles, "to_bytes", lambda profile: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(profile(), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
