"""Why an engine ended, in plain words: an explanation, followed by the engine's own last error."""

import re
import signal

# Pattern in an engine's error -> what it means. The first match wins.
_MEANINGS = (
    (r"out ?of ?memory|MemoryError|Cannot allocate memory|Free memory on device",
     "it ran out of memory. Lower MAX_MODEL_LEN or MAX_CACHED_MODELS, or serve it on a larger device"),
    (r"KV cache is needed|larger than the (?:maximum|available) .*KV cache|No available memory for the cache",
     "its KV cache is too small for its context length. Lower MAX_MODEL_LEN or set kv_cache_gib in its "
     "serving.json"),
    (r"SafetensorError|MetadataIncompleteBuffer|HeaderTooSmall|HeaderTooLarge|InvalidHeader",
     "its weights are truncated or damaged. Upload them again"),
    (r"are not supported for now|is not supported by|Transformers does not recognize|model type .* not",
     "its architecture is not supported by the engine"),
    (r"Following weights were not initialized|There is no module or parameter named|size mismatch|"
     r"lacks .* of its weights|ignore_mismatched_sizes|"
     r"shape of loaded weight|Attempted to load weight|assert .*shape|AssertionError: .*shape",
     "its weights do not match its config.json. Upload both from the same checkpoint"),
    (r"[Tt]okenizer", "its tokenizer cannot be loaded"),
    (r"ValidationError|config\.json", "its configuration is wrong"),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern), meaning) for pattern, meaning in _MEANINGS]


def in_plain_words(error: str | None, status: int) -> str:
    """`error` is the last error that the process printed, `status` its exit status (negative: a signal)."""
    if error is None:
        return _ended(status)
    for pattern, meaning in _PATTERNS:
        if pattern.search(error):
            return f"{meaning}: {error}"
    return error


def _ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed by SIGKILL, most likely because the system ran out of memory"
    if status < 0:
        return f"its process ended (killed by {_signal_name(-status)})"
    return f"its process ended (exit code {status})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"
