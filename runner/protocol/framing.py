"""Messages as frames, and frames as messages."""

from __future__ import annotations

from typing import Final, Generic, TypeVar

import msgspec

from runner.protocol.from_engine import FromEngine
from runner.protocol.to_engine import ToEngine

T = TypeVar("T")

MAX_FRAME: Final = 64 * 1024 * 1024
"""Bytes. A longer frame is a protocol error, and ends the connection."""

_encoder = msgspec.msgpack.Encoder()
_LENGTH: Final = 4


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a frame, ready to write."""
    buffer = bytearray(_LENGTH)
    _encoder.encode_into(message, buffer, _LENGTH)
    buffer[:_LENGTH] = (len(buffer) - _LENGTH).to_bytes(_LENGTH, "big")
    return bytes(buffer)


class FrameDecoder(Generic[T]):
    """Splits a byte stream into messages; feed it whatever arrived.

    Raises ValueError on a frame over MAX_FRAME and msgspec.DecodeError on one that does not decode: the connection is
    then of no more use.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Every message that is complete now, in order."""
        self._buffer += data
        messages: list[T] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH:
            size = int.from_bytes(self._buffer[start : start + _LENGTH], "big")
            if size > MAX_FRAME:
                raise ValueError(f"frame of {size} bytes is over the limit of {MAX_FRAME}")
            end = start + _LENGTH + size
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + _LENGTH : end]))
            start = end
        del self._buffer[:start]
        return messages


def decoder_to_engine() -> FrameDecoder[ToEngine]:
    """A decoder for the engine's side."""
    return FrameDecoder(msgspec.msgpack.Decoder(ToEngine))


def decoder_from_engine() -> FrameDecoder[FromEngine]:
    """A decoder for the runner's side."""
    return FrameDecoder(msgspec.msgpack.Decoder(FromEngine))
