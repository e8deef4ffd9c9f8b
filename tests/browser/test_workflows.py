"""The example workflows and ComfyUI's own edit templates, opened in the real page and run to the end.

What runs is the prompt that the page would queue; only its loaders give way to the small models of `standins`.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.page import Page
from topi_demo.server import Result, ServerError

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
OURS = sorted(path.stem for path in FOLDER.glob("*.json"))

STAND_INS = {
    "UNETLoader": ("StandInModel", "unet_name"),
    "DualCLIPLoader": ("StandInClip", "type"),
    "CLIPLoader": ("StandInClip", "type"),
    "VAELoader": ("StandInVae", "vae_name"),
}
FAMILIES = {  # by what the names of files and of CLIP types begin with
    "flux1-dev-kontext": "flux1", "ae.": "flux1", "flux2": "flux2", "flux-2": "flux2",
    "full_encoder_small_decoder": "flux2", "flux": "flux1",
    "qwen_image": "qwen_image", "FireRed-Image-Edit": "qwen_image",
}  # fmt: skip
FILE_INPUTS = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name", "image"}
SAMPLERS = ("KSampler", "CFGGuider", "BasicGuider")

REFERENCE_NODES = {"ReferenceLatent", "TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus"}
OFFICIAL = (
    "flux_kontext_dev_basic",
    "image_flux2",
    "image_flux2_fp8",
    "image_flux2_klein_image_edit_4b_base",
    "image_flux2_klein_image_edit_4b_distilled",
    "image_flux2_klein_image_edit_9b_base",
    "image_flux2_klein_image_edit_9b_distilled",
    "image_qwen_image_edit",
    "image_qwen_image_edit_2509",
    "image_qwen_image_edit_2509_relight",
    "image_qwen_image_edit_2511",
    "image_qwen_image_edit_2511_int8",
    "image-qwen_image_edit_2511_lora_inflation",
    "image_firered_image_edit1_1",
    "02_qwen_Image_edit_subgraphed",
    "template_qwen_image_edit_2511_systms_action",
    "templates-image_to_real",
    "templates-portrait_light_migration",
    "templates_rob_portrait_light_migration.app",
)
KV_CACHE = "image_flux2_klein_9b_kv_image_edit"
LEFT_OUT = {
    "flux1_dev_uso_reference_image_gen": "its style comes through a model patch and a vision encoder without stand-ins",
    "gsl_starter_1_3": "its edit is bypassed when it is opened",
    "image_krea2_turbo_int8_image_style_reference": "a style reference; no small text encoder stands for Krea 2's yet",
    "image_longcat_image_edit": "FLUX.1's network with other words; not among the models that ToPi names",
    "image_omnigen2_image_edit": "no small text encoder stands for OmniGen2's yet",
    "image_qwen_image_layered": "takes a picture apart; its VAE of four channels has no stand-in yet",
    "image_qwen_image_layered_control": "takes a picture apart; its VAE of four channels has no stand-in yet",
    "image_qwen_image_union_control_lora": "text to image; its reference is a control map",
    "templates-1_click_multiple_character_angles-v1.0": "eight times the edit of image_qwen_image_edit_2511",
    "templates-1_click_multiple_scene_angles-v1.0": "eight times the edit of image_qwen_image_edit_2509",
    "templates-all_in_one-image_edit_models": "has API nodes, which ask services for money",
}
SMALLER = {  # an empty latent has cells of 8 pixels, and the stand-in for Qwen-Image's VAE has larger ones
    "02_qwen_Image_edit_subgraphed": ("EmptySD3LatentImage", {"width": 128, "height": 128}),
}


@pytest.fixture(scope="module")
def info(server) -> dict:
    with ThreadPoolExecutor(1) as other:  # Playwright has this thread's event loop
        return other.submit(server.object_info).result()


@pytest.fixture(scope="module")
def opened(context, server, info) -> Page:
    page = Page(context.new_page(), server.address)
    page.open(vue=False)
    yield page
    page.close()


@pytest.fixture(scope="module")
def run(server, temp_folder):
    """Runs a prompt whose pictures are drawn first -> what it gave."""

    def run(prompt: dict) -> Result:
        for node in prompt.values():
            if node["class_type"] == "LoadImage":
                draw(temp_folder.parent / "input" / node["inputs"]["image"])
        with ThreadPoolExecutor(1) as other:
            return other.submit(server.run, prompt).result()

    return run


def draw(path: Path) -> None:
    """Squares of random colours; another picture and shape for another name."""
    random = np.random.default_rng(sum(path.name.encode()))
    picture = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    size = ((600, 400), (400, 600), (512, 512))[len(path.name) % 3]
    path.parent.mkdir(exist_ok=True)
    picture.resize(size, Image.NEAREST).save(path)


def on_the_page(page: Page) -> dict:
    return page.run("() => app.graphToPrompt().then((prompt) => prompt.output)")


def family(name: str) -> str:
    found = [family for start, family in FAMILIES.items() if name.startswith(start)]
    assert found, f"no small model stands for {name}"
    return found[0]


def with_stand_ins(prompt: dict) -> dict:
    """Loaders give way to small models of the same family; everything else stays."""
    changed = {}
    for key, node in prompt.items():
        if node["class_type"] in STAND_INS:
            stand_in, name = STAND_INS[node["class_type"]]
            node = {"class_type": stand_in, "inputs": {"family": family(node["inputs"][name])}}
        elif node["class_type"] == "LoraLoaderModelOnly":
            node = {"class_type": "StandInLora", "inputs": {"model": node["inputs"]["model"]}}
        changed[key] = node
    return changed


def inputs(info: dict, type_: str) -> tuple[dict, set[str]]:
    """All inputs of a node type by name, and the names of those that it must have."""
    groups = info[type_]["input"]
    required = groups.get("required", {})
    return {**required, **groups.get("optional", {})}, set(required)


def faults(prompt: dict, info: dict) -> list[str]:
    """What is wrong with a prompt, also where the server would let it pass."""
    found = []
    for key, node in prompt.items():
        if node["class_type"] not in info:
            found.append(f"{key}: there is no node {node['class_type']}")
            continue
        known, required = inputs(info, node["class_type"])
        place = f"{node['class_type']} {key}"
        found += [f"{place}: unknown input {name}" for name in node["inputs"] if name not in known]
        found += [f"{place}: input {name} is missing" for name in required - set(node["inputs"])]
        for name in set(node["inputs"]) & set(known):
            found += [
                f"{place}.{name}: {fault}"
                for fault in value_faults(node["inputs"][name], name, known[name], prompt, info)
            ]
    return found


def value_faults(value, name: str, spec: list, prompt: dict, info: dict) -> list[str]:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if isinstance(value, list) and len(value) == 2 and value[0] in prompt:
        given = info[prompt[value[0]]["class_type"]]["output"][value[1]]
        wanted = "COMBO" if choices is not None else kind
        return [] if given in wanted.split(",") else [f"{given} is linked to {wanted}"]
    if choices is not None:
        return [] if name in FILE_INPUTS or value in choices else [f"{value!r} is none of {choices}"]
    if kind in ("INT", "FLOAT"):
        fits = type(value) is int or (kind == "FLOAT" and type(value) is float)
        if not fits or not options.get("min", value) <= value <= options.get("max", value):
            return [f"{value!r} is no {kind} in [{options.get('min')}, {options.get('max')}]"]
    if kind in ("STRING", "BOOLEAN") and type(value) is not {"STRING": str, "BOOLEAN": bool}[kind]:
        return [f"{value!r} is no {kind}"]
    return []


def of_type(prompt: dict, type_: str) -> list[str]:
    return [key for key, node in prompt.items() if node["class_type"] == type_]


def tolerant(prompt: dict) -> dict:
    """As much is skipped as can be: the course of random weights is too crooked for ToPi's own tolerance."""
    for key in of_type(prompt, "ToPiPatch"):
        if prompt[key]["inputs"]["tolerance"]:
            prompt[key]["inputs"]["tolerance"] = 1.0
    return prompt


