"""What the host reads of a step on CUDA, in the host's own memory, to which the device writes (zero-copy).

MLX puts an array that the host reads into managed memory, whose pages go to and fro: one of a step's tokens is on the
host when the next step wants to write it, and the device waits for it to come back; and the buffer is used again for
other small arrays, whose pages then do the same. So a launch of ours copies the tokens into a place that stays on the
host, by advice to the driver, and the device reaches by the bus; the host reads it there, and MLX's array not at all.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels
from runner.engine.arrays import from_bytes
from runner.engine.cuda_kernels import Kernel

logger = logging.getLogger(__name__)

SWITCH: Final = "MLX_RUN_ZERO_COPY"
"""Environment variable that turns it off, with 0."""

MOST: Final = 1 << 14
"""Numbers of a step. A place has pages of its own: others' are to stay where they are."""

_SMALL: Final = 2
"""Numbers that MLX has in such memory itself: arrays of up to 8 bytes."""

_PLACES: Final = 8
"""Steps whose numbers may be on their way, or were not read yet; there are two."""

_PREFERRED_LOCATION, _ACCESSED_BY, _THE_HOST = 3, 5, -1
"""As CUDA's driver calls them (CUmem_advise, CU_DEVICE_CPU)."""

THREADS: Final = 256

SOURCE: Final = """
    int count = 1, more = 0;
    for (int i = 0; i < tokens_ndim; ++i) count *= tokens_shape[i];
    if (KEPT) more = kept_shape[0];
    unsigned* const to = const_cast<unsigned*>(place);
    for (int i = threadIdx.x; i < count + more; i += THREADS) {
        to[i] = i < count ? tokens[i] : unsigned(kept[i - count]);
    }
    if (threadIdx.x == 0) done[0] = 1;
"""


class Posted(msgspec.Struct, frozen=True):
    """Numbers of a step that are, or will be, in `place` once `done` is computed: tokens of a `shape`, and as many more
    as it has rows, if there are `kept`."""

    done: mx.array
    place: memoryview
    shape: tuple[int, int]
    kept: bool

    def read(self) -> tuple[list[list[int]], list[int] | None]:
        """Tokens of each row, and how many proposals it kept; waits until they are there."""
        mx.eval(self.done)
        rows, each = self.shape
        numbers = self.place[: rows * each + rows * self.kept].tolist()
        tokens = [numbers[at : at + each] for at in range(0, rows * each, each)]
        return tokens, numbers[rows * each :] if self.kept else None


def post(tokens: mx.array, kept: mx.array | None = None) -> Posted | None:
    """Have the numbers of a step copied, tokens [rows, n] of uint32, and how many were kept, [rows], if any were
    proposed. None where the host has to read the arrays themselves. `done` is still to be dispatched."""
    size = tokens.size + (0 if kept is None else kept.size)
    if not cuda_kernels.usable(SWITCH) or not _SMALL < size <= MOST or tokens.dtype != mx.uint32:
        return None
    if kept is not None and kept.dtype not in (mx.int32, mx.uint32):
        return None
    return None if (places := _tried().places) is None else _copied(next(places), tokens, kept)


def prepare() -> None:
    """Begin to compile what `post` launches, where it can be used."""
    if cuda_kernels.usable(SWITCH):
        _kernel(None)
        _kernel(mx.int32)


def ready() -> None:
    """Try it out, where it can be used: else the first step of several rows would."""
    if cuda_kernels.usable(SWITCH):
        _tried()


Place = tuple[mx.array, memoryview]
"""The same memory for the device and for the host."""


def _copied(place: Place, tokens: mx.array, kept: mx.array | None) -> Posted:
    array, memory = place
    kernel = _kernel(None if kept is None else kept.dtype)
    done: mx.array = kernel.launch(
        inputs=[tokens, array] if kept is None else [tokens, array, kept],
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.uint32],
    )[0]
    rows, each = tokens.shape
    return Posted(done, memory, (rows, each), kept is not None)


class _Tried(msgspec.Struct, frozen=True):
    """Places without end, None where they are of no use; all that was `made` is kept, for pages that stay on the host
    are for nobody else."""

    places: Iterator[Place] | None
    made: list[Place]


@cache
def _tried() -> _Tried:
    """Whether the driver takes the advice, and what is posted is there."""
    made: list[Place] = []
    numbers = mx.arange(6, dtype=mx.uint32).reshape(3, 2)
    try:
        while len(made) < _PLACES and (place := _place()) is not None:
            made.append(place)
        right = len(made) == _PLACES and all(
            _copied(place, numbers, kept).read() == (numbers.tolist(), None if kept is None else kept.tolist())
            for place in made
            for kept in (None, mx.array([7, 8, 9], dtype=mx.int32))
        )
    except (RuntimeError, BufferError, TypeError) as reason:
        logger.warning("tokens are read from managed memory", extra={"reason": str(reason)})
        return _Tried(None, made)
    if not right:
        logger.warning("tokens are read from managed memory", extra={"reason": "they cannot be kept on the host"})
    return _Tried(cycle(made) if right else None, made)


def _place() -> Place | None:
    # From the host, so that MLX has it in managed memory.
    array = from_bytes(memoryview(bytes(MOST * 4))).view(mx.uint32)
    mx.eval(array)
    memory = memoryview(array)  # type: ignore[arg-type]  # arrays have the buffer protocol
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return (array, memory) if _stays_on_the_host(address, memory.nbytes) else None


def _stays_on_the_host(address: int, size: int) -> bool:
    """Whether so many bytes of managed memory do, and the device reaches them there, from now on."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    advise = driver.cuMemAdvise
    advise.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    device = ctypes.c_int()
    if driver.cuCtxGetDevice(ctypes.byref(device)) or advise(address, size, _ACCESSED_BY, device.value):
        return False
    # Last, since others may get the memory where it is refused; that the device has it mapped does them no harm.
    return not advise(address, size, _PREFERRED_LOCATION, _THE_HOST)


def header(*, kept: bool) -> str:
    """What comes before the kernel."""
    return f"constexpr int THREADS = {THREADS}, KEPT = {int(kept)};\n" + ("" if kept else _NOTHING_KEPT)


_NOTHING_KEPT: Final = "constexpr const unsigned* kept = nullptr;\nconstexpr const int* kept_shape = nullptr;\n"


@cache
def _kernel(kept: mx.Dtype | None) -> Kernel:
    inputs = {"tokens": mx.uint32, "place": mx.uint32}
    return Kernel(
        name="post" if kept is None else "post_kept",
        inputs=inputs if kept is None else inputs | {"kept": kept},
        outputs={"done": mx.uint32},
        source=SOURCE,
        header=header(kept=kept is not None),
    )
