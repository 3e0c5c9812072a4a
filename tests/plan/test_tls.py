"""What is said of certificates that no server could use."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runner.errors import ManifestError
from runner.plan.tls import BadCertificate, read_tls

from .conftest import Place

MODELS = "models: {chat: {source: ./chat}}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates with their keys, `a` and `b`; the key of `locked` has a passphrase."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("a", "b", "locked"):
        lock = ["-passout", "pass:secret"] if name == "locked" else ["-nodes"]
        kind = ["rsa:2048"] if name == "b" else ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", *kind, *lock, "-days", "2", "-subj", "/CN=localhost", *files],
            check=True,
            capture_output=True,
        )
    (folder / "text").write_text("no certificate\n")
    (folder / "cut.pem").write_text((folder / "a.pem").read_text()[:200])
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "file", "message"),
    [
        ("none.pem", "a.key", "cert", "cannot be read: No such file or directory"),
        ("a.pem", "none.key", "key", "cannot be read: No such file or directory"),
        (".", "a.key", "cert", "cannot be read: Is a directory"),
        ("text", "a.key", "cert", "holds no certificate in PEM form"),
        ("a.pem", "text", "key", "holds no private key in PEM form"),
        ("a.key", "a.pem", "cert", "holds no certificate in PEM form"),
        ("a.pem", "b.key", "key", "is not the key of this certificate"),
        ("locked.pem", "locked.key", "key", "is locked with a passphrase"),
        ("cut.pem", "a.key", "cert", "cannot be used with its key"),
    ],
)
def test_what_cannot_be_used(made: Path, cert: str, key: str, file: str, message: str) -> None:
    with pytest.raises(BadCertificate) as refused:
        read_tls(made / cert, made / key)
    assert refused.value.file == file
    assert refused.value.message.startswith(message)
    assert refused.value.hint


def test_a_renewed_certificate_has_another_digest(made: Path, tmp_path: Path) -> None:
    found = [read_tls(made / f"{name}.pem", made / f"{name}.key").digest for name in ("a", "a", "b")]
    assert found[0] == found[1] != found[2]


def test_paths_start_in_the_folder_of_the_manifest_and_errors_stand_at_their_place(folders: Place, made: Path) -> None:
    shutil.copytree(made, folders.folder / "tls")
    head = "name: dev\nservers:\n  lm: {port: 8080, tls: {cert: ./tls/a.pem, key: ./tls/KEY}}\n"
    (listener,) = folders.resolve(head.replace("KEY", "a.key") + MODELS).listeners
    assert listener.url == "https://127.0.0.1:8080"
    assert listener.tls == read_tls(folders.folder / "tls" / "a.pem", folders.folder / "tls" / "a.key")
    with pytest.raises(ManifestError) as refused:
        folders.resolve(head.replace("KEY", "b.key") + MODELS)
    (found,) = refused.value.diagnostics
    assert (found.code, found.line, found.column, found.path) == ("E511", 3, 50, "servers.lm.tls.key")


def test_a_pipe_is_no_certificate_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cert.pem")
    with pytest.raises(BadCertificate, match="cannot be read: not a regular file"):
        read_tls(tmp_path / "cert.pem", tmp_path / "cert.pem")
