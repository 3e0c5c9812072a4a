"""The messages between the runner and an engine process, and their framing.

An engine listens on a unix socket in the state folder; the runner connects. Both directions carry frames: a 4-byte
big-endian length, then one msgpack-encoded tagged struct. Closing the socket is how either side learns that the other
is gone. One `Step` frame carries what all rows of one decode step produced, so the cost of a step in the runner does
not grow with a Python call chain per token.

Adapters are known to the engine by `key` (content digest and scale), never by name: the runner maps names to keys, so
an adapter that changes under its name is simply another key, rows keep the key they began with, and the prefix cache
is keyed by it.
"""

from __future__ import annotations

from typing import Final

from runner.protocol.framing import (
    MAX_FRAME,
    FrameDecoder,
    decoder_from_engine,
    decoder_to_engine,
    encode_frame,
)
from runner.protocol.from_engine import (
    AdapterDropped,
    AdapterLoaded,
    AdapterRefused,
    Delta,
    FinishReason,
    FromEngine,
    Hello,
    Loaded,
    LoadFailed,
    Loading,
    Overrun,
    Rejected,
    Stats,
    Step,
    TokenLogprob,
    ToolCall,
    Usage,
)
from runner.protocol.spec import (
    AdapterSource,
    EngineSpec,
)
from runner.protocol.to_engine import (
    Cancel,
    Configure,
    DropAdapter,
    Generate,
    Grammar,
    LoadAdapter,
    Sampling,
    Shutdown,
    ToEngine,
)

__all__ = [
    "MAX_FRAME",
    "VERSION",
    "AdapterDropped",
    "AdapterLoaded",
    "AdapterRefused",
    "AdapterSource",
    "Cancel",
    "Configure",
    "Delta",
    "DropAdapter",
    "EngineSpec",
    "FinishReason",
    "FrameDecoder",
    "FromEngine",
    "Generate",
    "Grammar",
    "Hello",
    "LoadAdapter",
    "LoadFailed",
    "Loaded",
    "Loading",
    "Overrun",
    "Rejected",
    "Sampling",
    "Shutdown",
    "Stats",
    "Step",
    "ToEngine",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "decoder_from_engine",
    "decoder_to_engine",
    "encode_frame",
]

VERSION: Final = 2
