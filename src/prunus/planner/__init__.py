"""Which units to remove under a budget: pure, deterministic, and without a model."""
