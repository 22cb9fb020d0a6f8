"""A Kafka that wants TLS and a login, a registry that wants credentials, and the certificates for both."""

from __future__ import annotations

import base64
import ssl
import subprocess
import sys
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from delta_sync.testing.kafka import CONTROLLER_OFFSET, SASL_OFFSET, Kafka, admin_client
from delta_sync.testing.processes import free_port

SASL_SSL_OFFSET, SSL_OFFSET = 3, 4  # further listeners, from the port of the clients without credentials
USER, PASSWORD = "delta", 'a "pass\\word" with $ and é'  # what each client has to write in its own way
WAIT_S = 60.0

# Imported by name: it has no types.
_Upsertion: Any = import_module("kafka.admin").UserScramCredentialUpsertion


class Authority:
    """Issues certificates, with keys as PKCS #8 in PEM files; `certificate` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.certificate, self._key = folder / "ca.pem", folder / "ca-key.pem"
        _openssl(name, self._key, self.certificate)

    def issue(self, name: str, *hosts: str) -> tuple[Path, Path]:
        """Return files with a certificate and its key."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        names = ["-addext", f"subjectAltName={','.join(hosts)}"] if hosts else []
        _openssl(name, key, certificate, "-CA", str(self.certificate), "-CAkey", str(self._key), *names)
        return certificate, key


def _openssl(name: str, key: Path, certificate: Path, *options: str) -> None:
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", *kind, "-subj", f"/CN={name}", *files, *options]
    subprocess.run(command, check=True, capture_output=True)


class SecureKafka(Kafka):
    """A broker with two listeners more: `sasl_ssl_url` wants a login, by PLAIN or SCRAM, and `ssl_url` a certificate of
    the same authority. `USER` may do everything, by whatever way."""

    def __init__(self, authority: Authority) -> None:
        port = free_port(CONTROLLER_OFFSET, SASL_OFFSET, SASL_SSL_OFFSET, SSL_OFFSET)
        super().__init__(port=port)
        self._authority = authority

    @property
    def sasl_ssl_url(self) -> str:
        return f"127.0.0.1:{self.port + SASL_SSL_OFFSET}"

    @property
    def ssl_url(self) -> str:
        return f"127.0.0.1:{self.port + SSL_OFFSET}"

    def _texts(self) -> dict[str, str]:
        texts = super()._texts()
        certificate, key = self._authority.issue("broker", "IP:127.0.0.1")
        store = self.directory / "broker.pem"
        store.write_text(key.read_text() + certificate.read_text())
        more = f",SASL_SSL://{self.sasl_ssl_url},SSL://{self.ssl_url}"
        escaped = PASSWORD.replace("\\", "\\\\").replace('"', '\\"')
        login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{escaped}";'
        return texts | {
            "listeners": texts["listeners"] + more,
            "advertised.listeners": texts["advertised.listeners"] + more,
            "listener.security.protocol.map": texts["listener.security.protocol.map"] + ",SASL_SSL:SASL_SSL,SSL:SSL",
            "listener.name.sasl_ssl.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            # The file is one of Java properties, which take a backslash as the beginning of an escape.
            "listener.name.sasl_ssl.plain.sasl.jaas.config": _property(login),
            "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": f"{_SCRAM} required;",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f"{_SCRAM} required;",
            "listener.name.ssl.ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self._authority.certificate),
        }

    def add_user(self) -> None:
        """Let USER log in by SCRAM; PLAIN is configured."""
        with admin_client(self.url) as admin:
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):  # of one user, Kafka takes one at a time
                changed = admin.alter_user_scram_credentials([_Upsertion(USER, mechanism, PASSWORD)])
                assert changed == {USER: None}


_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"


def _property(text: str) -> str:
    return "".join(char if char.isascii() else f"\\u{ord(char):04x}" for char in text.replace("\\", "\\\\"))


class GuardedRegistry:
    """A registry behind a proxy that asks for credentials, as companies have it."""

    def __init__(self, port: int, user: str, password: str, token: str, authority: Authority | None = None) -> None:
        """`port` is that of the registry itself, on 127.0.0.1; without an `authority` it has no TLS."""
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.schemes_seen: set[str] = set()
        accepted = {f"Basic {basic}", f"Bearer {token}"}
        self._server = _Server(("127.0.0.1", 0), _handler(port, accepted, self.schemes_seen))
        self._server.daemon_threads = True
        self._scheme = "https" if authority else "http"
        if authority is not None:
            self._encrypt(authority)
        self._thread = threading.Thread(target=self._server.serve_forever, name="registry proxy", daemon=True)

    def _encrypt(self, authority: Authority) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("registry", "IP:127.0.0.1"))
        # The handshake is made by the thread that serves a connection, or a client that trusts another stops all.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}/apis/ccompat/v7"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ssl.SSLError):  # a client that trusts another authority, as it should say
            super().handle_error(request, client_address)


def _handler(port: int, accepted: Collection[str], schemes_seen: set[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") not in accepted:
                self._answer(401, "text/plain", b"who are you?")
                return
            schemes_seen.add(self.headers["Authorization"].partition(" ")[0])
            kept = {name: self.headers[name] for name in ("Content-Type", "Accept") if name in self.headers}
            kept |= {name: value for name, value in self.headers.items() if name.lower().startswith("x-registry")}
            url = f"http://127.0.0.1:{port}{self.path}"
            reply = requests.request(self.command, url, data=body, headers=kept, timeout=WAIT_S)
            self._answer(reply.status_code, reply.headers.get("Content-Type", "text/plain"), reply.content)

        do_GET = do_POST = do_PUT = do_DELETE = _pass_on  # noqa: N815 -- http.server's names

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="registry"')
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
            """Nobody reads it."""

    return Handler
