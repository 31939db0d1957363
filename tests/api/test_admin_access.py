"""Who may use /admin: peers, keys, and what web pages send."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest

from inference_service.app import build_app
from inference_service.config import Backend, Settings
from inference_service.engines.launcher import Launcher
from inference_service.machine.device import Device, DeviceKind
from tests.fixtures.fakes import Fakes

HERE = "127.0.0.1"
ELSEWHERE = "203.0.113.7"
KEY = "s3cret-key"
BEARER = {"authorization": f"Bearer {KEY}"}
FOREIGN_FORM = {
    "origin": "https://evil.example",
    "sec-fetch-site": "cross-site",
    "content-type": "application/x-www-form-urlencoded",
}


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path / 'bucket'}"


@asynccontextmanager
async def peer(
    bucket: str, room: Path, address: str = HERE, host: str = "127.0.0.1:8080", **settings: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client whose end of the socket has this address; the app without its launcher."""
    chosen = Settings(gcs_bucket=bucket, local_model_cache=room / "cache", **settings)
    app = build_app(chosen, Device(DeviceKind.CPU, "cpu"), Backend.FAKE, cast(Launcher, None))
    transport = httpx2.ASGITransport(app, client=(address, 4711))
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        yield client


@pytest.mark.parametrize(
    ("address", "status"),
    [
        (HERE, 200),
        ("127.8.9.10", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        (ELSEWHERE, 403),
        ("172.17.0.1", 403),
        ("169.254.1.1", 403),
        ("::ffff:203.0.113.7", 403),
        ("", 403),
        ("localhost", 403),
    ],
)
async def test_without_a_key_only_this_machine_is_answered(
    bucket: str, tmp_path: Path, address: str, status: int
) -> None:
    async with peer(bucket, tmp_path, address) as client:
        answer = await client.get("/admin/stats")
        assert answer.status_code == status
        if status == 403:
            error = answer.json()["error"]
            assert error["code"] == "admin_forbidden"
            assert "-e ADMIN_API_KEY=..." in error["message"]
        assert (await client.get("/health")).status_code == 200, "nothing else is closed"


@pytest.mark.parametrize("path", ["load/m", "unload/m", "rollback/m", "pin/m", "unpin/m"])
async def test_every_route_of_the_operator_is_closed(bucket: str, tmp_path: Path, path: str) -> None:
    async with peer(bucket, tmp_path, ELSEWHERE) as client:
        assert (await client.post(f"/admin/{path}")).status_code == 403
        assert (await client.post(f"/admin/{path}?wait=perhaps&force=what")).status_code == 403
    async with peer(bucket, tmp_path) as client:
        assert (await client.post(f"/admin/{path}")).status_code == 404, "there is no such model"


def test_no_route_of_the_operator_is_forgotten(bucket: str, tmp_path: Path) -> None:
    """Whatever is added to /admin asks who it is, too."""
    settings = Settings(gcs_bucket=bucket, local_model_cache=tmp_path / "cache")
    app = build_app(settings, Device(DeviceKind.CPU, "cpu"), Backend.FAKE, cast(Launcher, None))
    document = app.openapi()
    paths = [path for path in document["paths"] if path.startswith("/admin")]
    assert len(paths) >= 6
    for route in app.routes:
        if getattr(route, "path", "").startswith("/admin"):
            asked = [each.call.__name__ for each in cast(Any, route).dependant.dependencies if each.call]
            assert "admit_operator" in asked, route


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": HERE},
        {"x-forwarded-for": ELSEWHERE},
        {"forwarded": "for=127.0.0.1"},
        {"x-real-ip": HERE},
        {"via": "1.1 proxy"},
        {"x-forwarded-host": "localhost"},
        {"x-forwarded-proto": "https"},
    ],
)
async def test_a_proxy_on_this_machine_is_not_this_machine(
    bucket: str, tmp_path: Path, headers: dict[str, str]
) -> None:
    for address in (HERE, ELSEWHERE):
        async with peer(bucket, tmp_path, address) as client:
            assert (await client.get("/admin/stats", headers=headers)).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("127.0.0.1", 200),
        ("app.localhost:8080", 200),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1", 403),
        ("evil@localhost", 403),
        ("localhost#.evil.example", 403),
        ("localhost/evil", 403),
        ("[::1]evil.example", 403),
        ("", 403),
    ],
)
async def test_a_name_that_leads_here_is_not_this_machines(
    bucket: str, tmp_path: Path, host: str, status: int
) -> None:
    """DNS rebinding: a page whose own name resolves to 127.0.0.1 is of the same origin to its browser."""
    async with peer(bucket, tmp_path) as client:
        assert (await client.get("/admin/stats", headers={"host": host})).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (BEARER, 200),
        ({"authorization": f"bearer  {KEY} "}, 200),
        ({}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Bearer {KEY.upper()}"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": "Bearer schlüssel".encode()}, 401),
        ({"authorization": b"Bearer \xff\xfe"}, 401),
        ({"authorization": f"Bearer {'x' * 50_000}"}, 401),
    ],
)
async def test_with_a_key_it_alone_counts(
    bucket: str, tmp_path: Path, headers: dict[str, Any], status: int
) -> None:
    for address, host in ((HERE, "localhost"), (ELSEWHERE, "models.example.com")):
        async with peer(bucket, tmp_path, address, host, admin_api_key=KEY) as client:
            answer = await client.get("/admin/stats", headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert KEY not in answer.text


async def test_open_to_everyone_where_the_operator_says_so(bucket: str, tmp_path: Path) -> None:
    async with peer(bucket, tmp_path, ELSEWHERE, "models.example.com", admin_open=True) as client:
        assert (await client.get("/admin/stats")).status_code == 200
        assert (await client.post("/admin/load/m", headers=FOREIGN_FORM)).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (FOREIGN_FORM, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "Cross-Site"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "http://localhost"}, 403),
        ({"origin": "localhost:8080"}, 403),
        ({"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}, 404),
        ({"sec-fetch-site": "none"}, 404),
        ({"content-type": "application/x-www-form-urlencoded"}, 404),
        ({}, 404),
    ],
)
async def test_no_page_of_another_site_is_answered_with_or_without_a_key(
    bucket: str, tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    for settings in ({}, {"admin_api_key": KEY}, {"admin_open": True}):
        async with peer(bucket, tmp_path, host="localhost:8080", **settings) as client:
            answer = await client.post("/admin/load/m", headers={**BEARER, **headers}, content=b"x=1")
            assert answer.status_code == status, settings


async def test_each_of_several_headers_counts(bucket: str, tmp_path: Path) -> None:
    own, foreign = ("origin", "http://localhost:8080"), ("origin", "https://evil.example")
    sites = [("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")]
    hosts = [("host", "localhost:8080"), ("host", "evil.example")]
    async with peer(bucket, tmp_path, host="localhost:8080") as client:
        for headers in ([own, foreign], sites, hosts):
            assert (await client.get("/admin/stats", headers=headers)).status_code == 403, headers


async def test_an_origin_without_a_host(bucket: str, tmp_path: Path) -> None:
    async with peer(bucket, tmp_path, admin_open=True) as client:
        answer = await client.get("/admin/stats", headers={"origin": "null", "host": ""})
        assert answer.status_code == 403


def test_over_a_real_socket(fakes: Fakes) -> None:
    """The curl lines of docs/operations.md, with a body and without; the peer is not what a header says."""
    fakes.put("m")
    with fakes.service() as service:
        assert service.http.post("/admin/load/m").status_code == 200
        assert service.http.post("/admin/pin/m", content=b"x=1").status_code == 200
        assert service.http.get("/admin/stats", headers={"x-forwarded-for": HERE}).status_code == 403
        assert service.http.post("/admin/unpin/m", headers=FOREIGN_FORM).status_code == 403
        assert service.engine("m")["pinned"], "the form has changed nothing"
        counted = 'inference_requests_total{model="",status="403"} 2.0'
        assert counted in service.http.get("/metrics").text


def test_with_a_key_over_a_real_socket(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(ADMIN_API_KEY=KEY) as service:
        assert service.http.post("/admin/load/m").status_code == 401
        assert service.http.post("/admin/load/m", headers=BEARER).status_code == 200
        assert service.http.get("/v1/models").status_code == 200
        assert KEY not in service.log_text()
