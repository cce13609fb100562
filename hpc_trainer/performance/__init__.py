"""Performance evaluation: probe a machine, estimate before booking it, profile a step, measure how training scales."""
