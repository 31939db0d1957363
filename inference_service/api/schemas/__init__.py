"""Pydantic models of what clients send and receive."""
