"""ToPi's method in torch alone (arXiv 2602.01609), its profiles in safetensors. Nothing in here knows ComfyUI."""
