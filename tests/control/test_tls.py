"""Servers with certificates: HTTPS is served, a renewed certificate goes live, and nobody is refused meanwhile."""

from __future__ import annotations

import asyncio
import errno
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from runner.cli.chat import Conversation
from runner.control.generations import Generations
from runner.control.ledger import Cause
from runner.errors import RunnerError
from tests.control.asking import ONE
from tests.control.scene import Scene

TLS = "tls: {cert: ./tls/cert.pem, key: ./tls/key.pem}"


def make_certificate(folder: Path, name: str = "localhost") -> Path:
    """A certificate of its own signature, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    folder.mkdir(exist_ok=True)
    made = {end: folder / f"new-{end}.pem" for end in ("cert", "key")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(made["key"]), "-out", str(made["cert"])],
        check=True, capture_output=True,
    )  # fmt: skip
    for end, path in made.items():
        path.replace(folder / f"{end}.pem")
    return folder / "cert.pem"


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def presented(port: int) -> bytes:
    """The certificate that a server shows."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port)))


def in_file(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


@pytest.fixture
def secured(scene: Scene) -> Scene:
    make_certificate(scene.folder / "tls")
    scene.model("chat", token_seconds=0.01)
    scene.lm = scene.lm.replace("}", f", {TLS}}}")
    scene.write(ONE)
    return scene


async def test_https_is_served_and_http_is_not(secured: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    secured.start()
    await secured.event("applied")
    certificate = secured.folder / "tls" / "cert.pem"
    assert secured.runner is not None
    (server,) = secured.runner.status()["servers"]
    assert server["address"] == f"https://127.0.0.1:{secured.port()}"
    async with httpx.AsyncClient(verify=trusting(certificate)) as client:
        assert (await client.get(f"{server['address']}/v1/models")).status_code == 200
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://127.0.0.1:{secured.port()}/v1/models")
    talk = Conversation(server["address"], "chat", None, None, None, server["certificate"])
    assert await asyncio.to_thread(talk.say, "hello") != ""
    make_certificate(secured.folder / "other")
    other = Conversation(server["address"], "chat", None, None, None, str(secured.folder / "other" / "cert.pem"))
    with pytest.raises(RunnerError, match="does not answer"):
        await asyncio.to_thread(other.say, "hello")


async def test_a_renewed_certificate_goes_live_and_refuses_nobody(secured: Scene) -> None:
    secured.start()
    await secured.event("applied")
    certificate, port = secured.folder / "tls" / "cert.pem", secured.port()
    url = f"https://127.0.0.1:{port}"
    pid = secured.live.deployments["chat"].engine.pid
    async with httpx.AsyncClient(verify=trusting(certificate), timeout=30) as client:
        running = asyncio.create_task(client.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 150}))
        codes: list[int] = []
        done = asyncio.Event()

        async def keep_asking() -> None:
            while not done.is_set():
                async with httpx.AsyncClient(verify=False, timeout=30) as fresh:
                    codes.append((await fresh.get(f"{url}/health")).status_code)

        asking = asyncio.create_task(keep_asking())
        while not codes:
            await asyncio.sleep(0.01)
        for count in (2, 3, 4):
            make_certificate(secured.folder / "tls", f"renewed{count}")
            await secured.event("applied", count)
        await secured.live.settle()
        seen = len(codes)
        while len(codes) < seen + 3:
            await asyncio.sleep(0.01)
        done.set()
        await asking
        assert set(codes) == {200}, "nobody is refused while one takes over from the other"
        assert await asyncio.to_thread(presented, port) == in_file(certificate)
        assert (await running).json()["usage"]["completion_tokens"] == 150
    planned = [e for e in secured.events if e["event"] == "planned"][-1]["plan"]["actions"]
    assert [(a["action"], a["target"], a["disruption"]) for a in planned] == [("move", "servers.lm", "in place")]
    assert [c["path"] for c in planned[0]["changes"]] == ["tls.content"]
    assert "PRIVATE" not in str(secured.events)
    assert secured.live.deployments["chat"].engine.pid == pid


async def test_from_http_to_https_and_back(scene: Scene) -> None:
    certificate = make_certificate(scene.folder / "tls")
    plain = scene.lm
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    for count, (lm, scheme) in enumerate(((plain.replace("}", f", {TLS}}}"), "https"), (plain, "http")), 2):
        scene.lm = lm
        scene.write(ONE)
        await scene.event("applied", count)
        async with httpx.AsyncClient(verify=trusting(certificate)) as client:
            assert (await client.get(f"{scheme}://127.0.0.1:{scene.port()}/health")).status_code == 200


async def test_a_certificate_that_cannot_be_used_changes_nothing(secured: Scene) -> None:
    secured.start()
    await secured.event("applied")
    folder, port = secured.folder / "tls", secured.port()
    before = await asyncio.to_thread(presented, port)
    key = (folder / "key.pem").read_bytes()
    make_certificate(secured.folder / "other")
    shutil.copy(secured.folder / "other" / "key.pem", folder / "key.pem")
    failed = await secured.event("apply_failed")
    assert "dev.yaml:4:" in failed["error"]
    assert "servers.lm.tls.key: is not the key of this certificate [E511]" in failed["error"]
    assert await asyncio.to_thread(presented, port) == before
    (folder / "key.pem").unlink()
    assert "cannot be read: No such file" in (await secured.event("apply_failed", 2))["error"]
    (folder / "key.pem").write_bytes(key)
    await secured.event("unchanged")
    assert await asyncio.to_thread(presented, port) == before


async def test_a_failed_plan_keeps_the_certificate_that_is_served(secured: Scene) -> None:
    secured.model("broken", refuse="no such architecture")
    secured.start()
    await secured.event("applied")
    before = await asyncio.to_thread(presented, secured.port())
    make_certificate(secured.folder / "tls", "renewed")
    secured.write(f"{ONE}\nbroken: {{source: ./models/broken}}")
    await secured.event("apply_failed")
    assert await asyncio.to_thread(presented, secured.port()) == before


async def test_a_generation_that_cannot_be_written_leaves_the_port_served(
    secured: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured.start()
    await secured.event("applied")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Generations, "write", full)
        certificate = make_certificate(secured.folder / "tls", "renewed")
        assert "No space left" in (await secured.event("apply_failed"))["error"]
        await secured.until(lambda: "lm" in secured.live.listeners)
        assert await asyncio.to_thread(presented, secured.port()) == in_file(certificate)
    secured.write(f"{ONE}  # again")
    await secured.event("applied", 2)
    assert await asyncio.to_thread(presented, secured.port()) == in_file(certificate)


async def test_going_back_does_not_bring_back_an_old_certificate(secured: Scene) -> None:
    secured.start()
    await secured.event("applied")
    secured.write("chat: {source: ./models/chat, aliases: [again]}")
    await secured.event("applied", 2)
    certificate = make_certificate(secured.folder / "tls", "renewed")
    await secured.event("applied", 3)
    assert secured.runner is not None
    await secured.runner._reconciler.roll_back(1, Cause("rollback", "jo"))
    assert secured.live.deployments["chat"].spec.aliases == ()
    assert await asyncio.to_thread(presented, secured.port()) == in_file(certificate)