def assert_saved(facts: dict, tolerance: float) -> None:
    """By what ToPi Report says of a run, in either mode; reuse keeps every token by default."""
    kinds, steps = [step["kind"] for step in facts["steps"]], len(facts["steps"])
    assert "anchor" in kinds and facts["figures"]["cached"] == 0
    assert (facts["figures"]["skipped"] > 0) == (tolerance > 0 and steps > 4)  # three before, and the last is computed
    if facts["nothing"] is None:
        assert ("pruned" in kinds) != ("reused" in kinds)
        assert all(0 < anchor["share"] < 1 or "reused" in kinds for anchor in facts["anchors"])
    else:
        assert "skipping steps brings more" in facts["nothing"] and steps >= 12 and "skipped" in kinds


@functools.cache
def official() -> dict[str, dict]:
    """The templates that come with ComfyUI, by name."""
    found = {}
    for file in files("comfyui-workflow-templates-json"):
        if file.suffix == ".json" and file.parent.name == "templates":
            workflow = json.loads(Path(file.locate()).read_text(encoding="utf-8"))
            if isinstance(workflow, dict) and "nodes" in workflow:
                found[file.stem] = workflow
    return found


def nodes_of(workflow: dict) -> list[dict]:
    """With those of its subgraphs."""
    parts = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return [node for part in parts for node in part["nodes"]]


