"""Serve every fine-tuned language model in a bucket behind OpenAI's API."""

__version__ = "0.1.0"
