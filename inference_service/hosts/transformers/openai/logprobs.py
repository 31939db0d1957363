"""Log probabilities in OpenAI's two formats."""

from typing import Any

from inference_service.hosts.transformers.generation.sequence import Token
from inference_service.hosts.transformers.openai.detokenizer import TokenTexts

# JSON has no minus infinity; OpenAI uses this value.
_LEAST = -9999.0


def of_chat(tokens: list[Token], texts: TokenTexts) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": texts.text(token),
            "logprob": _finite(logprob),
            "bytes": list(texts.content(token)),
        }

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(tokens: list[Token], texts: TokenTexts, offset: int) -> dict[str, Any]:
    """`offset`: of the first token in the text. Only a prompt's first token has no log probability."""
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token in tokens:
        text = texts.text(token.id)
        found["text_offset"].append(offset)
        found["tokens"].append(text)
        known = token.logprob is not None
        found["token_logprobs"].append(_finite(token.logprob) if known else None)
        # The most likely token last: it overwrites others with the same text.
        pairs = [(token.id, token.logprob), *reversed(token.top)]
        top = {texts.text(each): _finite(logprob) for each, logprob in pairs}
        found["top_logprobs"].append(dict(reversed(top.items())) if known else None)
        offset += len(text)
    return found


def _finite(logprob: float | None) -> float:
    return max(_LEAST, _LEAST if logprob is None else logprob)
