"""The host that serves with vLLM: its own OpenAI server, and the control routes of the service."""
