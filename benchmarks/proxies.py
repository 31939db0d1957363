"""Plain reverse proxies from Debian in front of a host's unix socket: the reference cost of relaying a token.

Each is configured as its manual recommends for server-sent events: no buffering, keep-alive connections to
the host, one worker, no access log.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Server, free_port, running

_NGINX = """
daemon off;
worker_processes 1;
pid {room}/nginx.pid;
error_log {room}/error.log;
{user}
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {room}/body;
    proxy_temp_path {room}/proxy;
    fastcgi_temp_path {room}/fastcgi;
    uwsgi_temp_path {room}/uwsgi;
    scgi_temp_path {room}/scgi;
    upstream host {{
        server unix:{socket};
        keepalive 512;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://host;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""

_HAPROXY = """
global
    nbthread 1
    maxconn 8192
defaults
    mode http
    timeout connect 10s
    timeout client 300s
    timeout server 300s
    option http-no-delay
    http-reuse always
frontend front
    bind 127.0.0.1:{port} backlog 2048
    default_backend hosts
backend hosts
    server host unix@{socket}
"""


@dataclass(frozen=True)
class Proxy:
    """A proxy that may be installed. `package`: its Debian package."""

    name: str
    package: str
    config: str
    arguments: tuple[str, ...]

    @property
    def program(self) -> str | None:
        # Debian installs servers outside a plain user's PATH.
        return shutil.which(self.name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


NGINX = Proxy("nginx", "nginx-light", _NGINX, ("-e", "{room}/error.log", "-p", "{room}", "-c"))
HAPROXY = Proxy("haproxy", "haproxy", _HAPROXY, ("-db", "-f"))
PROXIES = (NGINX, HAPROXY)


@contextmanager
def proxy_server(proxy: Proxy, socket: str) -> Iterator[Server]:
    """The proxy in front of the host that listens on `socket`."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        config = room / f"{proxy.name}.conf"
        # Only its owner can open the host's socket, and nginx's worker would drop root privileges.
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(proxy.config.format(room=room, socket=socket, port=port, user=user))
        command = [str(proxy.program), *(word.format(room=room) for word in proxy.arguments), str(config)]
        with running(proxy.name, command, {}, port, room, "/health") as server:
            yield server
