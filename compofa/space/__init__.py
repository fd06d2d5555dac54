"""Search spaces: subnets, choices, couplings, genes."""
