"""`python -m benchmarks.soak`: a long run of the whole service under every fault at once."""
