"""Weights and subnets of other programs, one module per format."""
