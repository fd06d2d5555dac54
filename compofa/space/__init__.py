"""Search spaces: subnets, choices, couplings, genes. NumPy alone."""
