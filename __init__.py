"""ToPi for ComfyUI: computes the reference tokens of an in-context image model at a few steps only."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import ToPiExtension

    return ToPiExtension()
