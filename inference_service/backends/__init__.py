"""What the service knows of each backend: command line, environment, costs, preloads, source tables."""
