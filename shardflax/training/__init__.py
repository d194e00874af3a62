"""Train state, losses, steps and metrics."""
