"""Tokens in, tokens out: a transformers model that many sequences run on together. Knows no HTTP, no text."""
