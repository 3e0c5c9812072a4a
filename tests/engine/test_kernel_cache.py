"""Compiled code of our CUDA kernels on disk: the name it is looked for by, and what is written."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
from pathlib import Path
from queue import Queue

import mlx.core as mx
import pytest

from runner.engine import cuda_compiler, draw_kernel, kernel_cache, loader
from runner.engine.cuda_compiler import Binary, CompileError
from runner.engine.cuda_text import Argument, Definition, Text
from runner.engine.process import EngineProcess
from runner.engine.transport import Event
from runner.errors import EngineLoadError
from runner.protocol import EngineSpec, LoadFailed
from tests.engine.conftest import ModelFolder
from tests.engine.cuda_compiler import ARCHITECTURE, needs_compiler

SCALED = Definition(
    "scaled",
    ["x", "by"],
    ["y", "rest"],
    "y[threadIdx.x] = T(x[x_strides[0] * (threadIdx.x % x_shape[0])]) * by[by_ndim] * TIMES;",
    "// sm_90a\n#define ONE 1\n",
)
TEMPLATE = [("T", mx.bfloat16), ("TIMES", -3), ("EXACT", True)]

EXPECTED = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

// sm_90a
#define ONE 1
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_scaled_bfloat16_t_-3_t(
    const __half* x,
    const __grid_constant__ Shape x_shape,
    const __grid_constant__ Strides x_strides,
    const float* by,
    const __grid_constant__ int by_ndim,
    __nv_bfloat16* y,
    uint32_t* rest) {
  using T = __nv_bfloat16;
  constexpr int TIMES = -3;
  constexpr bool EXACT = true;

y[threadIdx.x] = T(x[x_strides[0] * (threadIdx.x % x_shape[0])]) * by[by_ndim] * TIMES;
}

} // namespace mlx::core::cu
"""


def text(factor: int = 2) -> Text:
    """A kernel that can be compiled."""
    source = "y[threadIdx.x] = x[threadIdx.x % x_shape[0]] * FACTOR;"
    return Definition("multiplied", ["x"], ["y"], source).text(
        [Argument(mx.float32)], [mx.float32], [("FACTOR", factor)]
    )


def test_the_text_is_as_mlx_puts_it() -> None:
    inputs, outputs = [Argument(mx.float16), Argument(mx.float32)], [mx.bfloat16, mx.uint32]
    made = SCALED.text(inputs, outputs, TEMPLATE)
    assert made.code == EXPECTED
    assert made.expression == "mlx::core::cu::custom_kernel_scaled_bfloat16_t_-3_t"
    without = SCALED.text([Argument(mx.float16, scalar=True), inputs[1]], outputs)
    assert "x_shape," not in without.code, "a scalar has no shape"
    assert "    uint32_t* rest) {\ny[threadIdx.x]" in without.code, "no template, no empty line"


