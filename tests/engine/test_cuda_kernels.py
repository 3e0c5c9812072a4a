"""Our CUDA kernels as they are called: compiled before, side by side, or by MLX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine import (
    cuda_compiler,
    cuda_kernels,
    draw_kernel,
    kernel_cache,
    product_kernel,
    wide_changed_kernel,
    wide_product_kernel,
)
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.cuda_compiler import Binary, CompileError
from runner.engine.cuda_kernels import Kernel
from runner.engine.cuda_text import Argument, Definition, Text
from runner.engine.kv import attention_kernel, begin_kernel, copy_kernel, decode_kernel, prompt_kernel, quantised_kernel
from runner.engine.kv.calls import Call
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall
from runner.engine.kv.rotary import Rotation
from runner.engine.product_kernel import TILES
from runner.engine.wide_product_kernel import Way as WideWay
from tests.engine.test_product_changes import changes

Compile = Callable[[Text, str], Binary]

TRIAL, STAND_INS_ARE_FOUND = cuda_kernels._trial.__wrapped__, cuda_kernels._stand_ins_are_found.__wrapped__


class Launches:
    """In place of `mx.fast.cuda_kernel`: what was called, with the text that MLX would make of it."""

    def __init__(self, folder: Path) -> None:
        self.modules: list[str] = []
        self.codes: list[str] = []
        self._folder = folder

    def __call__(self, **made: Any) -> Callable[..., list[mx.array]]:
        definition = Definition(made["name"], made["input_names"], made["output_names"], made["source"], made["header"])

        def launch(**call: Any) -> list[mx.array]:
            arguments = [Argument(array.dtype, array.ndim == 0) for array in call["inputs"]]
            text = definition.text(arguments, call["output_dtypes"], call.get("template", ()))
            if "#error" in text.code and not (self._folder / f"{text.module}.ptx").is_file():
                raise RuntimeError("Failed to compile kernel")
            self.modules.append(text.module)
            self.codes.append(text.code)
            shapes = zip(call["output_shapes"], call["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launches:
    """Of a device there might be, with a folder for compiled code."""
    launches = Launches(tmp_path)
    monkeypatch.setattr(mx.fast, "cuda_kernel", launches)
    monkeypatch.setattr(cuda_kernels, "_trial", lambda: None)
    monkeypatch.setattr(cuda_kernels, "_stand_ins_are_found", lambda: True)
    monkeypatch.setattr(kernel_cache, "architecture", lambda: "sm_90a")
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path))
    return launches


@pytest.fixture
def compiled(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is compiled."""
    names: list[str] = []

    def compiles(text: Text, _: str) -> Binary:
        names.append(text.module)
        return Binary(b"code", "mangled")

    monkeypatch.setattr(cuda_compiler, "compile_kernel", compiles)
    return names


def filled(added: int = 0, dtype: mx.Dtype = mx.float32) -> Kernel:
    return Kernel(
        name="filled",
        inputs={"x": dtype},
        outputs={"y": mx.float32},
        source="y[0] = x[0] + x_shape[0] + ADDED;",
        template=[("ADDED", added)],
    )


def call(made: Kernel) -> None:
    made.launch(
        inputs=[mx.zeros((4,))],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
    )


def test_a_kernel_is_compiled_once_before_its_first_call(launches: Launches, compiled: list[str]) -> None:
    made = filled(1)
    call(made)
    assert compiled == launches.modules
    call(made)
    assert len(compiled) == 1
    call(filled(2))
    assert compiled == [launches.modules[0], launches.modules[2]]
    call(filled(1))
    assert len(compiled) == 2, "it is on disk"


