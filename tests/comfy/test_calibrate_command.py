"""`tools/calibrate.py` against the real server, with the demo model."""

import json
import random
import subprocess
import sys

import pytest
from PIL import Image

from tools import calibrate
from topi_core import profiles
from topi_demo import edits
from topi_demo.demo import WAYS, WORKFLOW, variant
from topi_demo.runtime import PACK
from topi_demo.server import running
from topi_demo.workflow import to_prompt

PROMPTS = ("make it night", "make it winter", "blur the image")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


@pytest.fixture
def pairs(tmp_path):
    """A folder of three pairs."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        image = edits.example(random.Random(i), edits.parse(prompt), 128).references[0]
        picture = Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt + "\n", encoding="utf-8")
    return folder


def node(type_, title="", **inputs):
    return {"class_type": type_, "inputs": inputs, "_meta": {"title": title or type_}}


@pytest.fixture
def workflow(tmp_path):
    """An edit in the API's format, as one without ToPi's nodes would have it; the image is saved at its end."""
    nodes = {
        "1": node("ToPiDemoModel"),
        "2": node("LoadImage", image="none.png"),
        "3": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "4": node("CLIPTextEncode", "Prompt", text="keep the image", clip=["1", 1]),
        "5": node("ReferenceLatent", conditioning=["4", 0], latent=["3", 0]),
        "6": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "7": node("ToPiPatch", model=["1", 0], mode="prune", update_interval=10, tolerance=0.0, tau=0.5),
        "8": node(
            "KSampler", model=["7", 0], positive=["5", 0], negative=["5", 0], latent_image=["6", 0], seed=1, steps=2,
            cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["1", 2]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="edit"),
    }  # fmt: skip
    path = tmp_path / "edit_api.json"
    path.write_text(json.dumps(nodes), encoding="utf-8")
    return path


def history(server) -> dict:
    return json.loads(server.get("/history"))


def profile(server, tmp_path, name):
    path = tmp_path / "fetched.safetensors"
    path.write_bytes(server.get(f"/view?filename={name}.safetensors&subfolder=topi&type=output"))
    return profiles.read(path, name)


def test_it_goes_on_where_it_stopped(server, pairs, workflow, tmp_path, capsys):
    arguments = [str(pairs), "--workflow", str(workflow), "--name", "resumed", "--server", server.address]
    (pairs / "2.txt").write_text("make it gloomy", encoding="utf-8")
    assert calibrate.main(arguments) == 1
    said = capsys.readouterr().err
    assert "2 of 3 pairs" in said and "2.png: CLIPTextEncode failed" in said and "'gloomy'" in said
    assert len(profile(server, tmp_path, "resumed").calibration) == 2
    before = set(history(server))

    (pairs / "2.txt").write_text(PROMPTS[2], encoding="utf-8")
    assert calibrate.main(arguments) == 0
    out, said = capsys.readouterr()
    assert "3 of 3 pairs" in said and "3 image-prompt pairs" in out
    assert len(set(history(server)) - before) == 1
    after = set(history(server))

    assert calibrate.main(arguments) == 0
    assert "All pairs were done before" in capsys.readouterr().out
    assert set(history(server)) == after

    made = profile(server, tmp_path, "resumed")
    assert made.fits("flux1", 12, 256) and made.calibration.steps.tolist() == [2, 2, 2]
    outputs = [output for prompt in history(server).values() for output in prompt["outputs"].values()]
    assert all("text" in output for output in outputs)  # of the workflow, only what leads to the sampler was run


def test_the_same_pairs_from_a_list_make_the_same_profile(server, pairs, workflow, tmp_path):
    """And with ToPi's nodes in the workflow, and both of its inputs named."""
    nodes = json.loads(workflow.read_text("utf-8"))
    nodes["20"] = node("ToPiCalibrate", model=["1", 0], top_m=2)
    nodes["8"]["inputs"]["model"] = ["20", 0]
    nodes["21"] = node("ToPiSaveProfile", calibration=["20", 1], latent=["8", 0], name="other", merge=False)
    with_nodes = tmp_path / "with_nodes.json"
    with_nodes.write_text(json.dumps(nodes), encoding="utf-8")
    lines = [json.dumps({"image": f"{i}.png", "prompt": prompt}) for i, prompt in enumerate(PROMPTS)]
    (pairs / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    both = []
    for source, file, name, more in (
        (pairs, workflow, "folder", []),
        (pairs / "list.jsonl", with_nodes, "listed", ["--image", "2", "--prompt", "Prompt"]),
    ):
        arguments = [str(source), "--workflow", str(file), "--name", name, "--server", server.address, *more]
        assert calibrate.main(arguments) == 0
        both.append(profile(server, tmp_path, name))
    assert both[0].calibration.equals(both[1].calibration)
    assert [len(each.layers) for each in both] == [3, 2]


def test_a_profile_that_is_gone_is_begun_anew(server, pairs, workflow, tmp_path):
    """The journal speaks of a profile that the server does not have."""
    arguments = [str(pairs), "--workflow", str(workflow), "--name", "gone", "--server", server.address]
    ready = calibrate.prepare(json.loads(workflow.read_text("utf-8")), "gone", 3)
    marks = [pair.digest(json.dumps(ready, sort_keys=True)) for pair in calibrate.read_pairs(pairs)]
    (pairs / ".gone.done").write_text("\n".join(marks) + "\n", encoding="utf-8")
    assert calibrate.main(arguments) == 0
    assert len(profile(server, tmp_path, "gone").calibration) == 3


def test_a_workflow_of_the_page_is_cut_to_what_leads_to_the_sampler(server):
    """The quickstart, as the page would queue it: no preview, no decoding, no pruning."""
    page = json.loads(WORKFLOW.read_text("utf-8"))
    prompt = to_prompt(variant(page, 1, "make it night", WAYS["prune"]), server.object_info())
    classes = {n["class_type"] for n in calibrate.prepare(prompt, "x", 3).values()}
    assert {"ToPiCalibrate", "ToPiSaveProfile", "KSampler", "ReferenceLatent"} <= classes
    assert not {"SaveImage", "VAEDecode", "ToPiPatch", "ToPiReport", "ToPiMaskPreview", "PreviewImage"} & classes


def test_it_needs_nothing_but_python():
    """No site-packages, and not this repository on the path."""
    command = [sys.executable, "-I", "-S", str(PACK / "tools" / "calibrate.py"), "--help"]
    assert "image-prompt pairs" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def change(workflow, **changes):
    nodes = json.loads(workflow.read_text("utf-8"))
    for id_, new in changes.items():
        nodes[id_.strip("_")] = new
    workflow.write_text(json.dumps({id_: n for id_, n in nodes.items() if n}), encoding="utf-8")


@pytest.mark.parametrize(("prepare", "more", "sentence"), [
    (lambda pairs, w: (pairs / "1.txt").unlink(), [], "1.png has no prompt beside it: 1.txt is missing"),
    (lambda pairs, w: [file.unlink() for file in pairs.iterdir()], [], "holds no image-prompt pairs"),
    (lambda pairs, w: w.write_text("{"), [], "edit_api.json cannot be read"),
    (lambda pairs, w: w.write_text('{"nodes": []}'), [], "is not in ComfyUI's API format"),
    (lambda pairs, w: None, ["--image", "Nowhere"], "has the id, title or class 'Nowhere'; its classes are:"),
    (lambda pairs, w: None, ["--prompt", "LoadImage"], "node 2 (LoadImage) has no input"),
    (lambda pairs, w: None, ["--image", "2", "--image", "2"], "0.png is one of 1 images, but --image names 2"),
    (lambda pairs, w: None, ["--image", "SaveImage"], "does not lead to the sampler"),
    (lambda pairs, w: change(w, _20=node("CLIPTextEncode", "Other", text="", clip=["1", 1])), [],
     "several nodes of the workflow are called 'CLIPTextEncode': 4 (Prompt), 20 (Other)"),
    (lambda pairs, w: change(w, _8=None), [], "the workflow has 0 samplers"),
    (lambda pairs, w: change(w, _4=node("CLIPTextEncode", text=["20", 0], clip=["1", 1])), [],
     "comes from node 20; name that one with --prompt"),
    (lambda pairs, w: None, ["--server", "http://127.0.0.1:9"], "no ComfyUI answers at http://127.0.0.1:9"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(pairs, workflow, capsys, prepare, more, sentence):
    prepare(pairs, workflow)
    assert calibrate.main([str(pairs), "--workflow", str(workflow), "--name", "x", *more]) == 1
    assert sentence in capsys.readouterr().err


def test_what_the_server_refuses_is_said_in_its_words(server, pairs, workflow, capsys):
    change(workflow, _6=node("EmptySD3LatentImage", width=-5, height=128, batch_size=1))
    arguments = [str(pairs), "--workflow", str(workflow), "--name", "x", "--server", server.address]
    assert calibrate.main(arguments) == 1
    assert "the server refused /prompt: Value -5 smaller than min" in capsys.readouterr().err
