"""The search over the pruning of a model: its space, its trials on Ray Tune, the Pareto front of its results."""
