"""What the README's figures come from. Every figure is a ratio, measured side by side in one run."""
