"""Kernels that are written for CUDA: whether they can be used in this process, and how they are called.

MLX would compile each of them in each process, one after the other, 1 to 4 s a kernel. `Kernel` keeps compiled code on
disk (`kernel_cache.py`), and what is not there yet it compiles itself (`cuda_compiler.py`), side by side in threads.
Whatever goes wrong with that, MLX compiles as ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any, Final

import mlx.core as mx

from runner.engine import kernel_cache
from runner.engine.cuda_compiler import CompileError
from runner.engine.cuda_text import Argument, Definition, Template, Text

logger = logging.getLogger(__name__)

_MOST_THREADS: Final = 16

Size = tuple[int, int, int]


@cache
def usable(switch: str) -> bool:
    """On a CUDA device that MLX computes on, unless the environment variable `switch` is 0."""
    return os.environ.get(switch) != "0" and bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)


def terse(source: str) -> str:
    """A kernel's text without what only readers need: MLX copies and hashes it in each call."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


class Kernel:
    """A kernel of `mx.fast.cuda_kernel`, called as that is.

    What is compiled is a variant: one for each template. What a template leaves open, as a rule the types of arrays,
    is taken from the variant's first call, or from `prepare`; a call with others is right as well, but MLX compiles it.
    """

    def __init__(
        self,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> None:
        """Raises RuntimeError where MLX has no CUDA."""
        self._architecture = kernel_cache.architecture()
        # By it the name of the compiled code, which is the text's, tells devices apart.
        marked = f"// {self._architecture}\n{header}"
        self._definition = Definition(name, input_names, output_names, source, marked)
        self._launch: Any = mx.fast.cuda_kernel(
            name=name,
            input_names=list(input_names),
            output_names=list(output_names),
            source=source,
            header=marked,
            ensure_row_contiguous=ensure_row_contiguous,
            shared_memory=shared_memory,
        )
        self._begun: dict[tuple[Any, ...], Future[None]] = {}
        self._ready: set[tuple[Any, ...]] = set()

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        grid: Size,
        threadgroup: Size,
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        template: Template = (),
    ) -> list[mx.array]:
        """One launch; the first of a variant waits for its code."""
        if tuple(template) not in self._ready:
            self._begin([Argument(array.dtype, array.ndim == 0) for array in inputs], output_dtypes, template)
            self._wait()
        result: list[mx.array] = self._launch(
            inputs=inputs,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            template=template,
        )
        return result

    def prepare(self, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype], template: Template = ()) -> None:
        """Begin to compile a variant, for arrays (no scalars) of such types. Returns at once."""
        self._begin([Argument(dtype) for dtype in inputs], outputs, template)

    @cached_property
    def launch(self) -> Any:
        """MLX's own callable, once what is prepared is compiled: a call of it costs no more than MLX's."""
        self._wait()
        return self._launch

    def _begin(self, inputs: Sequence[Argument], outputs: Sequence[mx.Dtype], template: Template) -> None:
        key = tuple(template)
        if self._architecture is None or kernel_cache.folder() is None:
            self._ready.add(key)
        elif key not in self._begun:
            try:
                text = self._definition.text(inputs, outputs, template)
            except (KeyError, OSError) as reason:
                _left_to_mlx(self._definition.name, reason)
                self._ready.add(key)
            else:
                self._begun[key] = _threads().submit(_provide, text, self._architecture)

    def _wait(self) -> None:
        for key in list(self._begun):
            self._begun[key].result()
            self._ready.add(key)


def _provide(text: Text, architecture: str) -> None:
    try:
        kernel_cache.provide(text, architecture)
    except (CompileError, OSError) as reason:
        _left_to_mlx(text.module, reason)


def _left_to_mlx(kernel: str, reason: Exception) -> None:
    logger.warning("MLX compiles a kernel", extra={"kernel": kernel, "reason": str(reason)})


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "compile")
