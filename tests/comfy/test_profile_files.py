"""The user's profiles: where they are read from and written to, which one `auto` takes, and what is refused."""

import asyncio
import logging
import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_execution.caching import CacheKeySetInputSignature
from comfy_execution.graph import DynamicPrompt
from execution import IsChangedCache
from sampling import calibrate, conditioning, empty, last_calibration, last_run, latent, patch, run_node, sample
from small_models import FAMILIES, FLUX1, FLUX2, QWEN, by_family, shared

import nodes
from topi_core import profiles
from topi_core.calibration import Calibration
from topi_core.profiles import Profile


@pytest.fixture(autouse=True)
def folders(comfyui):
    """The model folder and the output folder, both empty."""
    models, output = Path(folder_paths.models_dir, "topi"), Path(folder_paths.get_output_directory(), "topi")
    for folder in (models, output):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    yield models, output
    for folder in (models, output):
        shutil.rmtree(folder, ignore_errors=True)


def options() -> list[str]:
    """What the page offers as ToPi Settings' profile."""
    schema = nodes.NODE_CLASS_MAPPINGS["ToPiSettings"].GET_SCHEMA()
    return next(i.options for i in schema.inputs if i.id == "profile")


WIDTHS = {"krea2": 512}  # and 256


def make(family, layers=(1, 2), hidden=None, depth=None, date="2026-01-01"):
    depth, hidden = depth or family.depth, hidden or WIDTHS.get(family.name, 256)
    return Profile(
        name="", family=family.name, depth=depth, hidden=hidden, layers=layers, front_layers=1, source="a test",
        date=date, calibration=Calibration.of(depth),
    )  # fmt: skip


def run(calibrating, model, seed=0, family=FLUX1, steps=2):
    positive = conditioning(family, [latent(family, seed=seed)], seed=seed)
    return {"samples": sample(model, positive, latent=empty(family), steps=steps)}


def save(calibrating, latent_, name="mine", merge=True):
    return run_node("ToPiSaveProfile", calibration=calibrating, latent=latent_, name=name, merge=merge)


def test_the_model_folder_is_known_to_comfyui(folders):
    known = folder_paths.get_folder_paths("topi")
    assert [str(folder) for folder in folders] == known
    assert folder_paths.folder_names_and_paths["topi"][1] == {".safetensors"}


def test_a_saved_profile_is_offered_and_used(folders):
    model, calibrating = calibrate(shared(FLUX1))
    made = run(calibrating, model)
    before = options()
    plot, text = save(calibrating, made, "flux/mine")
    assert plot.shape == (1, 480, 960, 3) and "1 image-prompt pair" in text
    assert (folders[1] / "flux" / "mine.safetensors").is_file()
    assert options() == [*before, "flux/mine.safetensors"]
    assert before == ["auto", *profiles.shipped()]
    for profile in ("flux/mine.safetensors", "auto"):
        patched, trace = patch(shared(FLUX1), profile=profile)
        run(calibrating, patched)
        assert last_run(trace).layers == last_calibration(calibrating).top(3) and not last_run(trace).found_layers
        assert last_run(trace).model.profile == "flux/mine.safetensors"


def test_merging_on_disk_is_exact_and_knows_a_pair_again(folders):
    """Four pairs one after the other, two and two, and one of them twice."""
    model, calibrating = calibrate(shared(FLUX1))
    made = [run(calibrating, model, seed) for seed in range(4)]
    for latent_ in made:
        save(calibrating, latent_, "one by one")
    for name, part in (("a", made[:2]), ("b", made[2:])):
        for latent_ in part:
            save(calibrating, latent_, name)
    a, b, all_ = (profiles.read(folders[1] / f"{name}.safetensors", name) for name in ("a", "b", "one by one"))
    assert (len(a.calibration), len(b.calibration), len(all_.calibration)) == (2, 2, 4)
    assert a.calibration.merge(b.calibration).equals(all_.calibration)
    assert all_.layers == all_.calibration.top(3)

    file = folders[1] / "one by one.safetensors"
    before = file.read_bytes()
    save(calibrating, made[2], "one by one")
    save(calibrating, run(calibrating, model, 2), "one by one")
    assert file.read_bytes() == before

    save(calibrating, made[3], "one by one", merge=False)
    assert len(profiles.read(file, "").calibration) == 1


def test_a_run_goes_only_where_it_is_saved(folders):
    """What other prompts made with the same node stays out of a profile."""
    model, calibrating = calibrate(shared(FLUX1))
    first, second = run(calibrating, model, 1), run(calibrating, model, 2)
    save(calibrating, second, "second")
    assert len(profiles.read(folders[1] / "second.safetensors", "").calibration) == 1
    with pytest.raises(ValueError, match="connect the output of the sampler that the same ToPi Calibrate feeds"):
        save(calibrating, {"samples": first["samples"] + 1})


