"""The HTTP edge: routes, bounds and the relay."""
