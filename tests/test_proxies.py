"""Proxies of the environment and private certificate authorities, over real sockets."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from .conftest import FakeProvider, Workspace
from .test_bombs import tls_server

Provide = Callable[..., FakeProvider]
HOST = "api.example.test"
"""A name that no resolver knows: what gets there went through the proxy."""
PASSWORD = "p@ss word/1234567"


class Proxy:
    """Hands everything on to one port of this machine.

    Attributes:
        asked: the heads that it got.
    """

    def __init__(self, target: int, refuses: bool = False) -> None:
        self.asked: list[str] = []
        self.refuses = refuses
        self._target = target

    def handle(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = client.recv(65536)
            if not piece:
                return
            head += piece
        self.asked.append(head.partition(b"\r\n\r\n")[0].decode("latin-1"))
        if self.refuses:
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            if head.startswith(b"CONNECT"):
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                server.sendall(head)
            other = threading.Thread(target=_pump, args=(server, client))
            other.start()
            _pump(client, server)
            other.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def proxy_to(target: int, *, refuses: bool = False) -> Iterator[tuple[str, Proxy]]:
    """A proxy that asks for a name and a password; its address, and what it saw."""
    proxy = Proxy(target, refuses)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        ended = threading.Event()
        threads = []

        def handle(client: socket.socket) -> None:
            with client, suppress(OSError):
                client.settimeout(20)
                proxy.handle(client)

        def serve() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    client, _ = listening.accept()
                    threads.append(threading.Thread(target=handle, args=(client,)))
                    threads[-1].start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://user:{quote(PASSWORD, safe='')}@127.0.0.1:{listening.getsockname()[1]}", proxy
        finally:
            ended.set()
            for each in (thread, *threads):
                each.join()


@pytest.fixture
def authority(work: Workspace, tmp_path: Path) -> trustme.CA:
    """A certificate authority that this machine is told to trust."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    work.env["SSL_CERT_FILE"] = str(tmp_path / "authority.pem")
    return authority


def write_job(work: Workspace, scheme: str) -> None:
    work.write_rows(["a"])
    # No price is asked for, and the prompt is all that goes out.
    work.write_job(
        f"{scheme}://{HOST}/v1", prices={"input_mtok": 1, "output_mtok": 1}, retry={"max_attempts": 1},
        provider={"name": "mine", "base_url": f"{scheme}://{HOST}/v1", "api_key_env": "AIML_API_KEY",
                  "allow_insecure_http": scheme == "http"},
    )  # fmt: skip


def test_https_goes_through_the_proxy_and_only_the_server_sees_the_key(work: Workspace, authority: trustme.CA) -> None:
    write_job(work, "https")
    with tls_server(authority.issue_cert(HOST)) as (port, got), proxy_to(port) as (address, proxy):
        work.env["HTTPS_PROXY"] = address
        result = work.run("--json")
        (prompt,) = [raw for raw in got if raw.startswith(b"POST")]
    assert result.code == 0, result.stderr
    (head,) = proxy.asked
    assert head.startswith(f"CONNECT {HOST}:443 ")
    credentials = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert f"Proxy-Authorization: Basic {credentials}" in head
    assert "Bearer" not in head
    assert b"Bearer" in prompt
    assert b"proxy-authorization" not in prompt.lower()


def test_plain_http_goes_through_its_own_proxy(work: Workspace, provide: Provide) -> None:
    provider = provide()
    write_job(work, "http")
    with proxy_to(provider.port) as (address, proxy):
        work.env |= {"HTTP_PROXY": address, "http_proxy": address, "HTTPS_PROXY": "http://127.0.0.1:1"}
        result = work.run("--json")
    assert result.code == 0, result.stderr
    (head,) = proxy.asked
    assert head.startswith(f"POST http://{HOST}/v1/chat/completions ")
    assert "Proxy-Authorization: Basic" in head
    assert len(provider.requests) == 1


def test_no_proxy_names_what_is_asked_straight_away(work: Workspace, authority: trustme.CA) -> None:
    write_job(work, "https")
    with tls_server(authority.issue_cert(HOST)) as (port, got), proxy_to(port) as (address, proxy):
        work.env |= {"HTTPS_PROXY": address, "NO_PROXY": f"localhost,{HOST}"}
        result = work.run("--json")
    assert result.code == 4, result.stderr  # nobody knows the name
    assert (proxy.asked, got) == ([], [])
    assert result.json["unknown_outcomes"] == 0


def test_a_proxy_that_refuses_has_cost_nothing_and_its_password_is_written_nowhere(
    work: Workspace, authority: trustme.CA
) -> None:
    write_job(work, "https")
    with tls_server(authority.issue_cert(HOST)) as (port, got), proxy_to(port, refuses=True) as (address, proxy):
        work.env["HTTPS_PROXY"] = address
        result = work.run("--json")
    assert result.code == 4, result.stderr
    assert proxy.asked
    assert got == []
    assert "407" in result.stderr
    assert result.json["unknown_outcomes"] == 0
    secret = address.split("user:")[1].split("@")[0]
    kept = result.stdout + result.stderr + work.ledger.read_bytes().decode("latin-1")
    assert PASSWORD not in kept
    assert secret not in kept


def test_a_server_whose_authority_nobody_knows_gets_nothing(work: Workspace, authority: trustme.CA) -> None:
    stranger = trustme.CA()
    write_job(work, "https")
    with tls_server(stranger.issue_cert(HOST)) as (port, got), proxy_to(port) as (address, _):
        work.env["HTTPS_PROXY"] = address
        result = work.run("--json")
    assert result.code == 4, result.stderr
    assert "certificate" in result.stderr.lower()
    assert got == []