def cached_as(profile: str | None) -> object:
    """What ComfyUI's cache knows ToPi Patch by, with ToPi Settings in front of it where a profile is given."""
    inputs = {"mode": "prune", "update_interval": 0, "tolerance": 0.0, "tau": 0.85}
    prompt = {"1": {"class_type": "ToPiPatch", "inputs": inputs}}
    if profile is not None:
        fields = nodes.NODE_CLASS_MAPPINGS["ToPiSettings"].GET_SCHEMA().inputs
        values = {field.id: field.default for field in fields} | {"profile": profile}
        prompt |= {"2": {"class_type": "ToPiSettings", "inputs": values}}
        inputs["settings"] = ["2", 0]

    async def key():
        graph = DynamicPrompt(prompt)
        keys = CacheKeySetInputSignature(graph, prompt, IsChangedCache("a test", graph, None))
        await keys.add_keys(prompt)
        return keys.get_data_key("1")

    return asyncio.run(key())


@pytest.mark.parametrize(
    ("profile", "read"),
    [(None, True), ("auto", True), ("mine.safetensors", True), ("flux1-kontext", False)],
    ids=["without ToPi Settings", "auto", "by its name", "another one"],
)
def test_topi_patch_runs_again_when_a_profile_that_it_may_read_came_or_changed_or_went(folders, profile, read):
    model, calibrating = calibrate(shared(FLUX1))
    seen = []
    for seed in (1, 2, None):
        seen.append(cached_as(profile))
        assert cached_as(profile) == seen[-1]
        if seed:
            save(calibrating, run(calibrating, model, seed))
    assert len(set(seen)) == (3 if read else 1)
    (folders[1] / "mine.safetensors").unlink()
    assert cached_as(profile) == seen[0]


def test_a_deleted_or_changed_profile_is_noticed_by_what_saves_it(folders):
    save_node = nodes.NODE_CLASS_MAPPINGS["ToPiSaveProfile"]
    model, calibrating = calibrate(shared(FLUX1))
    states = []
    for seed in (1, 2, None):
        states.append(save_node.fingerprint_inputs(name="mine"))
        assert save_node.fingerprint_inputs(name="mine") == states[-1]
        if seed:
            save(calibrating, run(calibrating, model, seed))
    assert len(set(states)) == 3
    (folders[1] / "mine.safetensors").unlink()
    assert save_node.fingerprint_inputs(name="mine") == states[0]


@pytest.mark.parametrize("name", [
    "../escape", "..", "a/../../escape", "/etc/escape", "\\escape", "C:\\escape", "a//b", ".hidden", "a/.hidden", "",
    " ", "a\0b", "a\nb", "x" * 300, "~/escape", "a/..",
])  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(folders, name):
    model, calibrating = calibrate(shared(FLUX1))
    before = _files(folders[1].parent.parent)
    with pytest.raises(ValueError) as refusal:
        save(calibrating, run(calibrating, model), name)
    assert "output/topi" in str(refusal.value) and repr(name) in str(refusal.value)
    assert _files(folders[1].parent.parent) == before


def _files(folder):
    return sorted(str(path) for path in folder.rglob("*") if "temp" not in path.parts)


