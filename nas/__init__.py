"""Search: accuracy predictors, costs of devices, Pareto fronts, and how they are shown."""
