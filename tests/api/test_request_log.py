"""The last resort: an error that nobody expected."""

import httpx2
import pytest
from starlette.types import Receive, Scope, Send

from inference_service.api.request_log import RequestLog


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError("nobody thought of it")


async def test_an_unexpected_error_is_a_500_in_the_envelope(caplog: pytest.LogCaptureFixture) -> None:
    transport = httpx2.ASGITransport(app=RequestLog(broken))
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
        answer = await client.get("/", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["code"] == "internal_error"
    assert "nobody thought of it" in caplog.text


async def test_a_path_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    transport = httpx2.ASGITransport(app=RequestLog(broken))
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
        await client.get("/a%0AERROR forged")
    assert all("\n" not in record.message for record in caplog.records)
