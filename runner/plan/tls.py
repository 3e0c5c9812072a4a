"""Certificates of servers: whether they can be used, and what tells that they were renewed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, NoReturn

from runner.manifest.inputs import Inputs
from runner.plan.spec import ListenerSpec, TlsSpec

_OF_ANOTHER: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""OpenSSL's words for a key of another certificate, the last two where it is of another kind too."""


class BadCertificate(Exception):  # noqa: N818 - says what is wrong with a file, and becomes a diagnostic
    """`file` is the key of the manifest's section, `cert` or `key`."""

    def __init__(self, file: Literal["cert", "key"], message: str, hint: str) -> None:
        super().__init__(message)
        self.file = file
        self.message = message
        self.hint = hint


def read_tls(cert: Path, key: Path) -> TlsSpec:
    """The two files as they are now. Raises BadCertificate where no server could use them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, path, begins in (("cert", cert, b"CERTIFICATE-----"), ("key", key, b"PRIVATE KEY-----")):
        which: Literal["cert", "key"] = "cert" if name == "cert" else "key"
        try:
            content = Inputs().read(path)  # no pipe, which could keep us waiting
        except OSError as error:
            raise BadCertificate(which, f"cannot be read: {error.strerror}", f"looked at {path}") from None
        if begins not in content:
            what = "a certificate" if which == "cert" else "a private key"
            raise BadCertificate(which, f"holds no {what[2:]} in PEM form", f"{what} begins with -----BEGIN")
        digest.update(len(content).to_bytes(8, "little") + content)
    _require_pair(cert, key)
    return TlsSpec(cert, key, digest.hexdigest())


def _require_pair(cert: Path, key: Path) -> None:
    # Imported here: 10 ms, which manifests without tls need not wait for.
    import ssl  # noqa: PLC0415

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_locked)
    except ssl.SSLError as error:
        if error.reason in _OF_ANOTHER:
            raise BadCertificate(
                "key", "is not the key of this certificate", "give the two that belong together"
            ) from None
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise BadCertificate("cert", f"cannot be used with its key: {reason}", "write both anew") from None


def _locked() -> NoReturn:
    hint = "nobody is there to type it: `openssl pkey -in KEY -out KEY.open` writes one without"
    raise BadCertificate("key", "is locked with a passphrase", hint)


def with_present_certificates(listeners: Iterable[ListenerSpec]) -> tuple[ListenerSpec, ...]:
    """Listeners of an earlier generation, with their certificates as they are now: who goes back to an earlier state
    does not want a certificate that has expired. Raises BadCertificate."""
    return tuple(
        replace(listener, tls=read_tls(listener.tls.cert, listener.tls.key)) if listener.tls else listener
        for listener in listeners
    )
