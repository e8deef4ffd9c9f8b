"""What the nodes share: the user's profile files, the page's live view, and a chart."""
