"""Tells the page at each anchor what is kept, while the sampler runs."""

import base64
import logging
from io import BytesIO

import torch
from comfy.cli_args import args
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...topi_core.overlay import Geometry, draw, weight_of
from ...topi_core.trace import Anchor, Run

EVENT = "topi.anchor"
SETTING = "topi.live"
LARGEST = 256  # longest side in pixels of what is sent for a reference

log = logging.getLogger(__name__)


def announce(node_id: str, run: Run, anchor: Anchor) -> None:
    """Sends an anchor's mask to the browser that queued the run; never raises, as a view must not end a run."""
    try:
        server = getattr(PromptServer, "instance", None)
        if server is not None and _watched(server):
            server.send_sync(EVENT, message(node_id, run, anchor), server.client_id)
    except Exception:
        log.warning("ToPi: the live view failed; sampling goes on", exc_info=True)


def watched() -> bool:
    """Whether a page or a ToPi Mask Preview in the running prompt looks at scores; outside of one, somebody may."""
    try:
        server = PromptServer.instance
        running, _ = server.prompt_queue.get_current_queue()
        nodes = [node for _, _, prompt, *_ in running for node in prompt.values()]
        return not nodes or _watched(server) or any(node["class_type"] == "ToPiMaskPreview" for node in nodes)
    except (AttributeError, LookupError, TypeError, ValueError):  # no server, or a queue of another form
        return True


def _watched(server: PromptServer) -> bool:
    """Whether a browser is there to show it, and its user wants it; of several users, each page decides itself."""
    present = server.client_id in server.sockets if server.client_id is not None else bool(server.sockets)
    return present and (args.multi_user or server.user_manager.settings.get_settings(None).get(SETTING, True))


def message(node_id: str, run: Run, anchor: Anchor) -> dict:
    """Plain values, and a small picture of the references for each; of a batch, those of the first image."""
    return {
        "node": node_id,
        "step": anchor.step,
        "sigma": round(anchor.sigma, 4),
        "share": anchor.share,
        "tokens": anchor.layout.reference_tokens,
        "pictures": [_png(_overlay(run, anchor, i)) for i in range(len(anchor.references))],
    }


def _overlay(run: Run, anchor: Anchor, reference: int) -> Tensor:
    """[h, w, 3] in 0..1, as large as the reference's small picture."""
    seen = anchor.references[reference]
    picture = torch.full((1, *seen.size, 3), 0.5) if seen.picture is None else seen.picture[:1].float() / 255
    size = picture.shape[1], picture.shape[2]
    place = Geometry(cells=seen.size, patch=run.patch, cell_pixels=size[0] // seen.size[0])
    return draw(picture, place.spread(weight_of(anchor, reference)[:1], size), 0.8)[0]


def _png(picture: Tensor) -> str:
    """An RGB picture as a data URL."""
    image = Image.fromarray(picture.mul(255).round().byte().numpy())
    image.thumbnail((LARGEST, LARGEST))
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