def test_mlx_gets_a_short_text_of_the_same_function(
    launches: Launches, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(filled(1))
    monkeypatch.setattr(cuda_kernels, "_stand_ins_are_found", lambda: False)
    call(filled(1))
    short, whole = launches.codes
    assert "ADDED" in whole
    assert "ADDED" not in short
    assert _function(short) == _function(whole)
    assert "x_shape" in _function(short), "MLX gives parameters that the text names"
    names = (tmp_path / f"{launches.modules[0]}.txt").read_text()
    assert "\nmlx::core::cu::custom_kernel_filled_1\tmangled\n" in names


def _function(code: str) -> str:
    return code.split("__global__", 1)[1].split("{", 1)[0]


def test_code_that_is_gone_is_an_error(launches: Launches, compiled: list[str], tmp_path: Path) -> None:
    made = filled()
    call(made)
    (tmp_path / f"{compiled[0]}.ptx").unlink()
    with pytest.raises(RuntimeError, match="Failed to compile"):
        call(made)


@pytest.mark.usefixtures("compiled")
def test_where_stand_ins_are_not_found_mlx_has_the_text(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_kernels, "_trial", cache(TRIAL))
    monkeypatch.setattr(cuda_kernels, "_stand_ins_are_found", cache(STAND_INS_ARE_FOUND))
    call(filled())
    assert ["#error" in code for code in launches.codes] == [True, True], "the trial, and the call"
    assert not caplog.records
    cuda_kernels._stand_ins_are_found.cache_clear()
    monkeypatch.setattr(launches, "_folder", Path("/elsewhere"))
    for _ in range(2):
        call(filled())
    assert all("ADDED" in code for code in launches.codes[2:])
    assert [record.message for record in caplog.records] == ["MLX compiles a kernel"]


def test_devices_are_told_apart_by_the_text(
    launches: Launches, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(filled())
    monkeypatch.setattr(kernel_cache, "architecture", lambda: "sm_100a")
    call(filled())
    assert len(set(compiled)) == 2
    assert compiled == launches.modules


def test_kernels_are_compiled_side_by_side(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=20)

    def compiles(*_: object) -> Binary:
        together.wait()
        return Binary(b"code", "mangled")

    monkeypatch.setattr(cuda_compiler, "compile_kernel", compiles)
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core compiles one at a time")
    first, _ = filled(1), filled(2)
    call(first)
    assert not together.broken


def test_a_call_waits_for_what_is_under_way(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()

    def compiles(*_: object) -> Binary:
        assert finish.wait(20)
        return Binary(b"code", "mangled")

    monkeypatch.setattr(cuda_compiler, "compile_kernel", compiles)
    made, other = filled(1), filled(2)
    calls = [threading.Thread(target=lambda: call(made)), threading.Thread(target=lambda: other.launch)]
    for thread in calls:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    assert not launches.modules
    finish.set()
    for thread in calls:
        thread.join(20)
    assert len(launches.modules) == 1


def no_compiler(*_: object) -> Binary:
    raise CompileError("no NVRTC")


def full_disk(*_: object) -> Binary:
    raise OSError("disk full")


@pytest.mark.parametrize("fails", [no_compiler, full_disk])
def test_mlx_compiles_what_we_cannot(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: Compile
) -> None:
    monkeypatch.setattr(cuda_compiler, "compile_kernel", fails)
    made = filled()
    for _ in range(2):
        call(made)
    assert len(launches.modules) == 2
    assert all("y[0] = x[0] + x_shape[0] + ADDED;" in code for code in launches.codes), "it has the whole text"
    assert [record.message for record in caplog.records] == ["MLX compiles a kernel"]


def test_types_that_are_not_known_are_left_to_mlx(compiled: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert filled(dtype=mx.complex64).launch is not None
    assert not compiled
    assert [record.message for record in caplog.records] == ["MLX compiles a kernel"]


def test_nothing_is_compiled_without_a_folder(
    launches: Launches, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX has a temporary one, of which we are not told."""
    monkeypatch.delenv(kernel_cache.VARIABLE)
    call(filled())
    assert len(launches.modules) == 1
    assert not compiled


# ------------------------------------------------------------- what is prepared is what is called


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is left of another test, and none of this one's is."""
    made = {"_kernel": [product_kernel, wide_product_kernel, wide_changed_kernel, kernel, draw_kernel]}
    made["_kernel"] += [attention_kernel, quantised_kernel]
    made |= {"kernel": [decode_kernel], "_begin": [begin_kernel]}
    made |= {"_gate_kernel": [product_kernel], "_write": [prompt_kernel], "_attend": [prompt_kernel]}
    made |= {"_copy": [copy_kernel], "_put": [copy_kernel]}
    for name, modules in made.items():
        for module in modules:
            monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))
    monkeypatch.setattr(cuda_kernels, "usable", lambda _: True)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("epilogue", ["plain", "swiglu"])
def test_products_are_compiled_as_they_are_called(launches: Launches, compiled: list[str], epilogue: str) -> None:
    outputs, inputs, dtype = 64, 128, mx.bfloat16
    weight = mx.zeros((outputs * (2 if epilogue == "swiglu" else 1), inputs), dtype)
    multiply = product_kernel.multiply(outputs, inputs, dtype, epilogue)
    for tiles in TILES:
        multiply(mx.zeros((1, 8 * tiles, inputs), dtype), weight)
    if epilogue == "plain":
        multiply(mx.zeros((1, 9, inputs), dtype), weight, mx.zeros((1, 9, outputs), dtype))
    stack = changes(outputs, inputs, dtype, epilogue)
    changed = product_kernel.changed(outputs, inputs, dtype, epilogue)
    for tiles in TILES:
        changed(mx.zeros((8 * tiles, 1, inputs), dtype), weight, None, stack, RowSlots.of([1] * 8 * tiles))
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == 2 * len(TILES)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("epilogue", "splits"), [("plain", 1), ("plain", 2), ("swiglu", 2)])
def test_wide_products_are_compiled_as_they_are_called(
    launches: Launches, compiled: list[str], epilogue: str, splits: int
) -> None:
    outputs, inputs, dtype = 64, 128, mx.bfloat16
    weight = mx.zeros((outputs * (2 if epilogue == "swiglu" else 1), inputs), dtype)
    multiply = wide_product_kernel.multiply(outputs, inputs, dtype, epilogue, lambda *_: WideWay(1, 6, splits))
    for rows in (33, *wide_product_kernel.TOKENS):
        x = mx.zeros((rows, 1, inputs), dtype)
        assert multiply(x, weight).shape == (rows, 1, outputs)
        if epilogue == "plain":
            multiply(x, weight, mx.zeros((rows, 1, outputs), dtype))
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == len(wide_product_kernel.TOKENS)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("epilogue", "splits"), [("plain", 1), ("plain", 2), ("swiglu", 1)])
def test_wide_products_with_changes_are_compiled_as_they_are_called(
    launches: Launches, compiled: list[str], epilogue: str, splits: int
) -> None:
    outputs, inputs, dtype = 512, 128, mx.bfloat16
    weight = mx.zeros((outputs * (2 if epilogue == "swiglu" else 1), inputs), dtype)
    stack = changes(outputs, inputs, dtype, epilogue)
    changed = wide_changed_kernel.changed(outputs, inputs, dtype, epilogue, lambda *_: WideWay(2, 6, splits, 2))
    for rows in (33, *wide_product_kernel.TOKENS):
        x, slots = mx.zeros((rows, 1, inputs), dtype), RowSlots.of([1] * rows)
        assert changed(x, weight, None, stack, slots).shape == (rows, 1, outputs)
        if epilogue == "plain":
            changed(x, weight, mx.zeros((rows, 1, outputs), dtype), stack, slots)
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == len(wide_product_kernel.TOKENS)


@pytest.mark.usefixtures("fresh")
def test_what_follows_a_product_is_compiled_as_it_is_called(launches: Launches, compiled: list[str]) -> None:
    dtype, outputs, inputs = mx.float16, 64, 128
    stack, rows = changes(outputs, inputs, dtype, "swiglu"), RowSlots.of([1] * 40)
    kernel.prepare(stack)
    x, y = mx.zeros((40, 1, inputs), dtype), mx.zeros((40, 1, 2 * outputs), dtype)
    for added in (None, y):
        assert kernel.add_changes(x, y, stack, rows.board(), added).shape == y.shape
    assert kernel.add_changes(x, y, stack, rows.board(), None, "swiglu").shape == (40, 1, outputs)
    assert product_kernel.gate(y).shape == (40, 1, outputs)
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == 3


@pytest.mark.usefixtures("fresh")
def test_the_draw_is_compiled_as_it_is_called(launches: Launches, compiled: list[str]) -> None:
    draw_kernel.prepare(mx.float16)
    draw_kernel.prepare(mx.int32)
    draw_kernel.draw_tokens(
        mx.zeros((2, 1, 64), mx.float16),
        mx.zeros((2, 4)),
        mx.zeros((2, 1, 2), mx.uint32),
        mx.zeros((2, 1), mx.uint32),
    )
    assert compiled == launches.modules
    assert len(compiled) == 1


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_attention_is_compiled_as_it_is_called(launches: Launches, compiled: list[str], dtype: mx.Dtype) -> None:
    queries, keys = mx.zeros((2, 4, 1, 64), dtype), mx.zeros((2, 2, 1, 64), dtype)
    plane, starts = mx.zeros((2, 2, 256, 64), dtype), mx.zeros((2,), mx.int32)
    rotation = Rotation(64, False, mx.zeros((32,)), lambda lines, _: lines)
    for how in (None, rotation):
        after = None
        for _ in range(2):
            call = Call(queries, keys, keys, (plane, plane), starts, 0.1, None, None, after, how)
            after, _ = attention_kernel.attend_and_write(call)
    planes = [*Quantisation(8, 64).pack(plane)] * 2
    quantised_kernel.attend_and_write(PackedCall(queries, keys, keys, planes, starts, 0.1, None, 8, 64, None, rotation))
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == 3


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_a_prompt_s_attention_is_compiled_as_it_is_called(
    launches: Launches, compiled: list[str], dtype: mx.Dtype
) -> None:
    queries, keys = mx.zeros((2, 4, 20, 64), dtype), mx.zeros((2, 2, 20, 64), dtype)
    plane, starts = mx.zeros((2, 2, 256, 64), dtype), mx.zeros((2,), mx.int32)
    rotation, after = Rotation(64, False, mx.zeros((32,)), lambda lines, _: lines), None
    for how in (None, rotation, rotation):
        call = Call(queries, keys, keys, (plane, plane), starts, 0.1, None, None, after, how)
        after, _ = prompt_kernel.write_and_attend(call)
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == 3


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.uint32], ids=str)
def test_copies_are_compiled_as_they_are_called(launches: Launches, compiled: list[str], dtype: mx.Dtype) -> None:
    """Once for so many planes, whichever rows and span are copied, and however much room there is."""
    for rows, stop, capacity in (([0], 4, 256), ([1, 0], 200, 512)):
        planes = [mx.zeros((2, 2, capacity, 64), dtype)] * 12
        stack = copy_kernel.copy(planes, rows, 3, stop)
        assert (stack.shape, stack.dtype) == ((12, 2 * len(rows), stop - 3, 64), dtype)
        assert copy_kernel._put.cache_info().currsize == 1, "before it is called"
        copy_kernel.put(planes, stack, rows, 3, stop - 3, capacity)
    assert sorted(set(launches.modules)) == sorted(compiled)
    assert len(compiled) == 2


