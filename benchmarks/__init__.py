"""The source of the figures in the docs. Every figure is a ratio, measured side by side in one run."""
