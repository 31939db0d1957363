"""Access to /admin: with the operator's key, or without one from the machine that the service runs on.

Pages of other sites never have access: the operator's own browser would send their requests from this
machine. Sec-Fetch-Site and Origin reveal them; a page cannot forge these headers, and command-line clients
send neither. This module does not deal with keys for /v1.
"""

import hmac
import ipaddress
import re

from fastapi import Request

from inference_service.api.service import ServiceDep
from inference_service.errors import AdminForbidden, AdminKeyWrong

_SCHEME = "bearer "
# A page of the service itself, and a typed address.
_OWN_PAGES = frozenset({"same-origin", "none"})
# Headers of a proxy, which may run on this machine and forward requests from any other.
_FORWARDED = ("forwarded", "x-forwarded", "x-real-ip", "x-original", "via")
# A name or an address, and a port; nothing ambiguous between parsers.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]*)?", re.IGNORECASE)


async def admit_operator(request: Request, service: ServiceDep) -> None:
    """A dependency of every route of /admin; raises AdminForbidden and AdminKeyWrong."""
    settings = service.settings
    _refuse_other_sites(request)
    if settings.admin_api_key is not None:
        _check_key(request, settings.admin_api_key.get_secret_value())
    elif not settings.admin_open and not _comes_from_this_machine(request):
        raise AdminForbidden(_how_to_open(request))


def _refuse_other_sites(request: Request) -> None:
    sites = request.headers.getlist("sec-fetch-site")
    foreign = any(_is_foreign(origin, request) for origin in request.headers.getlist("origin"))
    if foreign or not _OWN_PAGES.issuperset(map(str.lower, sites)):
        raise AdminForbidden(
            "Cross-origin browser requests to /admin are rejected (Sec-Fetch-Site, Origin). Send them from a "
            "command line, or from a page of this service's own address."
        )


def _is_foreign(origin: str, request: Request) -> bool:
    """Whether a page of another site sent the request; `null` is the origin of pages that hide theirs."""
    _, scheme, address = origin.lower().partition("://")
    return not (scheme and address) or address != request.headers.get("host", "").lower()


def _check_key(request: Request, key: str) -> None:
    given = request.headers.get("authorization", "")
    is_bearer = given[: len(_SCHEME)].lower() == _SCHEME
    # As bytes: compare_digest rejects non-ASCII text.
    token = given[len(_SCHEME) :].strip().encode()
    if not is_bearer:
        raise AdminKeyWrong("Missing admin API key: send 'Authorization: Bearer ADMIN_API_KEY'.")
    if not hmac.compare_digest(token, key.encode()):
        raise AdminKeyWrong("Invalid admin API key: it is not the service's ADMIN_API_KEY.")


def _comes_from_this_machine(request: Request) -> bool:
    """Whether the peer of the socket is on this machine and is no proxy.

    The Host header must name this machine as well: a web page's own domain name can be made to resolve to
    127.0.0.1 (DNS rebinding).
    """
    if request.client is None or any(header.startswith(_FORWARDED) for header in request.headers):
        return False
    hosts = request.headers.getlist("host")
    return _is_loopback(request.client.host) and len(hosts) == 1 and _names_this_machine(hosts[0])


def _names_this_machine(host: str) -> bool:
    """Whether a Host header, with or without a port, is `localhost` or a loopback address."""
    found = _HOST.fullmatch(host)
    name = "" if found is None else found[1].lower().strip("[]")
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def _how_to_open(request: Request) -> str:
    _, port = request.scope.get("server") or ("", 8080)
    return (
        "No ADMIN_API_KEY is configured, so /admin accepts only requests from the machine that the service "
        f"runs on, sent to http://127.0.0.1:{port} and not through a proxy. Start the service with a key "
        "(`docker run -e ADMIN_API_KEY=...`) and send it as 'Authorization: Bearer ...'; or open /admin to "
        "everyone with `-e ADMIN_OPEN=true`."
    )
