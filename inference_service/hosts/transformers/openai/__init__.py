"""OpenAI's API over an engine that knows tokens only: what may be asked, and how answers look. No torch."""
