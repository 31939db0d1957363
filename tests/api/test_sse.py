"""What the relay reads in a stream, however the bytes are cut."""

import json

import pytest

from inference_service.api.sse import DONE, StreamReader, host_error
from inference_service.errors import ContextLengthExceeded, EngineError, InvalidRequest

TOKEN = b'data: {"choices":[{"delta":{"content":"a \\"choices\\":[] b"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
ERROR = b'data: {"error":{"message":"EngineCore died","type":"x","param":null,"code":500}}\n\n'


def test_chunks_pass_as_they_are() -> None:
    reader = StreamReader(keep_usage=False)
    assert reader.feed(TOKEN) is TOKEN
    assert not reader.done


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("size", range(1, 90, 7))
def test_usage_is_read_and_kept_only_if_asked_for_however_the_bytes_are_cut(keep: bool, size: int) -> None:
    wire = TOKEN * 3 + USAGE + DONE
    reader = StreamReader(keep_usage=keep)
    seen = b"".join(reader.feed(wire[at : at + size]) for at in range(0, len(wire), size))
    assert seen == TOKEN * 3 + (USAGE if keep else b"") + DONE
    assert reader.usage == {"prompt_tokens": 3, "completion_tokens": 2}
    assert reader.done


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_an_error_ends_what_the_client_may_see(size: int) -> None:
    wire = TOKEN + ERROR + DONE
    reader = StreamReader(keep_usage=True)
    seen = b""
    for at in range(0, len(wire), size):
        seen += reader.feed(wire[at : at + size])
        if reader.error:
            break
    assert seen == TOKEN
    assert isinstance(reader.error, EngineError)
    assert "EngineCore died" in reader.error.message


def test_a_comment_passes() -> None:
    assert StreamReader(keep_usage=False).feed(b": loading\n\n") == b": loading\n\n"


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "bad value", InvalidRequest),
        (422, "bad value", InvalidRequest),
        (400, "This model's maximum context length is 8 tokens.", ContextLengthExceeded),
        (500, "boom", EngineError),
        (404, "who?", EngineError),
    ],
)
def test_a_hosts_error_in_our_words(status: int, message: str, kind: type) -> None:
    body = json.dumps({"error": {"message": message, "param": "n", "code": status}}).encode()
    assert type(host_error(status, body)) is kind


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"error": 5}', b'{"error": null}'])
def test_a_hosts_error_without_sense(body: bytes) -> None:
    assert isinstance(host_error(500, body), EngineError)
