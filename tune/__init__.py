"""Search over pruning budgets with Ray Tune."""
