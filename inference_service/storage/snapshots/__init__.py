"""Snapshots: verified local copies of models, and the disk that they lie on."""
