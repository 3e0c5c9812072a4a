"""Opens, closes and reopens listeners, and says so."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from runner.control.backoff import Backoff
from runner.control.live import Live
from runner.errors import ListenerError
from runner.gateway.listener import Listener
from runner.plan.spec import ListenerSpec

logger = logging.getLogger(__name__)


async def open_listener(live: Live, spec: ListenerSpec, sock: socket.socket | None = None) -> Listener:
    """A listener that takes requests, on a socket that another one handed over or on its own. Raises ListenerError."""
    if (leaving := live.leaving.get(spec.port)) is not None:
        await leaving.wait()  # one of ours is about to give this port back
    listener = Listener(spec, live.directory, live.metrics, live.admin)
    await listener.start(sock)
    live.emit("listening", target=f"servers.{spec.name}", address=spec.url)
    return listener


async def close_listener(live: Live, listener: Listener) -> None:
    """Drain a listener that takes no new requests any more, up to the drain timeout. Its port is free long before."""
    port = listener.address[1]
    leaving = live.leaving[port] = asyncio.Event()
    live.draining.add(listener)
    try:
        await listener.release()
    finally:
        leaving.set()
        if live.leaving.get(port) is leaving:
            del live.leaving[port]
    try:
        cut = await listener.close(live.options.drain_timeout)
    finally:
        live.draining.discard(listener)
    if cut:
        logger.warning("requests were cut at the drain deadline", extra={"listener": listener.spec.name, "count": cut})


async def reopen_listener(live: Live, spec: ListenerSpec) -> None:
    """Have a listener again that had given its port back; while another has the port, it is tried again and again."""
    try:
        live.listeners[spec.name] = await open_listener(live, spec)
    except ListenerError as error:
        live.emit("listener_lost", target=f"servers.{spec.name}", error=str(error))
        live.keep_trying(_until_open(live, spec))


async def _until_open(live: Live, spec: ListenerSpec) -> None:
    backoff = Backoff()
    while spec.name not in live.listeners:
        await asyncio.sleep(backoff.failed(time.monotonic()))
        try:
            listener = await open_listener(live, spec)
        except ListenerError:
            continue
        if spec.name in live.listeners:  # a plan was faster
            await listener.close(0.0)
        else:
            live.listeners[spec.name] = listener
