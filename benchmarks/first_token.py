"""One streamed chat answer and its time to first token."""

import json
import time

import httpx2

REQUEST_SECONDS = 600.0


def first_token(
    url: str, model: str, question: str, started: float, max_tokens: int = 16
) -> tuple[float, str]:
    """Seconds from `started` (monotonic) to the first token, and the whole text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
    }
    seconds, text = None, ""
    with (
        httpx2.Client(base_url=url, timeout=REQUEST_SECONDS) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        answer.raise_for_status()
        for line in answer.iter_lines():
            token = _token(line)
            if token and seconds is None:
                seconds = time.monotonic() - started
            text += token
    if seconds is None:
        raise RuntimeError(f"{model} returned no token")
    return seconds, text


def _token(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise RuntimeError(chunk["error"]["message"])
    choices = chunk["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""
