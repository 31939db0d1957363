"""Engines: what the pool holds. A host process each, started by the launcher."""
