"""Certificates by file as gRPC credentials: read again when they change, and never half of a change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from cluster.errors import ConfigError
from cluster.settings import LOOPBACK, ClientSecurity, SecurityConfig

log = logging.getLogger(__name__)

Options = tuple[tuple[str, object], ...]
Metadata = tuple[tuple[str, str], ...]
Stamp = tuple[tuple[int, int, int], ...]


class ServerCertificates:
    """Certificate, key and authorities of a server. With ``authorities`` peers must show a certificate of theirs.

    gRPC asks for them before every handshake, in a thread of its own. What has changed is taken only when certificate
    and key fit together and can be read; until then, and it is logged, those of before stay in use.

    Raises (constructor):
        ConfigError: a file cannot be read, is no PEM, or the key is another certificate's.
    """

    def __init__(self, cert: str, key: str, authorities: str) -> None:
        self._files = [Path(cert), Path(key)] + ([Path(authorities)] if authorities else [])
        self._stamp = self._seen = self._look()
        self._config = self._read()
        self.reloads = 0
        """How often they were read again."""
        self.failures = 0
        """How often a change could not be used."""

    @property
    def mutual(self) -> bool:
        """Peers must show a certificate."""
        return len(self._files) > 2

    def credentials(self) -> grpc.ServerCredentials:
        """For ``add_secure_port``."""
        newer: Any = self._newer  # its stub does not know that None stands for no change
        return grpc.dynamic_ssl_server_credentials(self._config, newer, require_client_authentication=self.mutual)

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """What is to be used from now on; None for what was used before."""
        try:
            seen = self._look()
            if seen in (self._stamp, self._seen):
                return None
            self._seen = seen
            self._config = self._read()
        except ConfigError as exc:
            self.failures += 1
            log.error("certificates have changed and cannot be used; those of before stay: %s", exc)
            return None
        self._stamp = seen
        self.reloads += 1
        log.info("certificates were read again: %s", ", ".join(map(str, self._files)))
        return self._config

    def _look(self) -> Stamp:
        """What changes when a file does."""
        found = []
        for path in self._files:
            try:
                about = path.stat()
            except OSError as exc:
                raise ConfigError(f"security: cannot read {str(path)!r}: {exc.strerror}") from exc
            found.append((about.st_ino, about.st_size, about.st_mtime_ns))
        return tuple(found)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key, *authorities = (read_pem(str(path)) for path in self._files)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._files[0], self._files[1], _no_password)
            if authorities:
                context.load_verify_locations(cadata=authorities[0].decode("ascii", "replace"))
        except (ssl.SSLError, OSError) as exc:
            names = ", ".join(map(str, self._files))
            raise ConfigError(f"security: {names} do not go together or are damaged: {exc}") from exc
        return grpc.ssl_server_certificate_configuration([(key, cert)], authorities[0] if authorities else None)


def _no_password() -> str:
    raise ConfigError("security.key: it is encrypted, and nobody is there to type its password; decrypt the file")


def read_pem(path: str) -> bytes:
    """A PEM file.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"security: cannot read {path!r}: {exc.strerror}") from exc
    if b"-----BEGIN " not in content:
        raise ConfigError(f"security: {path!r} is no PEM file")
    return content


def link_server(security: SecurityConfig) -> ServerCertificates | None:
    """For a group's gRPC server: mutual, with the cluster's own authorities. None for plain text."""
    return ServerCertificates(security.cert, security.key, security.ca) if security.tls else None


def client_server(security: SecurityConfig) -> ServerCertificates | None:
    """For the client port. None for plain text."""
    return ServerCertificates(security.cert, security.key, security.client_ca) if security.tls else None


def link_channel(address: str, security: SecurityConfig, options: Options) -> grpc.Channel:
    """A router's channel to a group. Files are read now, so a link that is made again has the newest.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not security.tls:
        return grpc.insecure_channel(address, options=options)
    credentials, options = _credentials(security.ca, security.cert, security.key, security.peer_name, options)
    return grpc.secure_channel(address, credentials, options=options)


def client_channel(address: str, security: ClientSecurity, options: Options) -> grpc.Channel:
    """A client's channel to a router.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not security.ca:
        _check_plain(address, security)
        return grpc.insecure_channel(address, options=options)
    credentials, options = _credentials(security.ca, security.cert, security.key, security.name, options)
    return grpc.secure_channel(address, credentials, options=options)


def bearer(security: ClientSecurity) -> Metadata:
    """Metadata that a client sends with every call.

    Raises:
        ConfigError: the file with the token cannot be read.
    """
    token = security.token
    if security.token_file:
        try:
            token = Path(security.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"EXPERTMESH_CLIENT_TOKEN_FILE: cannot read {security.token_file!r}: {exc}") from exc
    return (("authorization", f"Bearer {token}"),) if token else ()


def aio_client_channel(address: str, security: ClientSecurity, options: Options) -> tuple[grpc.aio.Channel, Metadata]:
    """As `client_channel`, for asyncio, with the metadata of every call.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not security.ca:
        _check_plain(address, security)
        return grpc.aio.insecure_channel(address, options=options), bearer(security)
    credentials, options = _credentials(security.ca, security.cert, security.key, security.name, options)
    return grpc.aio.secure_channel(address, credentials, options=options), bearer(security)


def _check_plain(address: str, security: ClientSecurity) -> None:
    """A token is not shown to whoever happens to answer."""
    host = address.rpartition(":")[0]
    if (security.token or security.token_file) and host not in LOOPBACK and not security.trust_network:
        raise ConfigError(
            f"EXPERTMESH_CLIENT_CA: must be set to send a token to {host}, or the token can be read on the way "
            "(EXPERTMESH_CLIENT_TRUST_NETWORK=true where nobody can)"
        )


def _credentials(ca: str, cert: str, key: str, name: str, options: Options) -> tuple[grpc.ChannelCredentials, Options]:
    own = (read_pem(key), read_pem(cert)) if cert else (None, None)
    credentials = grpc.ssl_channel_credentials(read_pem(ca), *own)
    return credentials, (*options, ("grpc.ssl_target_name_override", name)) if name else options


def check_files(security: SecurityConfig) -> None:
    """Refuses certificates that cannot be used, before anything is started. They must be there on every host.

    Raises:
        ConfigError: says which.
    """
    if security.tls:
        client_server(security)
        if security.ca:
            link_server(security)