def models_of(workflow: dict) -> set[tuple[str, str, str]]:
    entries = [model for node in nodes_of(workflow) for model in node.get("properties", {}).get("models", [])]
    return {(model["name"], model["directory"], model["url"]) for model in entries}


@pytest.mark.parametrize("name", OURS)
def test_an_example_runs_as_it_is_opened(opened, run, info, name):
    opened.load_template(name)
    prompt = on_the_page(opened)
    assert faults(prompt, info) == []
    outputs = run(tolerant(with_stand_ins(prompt))).outputs
    shown = {key for key, node in prompt.items() if info[node["class_type"]]["output_node"]}
    assert set(outputs) == shown
    assert of_type(prompt, "ToPiPatch") or of_type(prompt, "ToPiCalibrate")
    for key in of_type(prompt, "ToPiReport"):
        patch = prompt[prompt[key]["inputs"]["trace"][0]]
        if of_type(prompt, "EasyCache"):  # the only one that skips there
            assert patch["inputs"]["tolerance"] == 0
            assert "reused" in [step["kind"] for step in outputs[key]["run"][0]["steps"]]
        else:
            assert_saved(outputs[key]["run"][0], patch["inputs"]["tolerance"])
    for key in of_type(prompt, "ToPiCompare"):
        assert "inf" not in outputs[key]["text"][0]
    for key in of_type(prompt, "ToPiSaveProfile"):
        assert len(outputs[key]["profile"][0]["layers"]) == 3


