"""Files: read in bounds and without running code, written atomically."""
