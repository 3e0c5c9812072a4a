"""What is predicted of models of a real size beside what the engine then holds: Llama-3.2-1B and Llama-3.1-8B.

Weights are files of the right shapes whose data are a hole (zeros), loaded as the engine does; a batch is the
engine's own caches, joined row by row. In place of the model's products a stand-in hands zeros to each layer's cache:
arrays have the size that they have, whatever is in them, and 32,768 tokens of an 8B model take no CPU an hour.
`compute` has the model itself fill them.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import psutil

from runner.engine.joined import join_siblings
from runner.engine.kv.attention import install
from runner.engine.kv.caches import Caches
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import load_weights
from runner.inspect.config import Packing
from runner.inspect.estimate import Limits, model_memory
from runner.inspect.files import DigestCache
from runner.inspect.model import ModelFacts, read_model
from runner.inspect.quantize import Wanted, quantized
from tests.engine.drive import active_memory
from tests.inspect.folders import llama_tensors, write_tensors

_LLAMA3: Final[dict[str, Any]] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "eos_token_id": 1,
}
GEOMETRIES: Final[dict[str, dict[str, Any]]] = {
    "1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {
        **_LLAMA3,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
NAMES: Final = {"1b": "Llama-3.2-1B", "8b": "Llama-3.1-8B", "tiny": "tiny"}
PACKING: Final = Packing(4, 64)
CHUNK: Final = 512
UNMEASURABLE: Final = 0.8
"""Of what the device has, above which nothing is loaded."""


class Row(NamedTuple):
    """Bytes, predicted and real; `why` there is no figure where real is 0."""

    what: str
    predicted: int
    real: int
    why: str = ""

    @property
    def markdown(self) -> str:
        """Cells of a table."""
        real = f"{self.real:,}" if self.real else "-"
        error = f"{self.predicted / self.real - 1:+.2%}" if self.real else self.why
        return f"{self.what} | {self.predicted:,} | {real} | {error}"


def on_cpu() -> bool:
    """Whether everything is computed in float32."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def section(names: list[str], rows: int, context: int, *, compute: bool) -> str:
    """A part of estimates.md."""
    began = time.monotonic()
    lines = [
        f"| {name_of(name)} | {found.markdown} |"
        for name in names
        for bits in (16, 4)
        for found in measure(GEOMETRIES[name], bits, rows, context, compute=compute)
    ]
    seconds = time.monotonic() - began
    called = "by the model" if compute else "with zeros"
    command = f"python tests/bench/estimates.py --geometry {','.join(names)} --rows {rows} --context {context}"
    dtype = "float32, as the engine computes on a CPU" if on_cpu() else "bfloat16"
    head = [
        "",
        f"## Geometries of {' and '.join(map(name_of, names))}, on {device()}",
        "",
        f"`{command}`, {versions()}; {seconds:.0f} s.",
        f"What is not quantised is {dtype}; caches filled {called}. Bytes.",
        "",
        "| geometry | what | predicted | real | error |",
        "|---|---|---:|---:|---:|",
    ]
    return "\n".join([*head, *lines]) + "\n"


def name_of(geometry: str) -> str:
    """As people call it."""
    return NAMES[geometry]


def measure(config: dict[str, Any], bits: int, rows: int, context: int, *, compute: bool = False) -> Iterator[Row]:
    """One model: weights at `bits`, and `rows` × `context` tokens in 16 and in 8 bits beside them."""
    kind = "bf16" if bits == 16 else f"{bits} bits"
    with tempfile.TemporaryDirectory() as folder:
        plain = write_model(Path(folder) / "plain", config)
        facts = read_model(plain, str(plain), DigestCache())
        if bits != 16:
            facts = quantized(facts, Wanted(PACKING))
        expected = {kv: _memory(facts, rows, context, kv) for kv in (0, 8)}
        held, most = expected[0].held, expected[0].held + expected[0].kv_max
        if most > room():
            yield Row(f"weights, {kind}", held, 0, f"{most:,} bytes have no room here")
            return
        idle = active_memory()
        model = load(plain if bits == 16 else write_model(Path(folder) / "packed", config, PACKING))
        mx.clear_cache()
        real = active_memory() - idle
        yield Row(f"weights, {kind}", held, real)
        for kv, memory in expected.items():
            caches = fill(model, config, rows, context, kv, compute=compute)
            mx.clear_cache()
            both = active_memory() - idle
            what = f"{rows} rows of {context:,}, KV {kv or (32 if on_cpu() else 16)} bits"
            yield Row(f"{what}, {kind}", memory.kv_max, both - real)
            yield Row(f"weights and {what}, {kind}", held + memory.kv_max, both)
            del caches
        del model
    active_memory()
    mx.clear_cache()


