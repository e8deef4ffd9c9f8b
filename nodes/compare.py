"""ToPi Compare: how close two images are, in numbers."""

from comfy_api.latest import io

from ..topi_core.metrics import psnr, ssim


class ToPiCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToPiCompare", display_name="ToPi Compare", category="ToPi", is_output_node=True,
            description="PSNR and SSIM of two images or batches, such as the edit with ToPi and the one without.",
            inputs=[
                io.Image.Input("image", tooltip="The image to judge."),
                io.Image.Input("reference", tooltip="What it should look like; of the same size."),
            ],
            outputs=[
                io.Float.Output(display_name="psnr", tooltip="dB, the mean over the batch; infinite for equal images."),
                io.Float.Output(display_name="ssim", tooltip="Up to 1, the mean over the batch."),
                io.String.Output(display_name="text", tooltip="Both, for each image of the batch."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, reference) -> io.NodeOutput:
        if image.shape[:3] != reference.shape[:3]:
            one, other = (f"{len(x)} of {x.shape[2]} x {x.shape[1]}" for x in (image, reference))
            raise ValueError(f"both batches must have the same number and size of images, got {one} and {other}")
        a, b = (x[..., :3].movedim(-1, 1) for x in (image, reference))
        noise, likeness = psnr(a, b), ssim(a, b)
        lines = [f"PSNR {p:.2f} dB, SSIM {s:.4f}" for p, s in zip(noise.tolist(), likeness.tolist(), strict=True)]
        if len(lines) > 1:
            mean = f"mean: PSNR {noise.mean():.2f} dB, SSIM {likeness.mean():.4f}"
            lines = [mean, *(f"{i}: {line}" for i, line in enumerate(lines))]
        text = "\n".join(lines)
        return io.NodeOutput(noise.mean().item(), likeness.mean().item(), text, ui={"text": (text,)})
