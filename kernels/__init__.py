"""Products over nested weights."""