def _memory(facts: ModelFacts, rows: int, context: int, kv_bits: int) -> Any:
    limits = Limits(rows, context, prefill_step=CHUNK, prefix_cache=0, kv_bits=kv_bits)
    return model_memory(facts, [], None, limits, float32=on_cpu())


def write_model(folder: Path, config: dict[str, Any], packing: Packing | None = None) -> Path:
    """A folder of this geometry; with a `packing`, as quantised by mlx-lm."""
    folder.mkdir()
    tensors = llama_tensors(config)
    if packing is not None:
        stored = {"bits": packing.bits, "group_size": packing.group_size}
        config = {**config, "quantization": stored, "quantization_config": stored}
        tensors = _packed(tensors, packing)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def _packed(
    tensors: dict[str, tuple[str, tuple[int, ...]]], packing: Packing
) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for name, (dtype, shape) in tensors.items():
        if len(shape) == 1:
            found[name] = (dtype, shape)
            continue
        outer, inner = shape
        path = name.removesuffix(".weight")
        found[name] = ("U32", (outer, inner * packing.bits // 32))
        found[f"{path}.scales"] = found[f"{path}.biases"] = (dtype, (outer, inner // packing.group_size))
    return found


def load(folder: Path) -> Any:
    """A model as `runner.engine.loader.load` has it, without the trial whether it can be batched: that computes."""
    model, _ = load_weights(folder, json.loads((folder / "config.json").read_text()), [])
    if on_cpu():
        model.set_dtype(mx.float32)
    join_siblings(model, lambda: Layout(model).new().call(model, mx.array([[0]])))
    mx.eval(model.parameters())
    install(model)
    return model


def fill(loaded: Any, config: dict[str, Any], rows: int, context: int, kv_bits: int, *, compute: bool) -> Caches:
    """Caches of a batch, as the engine has them once the rows have joined one by one."""
    layout = Layout(loaded, quantisation=Quantisation(kv_bits, 64) if kv_bits else None)
    model = loaded if compute else _Zeros(config, mx.float32 if on_cpu() else mx.bfloat16)
    batch: Caches | None = None
    for _ in range(rows):
        alone = layout.new()
        alone.reserve(context)
        for at in range(0, context, CHUNK):
            alone.call(model, mx.zeros((1, min(CHUNK, context - at)), dtype=mx.uint32))
            mx.eval(alone.arrays)
        if batch is None:
            batch = alone
        else:
            batch.join(alone)
            mx.eval(batch.arrays)
    assert batch is not None
    return batch


class _Zeros:
    """What a model does to its caches, without the products."""

    def __init__(self, config: dict[str, Any], dtype: mx.Dtype) -> None:
        self._shape = (config["num_key_value_heads"], config["head_dim"])
        self._dtype = dtype

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        heads, width = self._shape
        for layer in cache:
            new = mx.zeros((*tokens.shape[:1], heads, tokens.shape[1], width), dtype=self._dtype)
            layer.update_and_fetch(new, new)
        return tokens


def room() -> int:
    """Bytes that may be taken here."""
    if on_cpu():
        return int(psutil.virtual_memory().available * UNMEASURABLE)
    return int(int(mx.device_info()["memory_size"]) * UNMEASURABLE)


def device() -> str:
    """What it ran on."""
    if on_cpu():
        return f"the CPU of {platform.system()} {platform.machine()}"
    return str(mx.device_info().get("device_name", "a GPU"))


def versions() -> str:
    """Of what decides."""
    found = [f"Python {platform.python_version()}"]
    for name in ("mlx", "mlx-cuda-13", "mlx-cuda-12", "mlx-lm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
