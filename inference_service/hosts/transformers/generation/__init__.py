"""Tokens in, tokens out: a transformers model that batches sequences. Knows neither HTTP nor text."""
