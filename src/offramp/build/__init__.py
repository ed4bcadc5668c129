"""A backbone becomes a multi-exit model: cost, places, heads, and the model itself."""
