"""Ways to compute less, one file each: what they observe at an anchor, and what they take from a call between two."""
