"""Waits until a command that runs in another thread is attached to the runner of a scene."""

import asyncio

from tests.control.scene import Scene


async def attached(scene: Scene) -> None:
    """Returns once someone is subscribed to the runner's events. Raises TimeoutError after 15 s."""
    assert scene.runner is not None
    async with asyncio.timeout(15):
        while not scene.runner._events._subscribers:
            await asyncio.sleep(0.005)
