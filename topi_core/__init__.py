"""ToPi's method in torch alone (arXiv 2602.01609). Nothing in here knows ComfyUI."""
