"""Engines, which the pool holds: one host process each, started by the launcher."""
