"""What a search shows: figures and a self-contained page."""
