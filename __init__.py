"""ToPi for ComfyUI: drops the reference tokens that an in-context image model does not look at."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import ToPiExtension

    return ToPiExtension()
