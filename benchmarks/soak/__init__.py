"""`python -m benchmarks.soak`: the whole service, for long, under every trouble at once."""