@pytest.mark.parametrize("link", ["folder", "file"])
def test_links_that_leave_the_folder_are_neither_read_nor_written(folders, tmp_path, link):
    profiles.write(make(FLUX1), tmp_path / "mine.safetensors")
    before = (tmp_path / "mine.safetensors").read_bytes()
    for folder in folders:
        if link == "folder":
            (folder / "out").symlink_to(tmp_path, target_is_directory=True)
        else:
            (folder / "out").mkdir()
            (folder / "out" / "mine.safetensors").symlink_to(tmp_path / "mine.safetensors")
    assert "out/mine.safetensors" not in options()
    with pytest.raises(ValueError, match=r"there is no profile 'out/mine\.safetensors'"):
        patch(shared(FLUX1), profile="out/mine.safetensors")
    patched, trace = patch(shared(FLUX1))
    model, calibrating = calibrate(shared(FLUX1))
    made = run(calibrating, patched, steps=1)
    assert last_run(trace).found_layers
    made = run(calibrating, model)
    with pytest.raises(ValueError, match="name leads out of output/topi through a link"):
        save(calibrating, made, "out/mine")
    assert (tmp_path / "mine.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["../mine.safetensors", "/mine.safetensors", "../../secret", "mine", ""])
def test_a_profile_is_chosen_by_its_listed_name_only(folders, tmp_path, name):
    profiles.write(make(FLUX1), folders[1] / "mine.safetensors")
    profiles.write(make(FLUX1), folders[1].parent / "mine.safetensors")
    with pytest.raises(ValueError, match="there is no profile") as refusal:
        patch(shared(FLUX1), profile=name)
    assert "mine.safetensors" in str(refusal.value) and "flux1-kontext" in str(refusal.value)
    (folders[1].parent / "mine.safetensors").unlink()


def test_a_bad_file_stops_neither_the_list_nor_auto(folders, caplog):
    (folders[0] / "bad.safetensors").write_bytes(b"no profile")
    (folders[1] / "weights.safetensors").write_bytes(profiles.to_bytes(make(FLUX1))[:-1] + b"?")
    (folders[1] / "notes.txt").write_text("not listed")
    profiles.write(make(FLUX1, (3, 5)), folders[1] / "good.safetensors")
    assert options()[-3:] == ["bad.safetensors", "good.safetensors", "weights.safetensors"]
    with pytest.raises(ValueError, match=r"topi/bad\.safetensors is no profile") as refusal:
        patch(shared(FLUX1), profile="bad.safetensors")
    assert "\n" not in str(refusal.value)
    with caplog.at_level(logging.INFO):
        patched, trace = patch(shared(FLUX1))
    assert "bad.safetensors is no profile" in caplog.text
    run(None, patched)
    assert last_run(trace).layers == (3, 5)


def test_a_bad_file_is_not_merged_into_but_replaced_when_asked(folders):
    file = folders[1] / "mine.safetensors"
    file.write_bytes(b"no profile")
    model, calibrating = calibrate(shared(FLUX1))
    made = run(calibrating, model)
    with pytest.raises(ValueError, match=r"mine\.safetensors is no profile"):
        save(calibrating, made)
    assert file.read_bytes() == b"no profile"
    save(calibrating, made, merge=False)
    assert len(profiles.read(file, "").calibration) == 1


def test_a_profile_of_another_model_is_not_merged_into(folders):
    profiles.write(make(FLUX2), folders[1] / "mine.safetensors")
    model, calibrating = calibrate(shared(FLUX1))
    with pytest.raises(ValueError, match="is for flux2 with 4 layers of width 256, this model is flux1 with 8"):
        save(calibrating, run(calibrating, model))


@by_family
def test_auto_takes_the_profile_of_what_the_model_is(folders, family):
    """Among profiles of every family, of other depths and of other widths, whatever the files are called."""
    for i, other in enumerate(FAMILIES):
        profiles.write(make(other, (0, 2)), folders[0] / f"{FAMILIES[i - 1].name}.safetensors")
        profiles.write(make(other, (0, 3), hidden=1024, date="2027"), folders[0] / f"{other.name} wide.safetensors")
        profiles.write(make(other, (0, 3), depth=57, date="2027"), folders[0] / f"{other.name} deep.safetensors")
    patched, trace = patch(shared(family))
    run(None, patched, family=family)
    assert last_run(trace).layers == (0, 2) and last_run(trace).model.front_layers == 1
    assert last_run(trace).model.layers == (0, 2)


def test_auto_prefers_the_newest_of_the_users(folders):
    for name, layers, date in (("a", (1,), "2026-03-01"), ("b", (2,), "2026-03-03"), ("c", (3,), "2026-03-02")):
        profiles.write(make(FLUX1, layers, date=date), folders[layers[0] % 2] / f"{name}.safetensors")
    patched, trace = patch(shared(FLUX1))
    run(None, patched)
    assert last_run(trace).layers == (2,)


def test_auto_takes_the_demo_models_own_profile(folders):
    """And the user's for it before the shipped one."""
    shipped = profiles.read(profiles.shipped()["topi-demo"], "topi-demo")
    model, _, _ = run_node("ToPiDemoModel")
    assert _layers(model) == shipped.layers
    profiles.write(make(FLUX1, (5,), depth=12), folders[1] / "demo.safetensors")
    assert _layers(model) == (5,)


def _layers(model):
    patched, _ = patch(model)
    wrapper = patched.wrappers["outer_sample"]["topi"][0]
    return wrapper.__self__.model.layers


@pytest.mark.parametrize(
    "inputs", [{"layers": "1,4"}, {"front_layers": 3}, {"layers": "1,4", "front_layers": 3}], ids=str
)
def test_what_is_typed_takes_the_place_of_the_profiles(folders, inputs):
    profiles.write(make(FLUX1, (2, 6)), folders[1] / "mine.safetensors")
    patched, trace = patch(shared(FLUX1), **inputs)
    run(None, patched)
    found = last_run(trace)
    assert found.layers == ((1, 4) if "layers" in inputs else (2, 6))
    assert found.model.front_layers == inputs.get("front_layers", 1)


def test_the_folders_need_not_be_there(folders):
    for folder in folders:
        shutil.rmtree(folder)
    assert options() == ["auto", *profiles.shipped()]
    model, calibrating = calibrate(shared(QWEN))
    save(calibrating, run(calibrating, model, family=QWEN), "mine.safetensors")
    assert options()[-1] == "mine.safetensors"
    assert torch.equal(
        profiles.read(folders[1] / "mine.safetensors", "").calibration.sensitivity,
        last_calibration(calibrating).sensitivity,
    )
