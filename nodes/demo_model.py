from comfy_api.latest import io


class ToPiDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ToPiDemoModel", display_name="ToPi Demo Model", category="ToPi/demo", inputs=[],
                         outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()])
