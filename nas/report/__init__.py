"""What a search writes: tables, figures and a self-contained page."""
