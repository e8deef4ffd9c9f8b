"""Calibrates a model on a folder of image-prompt pairs, with a running ComfyUI; needs nothing but Python.

    python tools/calibrate.py pairs/ --workflow edit_api.json --name my-model

The pairs are `x.png` (or .jpg, .jpeg, .webp) beside `x.txt`, or the lines of a .jsonl file, as in {"image": "x.png",
"prompt": "..."}, where "image" may be a list for workflows with several. The workflow is in ComfyUI's API format; of it
only what leads to the sampler is run. Stopped and started again, it goes on with the pairs that are left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TEXTS = ("text", "prompt", "instruction", "value")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
PATCH, SETTINGS, LISTEN, SAVE = "ToPiPatch", "ToPiSettings", "ToPiCalibrate", "ToPiSaveProfile"


class Problem(Exception):
    """One sentence for the user."""


@dataclass(frozen=True)
class Pair:
    """The reference images of one edit, and its prompt."""

    images: tuple[Path, ...]
    prompt: str

    def digest(self, *more: str) -> str:
        words = [self.prompt, *more]
        data = b"".join(hashlib.sha256(part).digest() for part in (
            *(image.read_bytes() for image in self.images), *(word.encode() for word in words)
        ))  # fmt: skip
        return hashlib.sha256(data).hexdigest()[:24]


def read_pairs(source: Path) -> list[Pair]:
    """Those of a folder, or of a .jsonl file, whose paths count from its folder."""
    if source.is_dir():
        images = sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES)
        alone = [image.name for image in images if not image.with_suffix(".txt").is_file()]
        if alone:
            raise Problem(f"{source / alone[0]} has no prompt beside it: {Path(alone[0]).stem}.txt is missing")
        pairs = [Pair((image,), image.with_suffix(".txt").read_text("utf-8").strip()) for image in images]
    elif source.is_file():
        pairs = []
        for number, line in enumerate(filter(str.strip, source.read_text("utf-8").splitlines()), 1):
            try:
                entry = json.loads(line)
                names = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
                pair = Pair(tuple(source.parent / name for name in names), str(entry["prompt"]))
            except (ValueError, KeyError, TypeError):
                raise Problem(f'{source}, line {number}, is not like {{"image": "x.png", "prompt": "..."}}') from None
            missing = [image for image in pair.images if not image.is_file()]
            if missing:
                raise Problem(f"{source}, line {number}, names {missing[0]}, which is not there")
            pairs.append(pair)
    else:
        raise Problem(f"{source} is neither a folder of pairs nor a .jsonl file")
    if not pairs:
        raise Problem(f"{source} holds no image-prompt pairs")
    return pairs


def find(workflow: dict, which: str) -> str:
    """The one node with this id, title or class."""
    if which in workflow:
        return which
    for named in (lambda node: node.get("_meta", {}).get("title"), lambda node: node["class_type"]):
        found = [id_ for id_, node in workflow.items() if named(node) == which]
        if len(found) == 1:
            return found[0]
        if found:
            many = ", ".join(f"{id_} ({workflow[id_].get('_meta', {}).get('title', '')})" for id_ in found)
            raise Problem(f"several nodes of the workflow are called {which!r}: {many}; name one by its id or title")
    known = ", ".join(sorted({node["class_type"] for node in workflow.values()}))
    raise Problem(f"no node of the workflow has the id, title or class {which!r}; its classes are: {known}")


def text_input(workflow: dict, node: str) -> str:
    """The input of a node that a prompt goes into."""
    inputs = workflow[node]["inputs"]
    for name in TEXTS:
        if name in inputs:
            if isinstance(inputs[name], list):
                raise Problem(
                    f"the input {name!r} of node {node} ({workflow[node]['class_type']}) comes from node "
                    f"{inputs[name][0]}; name that one with --prompt"
                )
            return name
    raise Problem(f"node {node} ({workflow[node]['class_type']}) has no input {', '.join(TEXTS)} for a prompt")


def prepare(workflow: dict, name: str, top_m: int) -> dict:
    """The part of a workflow that leads to the sampler, with both nodes of ToPi in it, which are added where needed.

    A ToPi Patch is left out, as everything runs in full.
    """
    workflow = json.loads(json.dumps(workflow))
    saves = [id_ for id_, node in workflow.items() if node["class_type"] == SAVE]
    if not saves:
        samplers = [id_ for id_, node in workflow.items() if node["class_type"] in SAMPLERS]
        if len(samplers) != 1:
            raise Problem(
                f"the workflow has {len(samplers)} samplers of the classes {', '.join(SAMPLERS)}: "
                f"put {LISTEN} and {SAVE} into it where they belong"
            )
        sampler = samplers[0]
        guided = workflow[sampler]["inputs"].get("guider")
        model_of = workflow[guided[0] if guided else sampler]["inputs"]
        if not isinstance(model_of.get("model"), list):
            raise Problem(f"the sampler {sampler} gets its model in a way that is not known here: put in {LISTEN}")
        model = model_of["model"]
        while workflow.get(model[0], {}).get("class_type") == PATCH:
            model = workflow[model[0]]["inputs"]["model"]
        workflow["topi-listen"] = {"class_type": LISTEN, "inputs": {"model": model, "top_m": top_m}}
        model_of["model"] = ["topi-listen", 0]
        saves = ["topi-save"]
        workflow["topi-save"] = {
            "class_type": SAVE,
            "inputs": {"calibration": ["topi-listen", 1], "latent": [sampler, 0]},
        }
    for save in saves:
        workflow[save]["inputs"] |= {"name": name, "merge": True}
    needed, left = {}, list(saves)
    while left:
        id_ = left.pop()
        if id_ not in needed:
            needed[id_] = workflow[id_]
            values = [value for value in workflow[id_]["inputs"].values() if isinstance(value, list) and value]
            left += [value[0] for value in values if isinstance(value[0], str) and value[0] in workflow]
    return needed


class Server:
    """The API of a running ComfyUI."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> dict:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if body else {})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")
            raise Problem(f"the server refused {path}: {_reason(said)}") from None
        except OSError as error:
            raise Problem(f"no ComfyUI answers at {self.address} ({error}); is it running?") from None

    def upload(self, image: Path) -> str:
        """Into the server's input folder, under a name of its content -> what LoadImage calls it."""
        content, boundary = image.read_bytes(), uuid.uuid4().hex
        name = hashlib.sha256(content).hexdigest()[:16] + image.suffix.lower()
        fields = {"subfolder": "topi", "type": "input", "overwrite": "true"}
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()
        ]
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = "".join(parts).encode() + content + f"\r\n--{boundary}--\r\n".encode()
        said = self.ask("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return f"{said['subfolder']}/{said['name']}" if said["subfolder"] else said["name"]

    def run(self, prompt: dict) -> dict:
        """Queues a prompt and waits for it -> the outputs of its nodes."""
        queued = self.ask("/prompt", json.dumps({"prompt": prompt}).encode())["prompt_id"]
        pause = 0.1
        while queued not in (history := self.ask(f"/history/{queued}")):
            time.sleep(pause)
            pause = min(2, 1.2 * pause)
        status = history[queued]["status"]
        for event, data in status["messages"]:
            if event == "execution_error":
                raise Problem(f"{data['node_type']} failed: {data['exception_message'].strip()}")
        if status["status_str"] != "success":
            raise Problem("the run was interrupted on the server")
        return history[queued]["outputs"]

    def profiles(self) -> list[str]:
        """The names that ToPi Settings knows; Problem where the server has no ToPi."""
        known = self.ask(f"/object_info/{SETTINGS}")
        if not known:
            raise Problem(f"the ComfyUI at {self.address} has no ToPi: install the pack there first")
        spec = known[SETTINGS]["input"]["required"]["profile"]
        return spec[1]["options"] if spec[0] == "COMBO" else spec[0]


def _reason(said: str) -> str:
    """ComfyUI's own words of a refusal, in a line."""
    try:
        answer = json.loads(said)
        errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
        return "; ".join(f"{error['message']} ({error['details']})" for error in errors or [answer["error"]])
    except (ValueError, KeyError, TypeError, AttributeError):
        return " ".join(said.split())[:300]


def bar(done: int, of: int, seconds: list[float]) -> str:
    filled = 30 * done // of
    rest = f", {sum(seconds) / len(seconds) * (of - done):.0f} s left" if seconds else ""
    return f"\r[{'#' * filled}{'.' * (30 - filled)}] {done} of {of} pairs{rest}   "


def calibrate(
    server: Server,
    pairs: list[Pair],
    workflow: dict,
    name: str,
    journal: Path,
    images: list[str],
    prompt: str,
    top_m: int = 3,
    show: Callable[[str], None] = lambda line: None,
) -> str:
    """Runs the pairs that the journal does not have yet, and notes each in it -> the profile in words."""
    nodes, text_node = [find(workflow, which) for which in images], find(workflow, prompt)
    text, ready = text_input(workflow, text_node), prepare(workflow, name, top_m)
    unused = [node for node in (*nodes, text_node) if node not in ready]
    if unused:
        raise Problem(f"node {unused[0]} ({workflow[unused[0]]['class_type']}) does not lead to the sampler")
    wrong = [pair for pair in pairs if len(pair.images) != len(nodes)]
    if wrong:
        raise Problem(f"{wrong[0].images[0]} is one of {len(wrong[0].images)} images, but --image names {len(nodes)}")
    if f"{name.removesuffix('.safetensors')}.safetensors" not in server.profiles():
        journal.unlink(missing_ok=True)  # what it speaks of is not there, or was deleted
    done = set(journal.read_text("utf-8").split()) if journal.exists() else set()
    marks = [pair.digest(json.dumps(ready, sort_keys=True)) for pair in pairs]
    finished, seconds, said = sum(mark in done for mark in marks), [], ""
    show(bar(finished, len(pairs), seconds))
    for pair, mark in zip(pairs, marks, strict=True):
        if mark in done:
            continue
        started, own = time.monotonic(), json.loads(json.dumps(ready))
        for node, image in zip(nodes, pair.images, strict=True):
            own[node]["inputs"]["image"] = server.upload(image)
        own[text_node]["inputs"][text] = pair.prompt
        try:
            outputs = server.run(own)
        except Problem as problem:
            raise Problem(f"{pair.images[0]}: {problem}") from None
        said = next((output["text"][0] for output in outputs.values() if "profile" in output), said)
        with journal.open("a", encoding="utf-8") as file:
            file.write(mark + "\n")
        finished += 1
        seconds.append(time.monotonic() - started)
        show(bar(finished, len(pairs), seconds))
    return said


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="folder, or .jsonl file")
    parser.add_argument("--workflow", type=Path, required=True, help="an edit, in ComfyUI's API format")
    parser.add_argument("--name", required=True, help="of the profile, in the server's output/topi")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument(
        "--image",
        action="append",
        metavar="NODE",
        help="id, title or class of the node that gets the image (LoadImage); again for a second one",
    )
    parser.add_argument("--prompt", default="CLIPTextEncode", metavar="NODE",
                        help="id, title or class of the node that gets the prompt (%(default)s)")  # fmt: skip
    parser.add_argument("--top-m", type=int, default=3, help="layers of the profile, where the workflow has no "
                        f"{LISTEN} (%(default)s)")  # fmt: skip
    args = parser.parse_args(arguments)
    folder = args.pairs if args.pairs.is_dir() else args.pairs.parent
    journal = folder / f".{args.name.replace('/', '_')}.done"
    try:
        try:
            workflow = json.loads(args.workflow.read_text("utf-8"))
            nodes = workflow.values() if isinstance(workflow, dict) else []
        except (OSError, ValueError) as error:
            raise Problem(f"{args.workflow} cannot be read: {error}") from None
        if not nodes or not all(isinstance(node, dict) and "class_type" in node for node in nodes):
            raise Problem(f"{args.workflow} is not in ComfyUI's API format: on its page, use File > Export (API)")
        said = calibrate(
            Server(args.server), read_pairs(args.pairs), workflow, args.name, journal, args.image or ["LoadImage"],
            args.prompt, args.top_m, lambda line: print(line, end="", file=sys.stderr, flush=True),
        )  # fmt: skip
    except Problem as problem:
        print(f"\ncalibrate: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    print(f"\n\n{said or 'All pairs were done before.'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
