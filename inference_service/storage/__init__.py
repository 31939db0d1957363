"""Storage: the bucket as a registry of models, and verified local snapshots of them."""