def test_it_is_looked_for_by_the_hash_of_its_text(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "hash.cpp").write_text(
        "#include <functional>\n#include <iostream>\n#include <iterator>\n#include <string>\n"
        "int main() { std::string all(std::istreambuf_iterator<char>(std::cin), {});\n"
        "std::cout << std::hex << std::hash<std::string>{}(all); }\n"
    )
    subprocess.run([compiler, "-o", tmp_path / "hash", tmp_path / "hash.cpp"], check=True, timeout=60)
    made = text()
    hashed = subprocess.run([tmp_path / "hash"], input=made.code.encode(), capture_output=True, check=True, timeout=60)
    assert made.module == f"custom_kernel_multiplied_2_{hashed.stdout.decode()}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Compiler:
    """In place of NVRTC; counts."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, made: Text, _: str) -> Binary:
        self.compiled += 1
        return Binary(b"code of " + made.module.encode() * 10_000, "mangled")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(cuda_compiler, "compile_kernel", compiler)
    return compiler


def refuses(*_: object) -> Binary:
    raise CompileError("no NVRTC")


def test_what_nvrtc_makes_is_written_with_its_function_s_name(folder: Path) -> None:
    needs_compiler()
    made = text()
    kernel_cache.provide(made, ARCHITECTURE)
    assert sorted(path.name for path in folder.iterdir()) == [f"{made.module}.ptx", f"{made.module}.txt"]
    (name,) = [line for line in (folder / f"{made.module}.txt").read_text().splitlines() if "\t" in line]
    expression, _, mangled = name.partition("\t")
    assert expression == made.expression
    code = (folder / f"{made.module}.ptx").read_bytes()
    assert code.startswith(b"\x7fELF")
    assert mangled.encode() + b"\0" in code


def test_nvrtc_says_what_is_wrong() -> None:
    needs_compiler()
    wrong = Definition("wrong", ["x"], ["y"], "y[0] = nothing;").text([Argument(mx.float32)], [mx.float32])
    with pytest.raises(CompileError, match="nothing"):
        cuda_compiler.compile_kernel(wrong, ARCHITECTURE)


def test_several_compile_at_once() -> None:
    needs_compiler()
    found: dict[int, Binary] = {}
    threads = [
        threading.Thread(
            target=lambda factor=factor: found.setdefault(
                factor, cuda_compiler.compile_kernel(text(factor), ARCHITECTURE)
            )
        )
        for factor in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({binary.function for binary in found.values()}) == 6


def test_what_is_there_is_not_compiled_again(folder: Path, compiler: Compiler) -> None:
    for _ in range(2):
        kernel_cache.provide(text(), ARCHITECTURE)
    assert compiler.compiled == 1
    kernel_cache.provide(text(3), ARCHITECTURE)
    assert compiler.compiled == 2
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("broken", [".ptx", ".txt"])
def test_what_is_broken_is_made_again_or_removed(
    folder: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """MLX would fail to load it, now and ever after."""
    code = folder / f"{text().module}.ptx"
    kernel_cache.provide(text(), ARCHITECTURE)
    whole = code.read_bytes()
    code.with_suffix(broken).write_bytes(b"\xff")
    kernel_cache.provide(text(), ARCHITECTURE)
    assert compiler.compiled == 2
    assert code.read_bytes() == whole
    code.with_suffix(broken).write_bytes(b"\xff")
    monkeypatch.setattr(cuda_compiler, "compile_kernel", refuses)
    with pytest.raises(CompileError):
        kernel_cache.provide(text(), ARCHITECTURE)
    assert not code.exists()


def test_files_appear_whole_and_the_code_last(
    folder: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    appeared: list[str] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        assert not target.exists(), "nothing is there before"
        assert self.stat().st_size > 50, "written by then"
        appeared.append(target.suffix)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    kernel_cache.provide(text(), ARCHITECTURE)
    assert appeared == [".txt", ".ptx"]

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".ptx":
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        kernel_cache.provide(text(3), ARCHITECTURE)
    left = {path.name for path in folder.iterdir()} - {f"{text().module}{end}" for end in (".ptx", ".txt")}
    assert left == {f"{text(3).module}.txt"}, "no code, and nothing half-written"


def test_two_engines_may_write_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)
    failed: list[Exception] = []

    def compiles(made: Text, kind: str) -> Binary:
        both.wait()  # neither has found anything
        return Compiler()(made, kind)

    def provide() -> None:
        try:
            kernel_cache.provide(text(), ARCHITECTURE)
        except Exception as error:  # noqa: BLE001 - reported below
            failed.append(error)

    monkeypatch.setattr(cuda_compiler, "compile_kernel", compiles)
    threads = [threading.Thread(target=provide) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    monkeypatch.setattr(cuda_compiler, "compile_kernel", refuses)
    kernel_cache.provide(text(), ARCHITECTURE)  # it is whole


def test_names_that_mlx_would_cut_up_are_left_to_it(folder: Path, compiler: Compiler) -> None:
    long = Definition("x" * 240, ["x"], ["y"], "").text([Argument(mx.float32)], [mx.float32])
    kernel_cache.provide(long, ARCHITECTURE)
    assert compiler.compiled == 0
    assert not folder.exists()


# ------------------------------------------------------------- the folder


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One there might be; returns the user's cache."""
    monkeypatch.setenv("MLX_RUN_CACHE_DIR", str(tmp_path))
    # Set and removed: what `settle` sets is gone after the test.
    monkeypatch.setenv(kernel_cache.VARIABLE, "")
    monkeypatch.delenv(kernel_cache.VARIABLE)
    monkeypatch.setattr(kernel_cache, "architecture", lambda: "sm_100a")
    monkeypatch.setattr(cuda_compiler, "version", lambda: "13.5")
    monkeypatch.setattr(kernel_cache, "mlx_version", lambda: "0.32.4")
    return tmp_path


