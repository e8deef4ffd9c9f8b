"""What ToPi is compared with, on its own interface."""