def test_the_examples_are_listed_with_their_pictures(opened):
    """In the template browser; a missing picture would be shown as a broken one."""
    opened.browse_templates()
    for name in OURS:
        card = opened.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()  # the page loads a picture when its card is seen
        picture = card.locator("img").first
        shown = picture.evaluate("(image) => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
        assert tuple(shown) == Image.open(FOLDER / f"{name}.jpg").size, name
    opened.page.keyboard.press("Escape")
    opened.page.get_by_role("dialog").wait_for(state="hidden")


def test_an_example_opened_afresh_shows_no_earlier_run(opened, context, server):
    """The page looks up the results of a workflow by its id, which a template must not bring along."""
    opened.load_template("topi_quickstart_demo")
    opened.set("KSampler", "steps", 2)
    opened.queue()
    afresh = Page(context.new_page(), server.address)
    afresh.open(vue=False)
    afresh.load_template("topi_quickstart_demo")
    afresh.page.wait_for_timeout(3000)
    assert afresh.run("topiTest.images('ToPiMaskPreview').length") == 0
    afresh.page.close()


@pytest.mark.parametrize("name", OURS)
def test_an_example_is_tidy_and_says_which_files_it_needs(name):
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert "id" not in workflow  # with one, the page shows the results of its last run when it is opened afresh
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    live = {"ToPiPatch": 410}  # it grows when its live view comes
    boxes = [[*node["pos"], node["size"][0], live.get(node["type"], node["size"][1])] for node in workflow["nodes"]]
    boxes = [(x, y - 30, x + width, y + height) for x, y, width, height in boxes]  # with the title
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    for node, box in zip(workflow["nodes"], boxes, strict=True):
        around = [g for g in workflow["groups"] if inside(box, g["bounding"])]
        assert len(around) == (node not in notes), node["type"]
    assert all(group["title"] for group in workflow["groups"])

    models = models_of(workflow)
    assert models <= {model for template in official().values() for model in models_of(template)}
    assert len(notes) == 1
    assert all(name in notes[0]["widgets_values"][0] for name, _, _ in models)
    loaders = [node for node in workflow["nodes"] if node["type"] in STAND_INS]
    named = {value for node in loaders for value in node["widgets_values"] if value.endswith(".safetensors")}
    assert named == {name for name, _, _ in models}


def inside(box: tuple, bounding: list) -> bool:
    x, y, width, height = bounding
    return x <= box[0] and y <= box[1] and box[2] <= x + width and box[3] <= y + height


def test_every_official_template_with_references_is_run_or_left_out_for_a_reason():
    found = {name for name, template in official().items() if REFERENCE_NODES & {n["type"] for n in nodes_of(template)}}
    assert found == {*OFFICIAL, KV_CACHE, *LEFT_OUT}


def with_topi(prompt: dict, info: dict) -> dict:
    """ToPi Patch, as it comes, between model and sampler, and a report of each run."""
    prompt = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
    known, _ = inputs(info, "ToPiPatch")
    defaults = {name: spec[1]["default"] for name, spec in known.items() if "default" in spec[1]}
    for key in [key for key, node in prompt.items() if node["class_type"] in SAMPLERS]:
        prompt[f"{key} topi"] = {
            "class_type": "ToPiPatch",
            "inputs": {"model": prompt[key]["inputs"]["model"], **defaults},
        }
        prompt[key]["inputs"]["model"] = [f"{key} topi", 0]
        sampler = next((k for k, node in prompt.items() if node["inputs"].get("guider") == [key, 0]), key)
        prompt[f"{key} report"] = {
            "class_type": "ToPiReport", "inputs": {"trace": [f"{key} topi", 1], "latent": [sampler, 0]},
        }  # fmt: skip
    return prompt


def template_prompt(page: Page, name: str, info: dict) -> dict:
    """A template of ComfyUI's with ToPi and small models."""
    page.run("(name) => fetch(`/templates/${name}.json`).then((r) => r.json()).then((w) => app.loadGraphData(w))", name)
    prompt = with_topi(with_stand_ins(on_the_page(page)), info)
    if name in SMALLER:
        type_, values = SMALLER[name]
        for key in of_type(prompt, type_):
            prompt[key]["inputs"] |= values
    return prompt


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_template_runs_with_topi(opened, run, info, name):
    prompt = tolerant(template_prompt(opened, name, info))
    outputs = run(prompt).outputs
    reports = of_type(prompt, "ToPiReport")
    assert reports
    for key in reports:
        assert_saved(outputs[key]["run"][0], 1.0)


def test_the_template_with_a_kv_cache_is_refused_with_a_sentence(opened, run, info):
    prompt = template_prompt(opened, KV_CACHE, info)
    with pytest.raises(ServerError, match="that FluxKVCache has already taken out"):
        run(prompt)


def test_the_page_had_no_error(opened):
    assert opened.errors == []
