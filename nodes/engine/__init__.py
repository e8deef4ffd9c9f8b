"""What puts ToPi on a model of ComfyUI's: it attaches, follows a run, and carries plans out. It knows no saving."""
