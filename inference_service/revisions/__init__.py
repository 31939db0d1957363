"""Revisions: which one answers for a model's name, and how another takes over."""
