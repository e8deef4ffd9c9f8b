from comfy_api.latest import io


class ToPiDemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ToPiDemoScene", display_name="ToPi Demo Scene", category="ToPi/demo",
                         inputs=[io.Int.Input("seed"), io.String.Input("instruction")],
                         outputs=[io.Image.Output("image"), io.Image.Output("expected")])