def test_each_kind_of_device_and_compiler_has_its_folder(device: Path) -> None:
    kernel_cache.settle()
    assert kernel_cache.folder() == device / "cuda" / "mlx-0.32.4-nvrtc-13.5" / "sm_100a"
    assert (device / "cuda" / "mlx-0.32.4-nvrtc-13.5" / "sm_100a").is_dir()


def test_the_user_s_folder_stays(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel_cache.VARIABLE, "/elsewhere")
    kernel_cache.settle()
    assert kernel_cache.folder() == Path("/elsewhere")
    assert not list(device.iterdir())


def test_nothing_is_kept_where_nothing_can_be(
    device: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (device / "cuda").touch()
    kernel_cache.settle()
    assert kernel_cache.folder() is None
    monkeypatch.setattr(cuda_compiler, "version", refuses)
    kernel_cache.settle()
    assert kernel_cache.folder() is None
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "compiled kernels are not kept"
    ] * 2


def test_nothing_is_settled_without_a_device(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "architecture", lambda: None)
    kernel_cache.settle()
    assert kernel_cache.folder() is None
    assert not list(device.iterdir())


def test_what_mlx_left_unfinished_is_removed(device: Path) -> None:
    """It writes code, names and source in turn, straight into their places, and its code is all that it looks for."""
    where = device / "cuda" / "mlx-0.32.4-nvrtc-13.5" / "sm_100a"
    where.mkdir(parents=True)
    for name in ("torn.ptx", "empty.cu", "whole.cu", "whole.ptx", "custom_kernel_ours.ptx"):
        (where / name).write_bytes(b"some")
    (where / "empty.ptx").touch()
    kernel_cache.settle()
    assert {path.name for path in where.glob("*.ptx")} == {"whole.ptx", "custom_kernel_ours.ptx"}


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"compute_capability_major": 9, "compute_capability_minor": 0}, "sm_90a"),
        ({"compute_capability_major": 12, "compute_capability_minor": 1}, "sm_121a"),
        ({"compute_capability_major": 8, "compute_capability_minor": 9}, "sm_89"),
        ({"architecture": "x86_64"}, None),
    ],
)
def test_architectures(monkeypatch: pytest.MonkeyPatch, info: dict[str, object], expected: str | None) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert kernel_cache.architecture.__wrapped__() == expected


@pytest.mark.parametrize(
    ("dtype", "kind", "short"),
    [
        (mx.bool_, "bool", "bool"),
        (mx.uint8, "uint8_t", "uint8_t"),
        (mx.int64, "int64_t", "int64_t"),
        (mx.float16, "__half", "float16_t"),
        (mx.float32, "float", "float"),
    ],
)
def test_types_have_two_names(dtype: mx.Dtype, kind: str, short: str) -> None:
    made = Definition("k", ["x"], ["y"], "").text([Argument(dtype)], [dtype], [("T", dtype)])
    assert f"custom_kernel_k_{short}(\n    const {kind}* x,\n    {kind}* y) {{\n  using T = {kind};\n" in made.code


def test_a_type_that_is_not_known() -> None:
    unknown = [Argument(mx.complex64)]
    with pytest.raises(KeyError):
        Definition("k", ["x"], ["y"], "").text(unknown, [mx.float32])


class Told:
    """A transport to nobody."""

    def __init__(self) -> None:
        self.inbox: Queue[Event] = Queue()
        self.told: list[object] = []

    def start(self, *_: object) -> None: ...

    def close(self, _: float) -> None: ...

    def send(self, _: object) -> None: ...

    def announce(self, latest: object, *_: object) -> None:
        self.told.append(latest)


def test_an_engine_settles_it_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle() -> None:
        raise EngineLoadError("settled first")

    monkeypatch.setattr(kernel_cache, "settle", settle)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loader, "load_weights", None)
    transport = Told()
    spec = EngineSpec(model="m", digest="d", path="/nowhere", orphan_grace=0.01)
    assert EngineProcess(spec, transport, 0.0).run() == 1  # type: ignore[arg-type]
    assert isinstance(transport.told[-1], LoadFailed)
    assert transport.told[-1].reason == "settled first"


def test_loading_begins_with_the_draw(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[mx.Dtype | str] = []
    monkeypatch.setattr(draw_kernel, "prepare", begun.append)
    monkeypatch.setattr(loader, "install_products", lambda _: begun.append("products"))
    model = loader.load(model_folder("llama"))
    assert begun == [model.dtype, "products"]
