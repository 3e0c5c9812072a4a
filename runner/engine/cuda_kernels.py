"""Kernels that are written for CUDA: whether they can be used in this process, and how they are called.

MLX would compile each of them in each process, one after the other, 1 to 4 s a kernel. `Kernel` keeps compiled code on
disk (`kernel_cache.py`), and what is not there yet it compiles itself (`cuda_compiler.py`), side by side in threads.
What MLX is given then is a stand-in for the text (`cuda_text.py`), which makes launches cheaper. Whatever goes wrong
with that, MLX has the text, and compiles as ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
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


@dataclass(frozen=True, slots=True)
class Options:
    """Of `mx.fast.cuda_kernel`, what the text does not depend on. `shared_memory` is in bytes."""

    ensure_row_contiguous: bool = True
    shared_memory: int = 0

    def made(self, definition: Definition) -> Any:
        """MLX's callable. Raises RuntimeError where MLX has no CUDA."""
        return mx.fast.cuda_kernel(
            name=definition.name,
            input_names=list(definition.inputs),
            output_names=list(definition.outputs),
            source=definition.source,
            header=definition.header,
            ensure_row_contiguous=self.ensure_row_contiguous,
            shared_memory=self.shared_memory,
        )


class Variant:
    """A kernel with its template and the types of its arrays: what is compiled. That begins when it is made."""

    def __init__(
        self,
        definition: Definition,
        options: Options,
        inputs: Sequence[Argument],
        outputs: Sequence[mx.Dtype],
        template: Template = (),
    ) -> None:
        self._definition, self._options, self._template = definition, options, list(template)
        self._stand_in: Definition | None = None
        self._provided: Future[bool] | None = None
        architecture = kernel_cache.architecture()
        if architecture is None or kernel_cache.folder() is None:
            return
        try:
            text = definition.text(inputs, outputs, template)
            self._stand_in = definition.stand_in(text)
            sought = text._replace(module=self._stand_in.text(inputs, outputs).module)
        except (KeyError, OSError) as reason:
            _left_to_mlx(definition.name, reason)
        else:
            self._provided = _threads().submit(_provide, sought, architecture)

    @cached_property
    def launch(self) -> Any:
        """MLX's own callable, once the code is there: a call of it costs no more than MLX's.

        It takes no template, and no arrays of other types.
        """
        if _stand_ins_are_found() and (launch := self.by_name()) is not None:
            return launch
        launch = self._options.made(self._definition)
        return partial(launch, template=self._template) if self._template else launch

    def by_name(self) -> Any:
        """The same for a stand-in, None where no code could be provided."""
        there = self._stand_in is not None and self._provided is not None and self._provided.result()
        return self._options.made(self._stand_in) if there and self._stand_in is not None else None


class Kernel:
    """A kernel of `mx.fast.cuda_kernel`, called as that is."""

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
        # By it the name of the compiled code, which is the text's, tells devices apart.
        marked = f"// {kernel_cache.architecture()}\n{header}"
        self._definition = Definition(name, input_names, output_names, source, marked)
        self._options = Options(ensure_row_contiguous, shared_memory)
        self._variants: dict[tuple[Any, ...], Variant] = {}

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
        """One launch; the first of a variant waits for its code. Raises RuntimeError where MLX has no CUDA."""
        arguments = [Argument(array.dtype, array.ndim == 0) for array in inputs]
        result: list[mx.array] = self._variant(arguments, output_dtypes, template).launch(
            inputs=inputs,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
        )
        return result

    def variant(self, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype], template: Template = ()) -> Variant:
        """That for arrays (no scalars) of such types. It begins to be compiled; returns at once."""
        return self._variant([Argument(dtype) for dtype in inputs], outputs, template)

    def _variant(self, inputs: Sequence[Argument], outputs: Sequence[mx.Dtype], template: Template) -> Variant:
        key = (*inputs, *outputs, *template)
        if (found := self._variants.get(key)) is None:
            _trial()
            found = self._variants[key] = Variant(self._definition, self._options, inputs, outputs, template)
        return found


@cache
def _trial() -> Variant:
    definition = Definition("trial", ["x"], ["y"], "y[0] = x[0];", f"// {kernel_cache.architecture()}\n")
    return Variant(definition, Options(), [Argument(mx.float32)], [mx.float32])


@cache
def _stand_ins_are_found() -> bool:
    """Whether MLX finds code by the name of a stand-in. Tried once: where it does not, none of them could be used."""
    if (launch := _trial().by_name()) is None:
        return False
    one = (1, 1, 1)
    try:
        mx.eval(
            launch(inputs=[mx.zeros((1,))], grid=one, threadgroup=one, output_shapes=[(1,)], output_dtypes=[mx.float32])
        )
    except RuntimeError as reason:
        _left_to_mlx("all of them", reason)
        return False
    return True


def _provide(text: Text, architecture: str) -> bool:
    try:
        return kernel_cache.provide(text, architecture)
    except (CompileError, OSError) as reason:
        _left_to_mlx(text.module, reason)
        return False


def _left_to_mlx(kernel: str, reason: Exception) -> None:
    logger.warning("MLX compiles a kernel", extra={"kernel": kernel, "reason": str(reason)})


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "compile")
