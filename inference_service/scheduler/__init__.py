"""The scheduler: pure decisions over events and a clock."""
