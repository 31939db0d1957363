"""Where the figures in the docs come from. Every figure is a ratio, measured side by side in one run."""
