"""The search: operators, evolution, enumeration, Pareto fronts."""
