"""OpenAI's API over an engine that knows only tokens: request validation, response formats. No torch."""