# ------------------------------------------------------------- on a device

PROCESS = """
import json, logging, sys, time
import mlx.core as mx
from runner.engine import cuda_compiler, kernel_cache
from runner.engine.cuda_compiler import CompileError
from runner.engine.cuda_kernels import Kernel
from runner.engine.cuda_text import Argument

def refuses(*_):
    raise CompileError("not here")

if "without compiler" in sys.argv:
    cuda_compiler.compile_kernel = refuses
if "by mlx" in sys.argv:
    kernel_cache.provide = refuses
x = mx.arange(8, dtype=mx.float32).reshape(2, 4)
mx.eval(x.T + 1)
kernel = Kernel(
    name="scaled",
    inputs={"x": mx.float32},
    outputs={"y": mx.bfloat16},
    source="y[threadIdx.x] = T(x[threadIdx.x] * FACTOR + x_shape[1] + x_strides[0] + x_ndim);",
    header="// for a test\\n",
    template=[("T", mx.bfloat16), ("FACTOR", 3), ("EXACT", False)],
)
call = dict(
    inputs=[x], grid=(8, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(8,)], output_dtypes=[mx.bfloat16],
)
text = kernel._definition.text([Argument(mx.float32)], call["output_dtypes"], kernel._template)
stand_in = kernel._definition.stand_in(text)
if "verbose" in sys.argv:
    kernel._made(kernel._definition)(**call, template=kernel._template, verbose=True)
    print(json.dumps(text.code))
    sys.exit()
module = stand_in.text([Argument(mx.float32)], call["output_dtypes"]).module
launch = kernel._made(stand_in) if "by mlx" in sys.argv else kernel.launch
began = time.perf_counter()
y = launch(**call)[0].tolist()
print(json.dumps({"y": y, "seconds": time.perf_counter() - began, "module": module}))
"""


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(300)
def test_mlx_takes_our_code_on_the_device(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, kernel_cache.VARIABLE: str(tmp_path), "PYTHONPATH": path}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROCESS, *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)

    def right(*words: str) -> dict[str, Any]:
        process = run(*words)
        assert process.returncode == 0, process.stderr
        found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        assert found["y"] == [i * 3 + 4 + 4 + 2 for i in range(8)]
        return found

    process = run("verbose")
    assert process.returncode == 0, process.stderr
    printed = process.stdout
    code = printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]
    assert code == json.loads(printed.splitlines()[-1]), "the text is MLX's"

    code_of = tmp_path / f"{right()['module']}.ptx"
    assert code_of.read_bytes().startswith(b"\x7fELF")
    assert code_of.with_suffix(".txt").is_file()
    assert right("without compiler")["seconds"] < 0.5, "MLX takes a second to compile it"

    right("by mlx")
    code_of.write_bytes(b"garbage")
    process = run("by mlx")
    assert process.returncode != 0
    assert "Failed to load compiled" in process.stderr, "it is our file that MLX reads"
    code_of.unlink()
    process = run("by mlx")
    assert process.returncode != 0
    assert "its compiled code is gone" in process.stderr
    right()
    assert code_of.read_bytes().startswith(b"\x7fELF"), "and we make it again"
    code_of.write_bytes(b"garbage")
    right("without compiler")
    assert not code_of.exists(), "or leave it to MLX"
