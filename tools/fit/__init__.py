"""Fits of the models that ship in ``nas/models``; not installed."""
