"""Kernels that are written for CUDA: whether they can be used in this process, and how they are called.

MLX would compile each of them in each process, one after the other, 1 to 4 s a kernel. `Kernel` keeps compiled code on
disk (`kernel_cache.py`), and what is not there yet it compiles itself (`cuda_compiler.py`), side by side in threads.
What MLX is given then is a stand-in for the text (`cuda_text.py`), which makes launches cheaper. Whatever goes wrong
with that, MLX has the text, and compiles as ever.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property, partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

import mlx.core as mx

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from runner.engine.cuda_text import Definition, Template, Text

# What only a CUDA device needs is imported where a kernel is made: elsewhere it would be 12 ms of a start.

logger = logging.getLogger(__name__)

_MOST_THREADS: Final = 16
_TRIAL: Final = "trial"

KINDS: Final = {mx.bfloat16: ("__nv_bfloat16", "bf16"), mx.float16: ("__half", "f16")}
"""What CUDA calls a type, and what its tensor cores do."""

PROCESSORS: Final = 132
"""Multiprocessors of an H100, or H200."""

_AT_ONCE: Final = 64

_NOTHING: Final = 0xFFFFFFFF
"""Bits of a float that nobody has told."""

_ROOMS: Final = 8
"""Launches that may run at once: those of a model call that do not need each other's results."""

Size = tuple[int, int, int]

Types = Mapping[str, mx.Dtype]
"""Of arrays, by what a source calls them."""


@cache
def usable(switch: str) -> bool:
    """On a CUDA device that MLX computes on, unless the environment variable `switch` is 0."""
    return os.environ.get(switch) != "0" and bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)


def settle() -> None:
    """Have compiled code kept on disk, where there is CUDA; comes before any kernel."""
    if mx.cuda.is_available():
        from runner.engine import kernel_cache  # noqa: PLC0415

        kernel_cache.settle()


def terse(source: str) -> str:
    """A kernel's text without what only readers need: where MLX has it itself, it copies and hashes it in each call."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def filled(source: str, places: Mapping[str, str]) -> str:
    """A kernel's text with what stands at its places, one after the other: a place is a whole word."""
    for place, what in places.items():
        source = re.sub(rf"(?<!\w){re.escape(place)}(?!\w)", what.replace("\\", r"\\"), source)
    return source


class Kernel:
    """A kernel of `mx.fast.cuda_kernel`, for arrays of some types. It begins to be compiled when it is made."""

    def __init__(
        self,
        *,
        name: str,
        inputs: Types,
        outputs: Types,
        source: str,
        header: str = "",
        template: Template = (),
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> None:
        """As MLX has it, with the arrays' types beside their names, and the template that calls would have."""
        from runner.engine import kernel_cache  # noqa: PLC0415
        from runner.engine.cuda_text import Argument, Definition  # noqa: PLC0415

        # By it the name of the compiled code, which is the text's, tells devices apart.
        marked = f"// {kernel_cache.architecture()}\n{header}"
        self._definition = Definition(name, [*inputs], [*outputs], source, marked)
        self._template = list(template)
        self._ensure_row_contiguous, self._shared_memory = ensure_row_contiguous, shared_memory
        self._stand_in: Definition | None = None
        self._provided: Future[bool] | None = None
        architecture = kernel_cache.architecture()
        if architecture is None or kernel_cache.folder() is None:
            return
        if name != _TRIAL:
            _trial()
        arguments = [Argument(dtype) for dtype in inputs.values()]
        try:
            text = self._definition.text(arguments, [*outputs.values()], template)
            self._stand_in = self._definition.stand_in(text)
            sought = text._replace(module=self._stand_in.text(arguments, [*outputs.values()]).module)
        except (KeyError, OSError) as reason:
            _left_to_mlx(name, reason)
        else:
            self._provided = _threads().submit(_provide, sought, architecture)

    @cached_property
    def launch(self) -> Any:
        """MLX's own callable, once the code is there: a call of it costs no more than MLX's.

        It takes no template, no scalars, and no arrays of other types. Raises RuntimeError where MLX has no CUDA.
        """
        if (launch := self.by_name()) is not None and _stand_ins_are_found():
            return launch
        launch = self._made(self._definition)
        return partial(launch, template=self._template) if self._template else launch

    def by_name(self) -> Any:
        """The same for a stand-in, None where no code could be provided."""
        there = self._provided is not None and self._provided.result()
        return self._made(self._stand_in) if there and self._stand_in is not None else None

    def _made(self, definition: Definition) -> Any:
        return mx.fast.cuda_kernel(
            name=definition.name,
            input_names=list(definition.inputs),
            output_names=list(definition.outputs),
            source=definition.source,
            header=definition.header,
            ensure_row_contiguous=self._ensure_row_contiguous,
            shared_memory=self._shared_memory,
        )


@cache
def counters(*shape: int) -> Iterator[mx.array]:
    """int32 zeros of a shape, without end, which every launch leaves as they were. Those that may run at once do not
    share one."""
    arrays = [mx.zeros(shape, dtype=mx.int32) for _ in range(_AT_ONCE)]
    mx.eval(arrays)
    return cycle(arrays)


def room(floats: int) -> mx.array:
    """Where the blocks of a launch leave so many floats for each other.

    It is an input that the launch writes to: a second result would cost the host 2 µs a launch, which has it made,
    allocated, and freed. Those that may run at once do not share one: of a model call that are those of a layer. Calls
    that do not need each other's results are started one by one (`arrays.start`, `mx.eval`), since launches of one
    evaluation that do not depend on each other run at once.
    """
    return next(_rooms(_size(floats), 0))


def exchange(floats: int) -> mx.array:
    """The same for numbers that are told by being there: all bits of its floats are set, and every launch leaves them
    so."""
    return next(_rooms(_size(floats), _NOTHING))


def _size(floats: int) -> int:
    return 1 << max(0, floats - 1).bit_length()


@cache
def _rooms(floats: int, bits: int) -> Iterator[mx.array]:
    arrays = [mx.full((floats,), bits, mx.uint32).view(mx.float32) for _ in range(_ROOMS)]
    mx.eval(arrays)
    return cycle(arrays)


@cache
def _trial() -> Kernel:
    return Kernel(name=_TRIAL, inputs={"x": mx.float32}, outputs={"y": mx.float32}, source="y[0] = x[0];")


@cache
def _stand_ins_are_found() -> bool:
    """Whether MLX finds code by the name of a stand-in. Tried once: where it does not, none of them could be used."""
    if (launch := _trial().by_name()) is None:
        return False
    one = (1, 1, 1)
    x = mx.zeros((1,))
    try:
        mx.eval(launch(inputs=[x], grid=one, threadgroup=one, output_shapes=[(1,)], output_dtypes=[x.dtype]))
    except RuntimeError as reason:
        _left_to_mlx("all of them", reason)
        return False
    return True


def _provide(text: Text, architecture: str) -> bool:
    from runner.engine import kernel_cache  # noqa: PLC0415
    from runner.engine.cuda_compiler import CompileError  # noqa: PLC0415

    try:
        return kernel_cache.provide(text, architecture)
    except (CompileError, OSError) as reason:
        _left_to_mlx(text.module, reason)
        return False


def _left_to_mlx(kernel: str, reason: Exception) -> None:
    logger.warning("MLX compiles a kernel", extra={"kernel": kernel, "reason": str(reason)})


@cache
def _threads() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "compile")
