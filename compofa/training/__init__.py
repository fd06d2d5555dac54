"""Training: recipes as data, one loop, exact resumption."""
