"""Products with packed keys and values, tile by tile: what mx.quantized_matmul computes."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine.kv import widened
from runner.engine.kv.quantised import Quantisation, attend
from runner.engine.kv.widened import Packed

needs_cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="tiles are for the CPU")
FORMATS = [(8, 64), (8, 32), (4, 64), (4, 32), (2, 64)]


def packed(bits: int, group_size: int, tokens: int, *, seed: int = 0) -> Packed:
    """The first two of three slots, as a batch sees its planes."""
    values = mx.random.normal((3, 2, tokens, 128), key=mx.random.key(seed))
    a, b, c = (array[:2] for array in Quantisation(bits, group_size).pack(values))
    return a, b, c


def close(found: mx.array, expected: mx.array) -> bool:
    return bool(mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item())


@needs_cpu
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("tile", [1 << 20, 1 << 16], ids=["one tile", "tiles, the last one short"])
def test_products(bits: int, group_size: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_TILE", tile)
    values = packed(bits, group_size, 1100)
    x = mx.random.normal((2, 2, 6, 128))
    p = mx.softmax(mx.random.normal((2, 2, 6, 1100)), axis=-1)
    settings = {"group_size": group_size, "bits": bits}
    assert close(widened.scores(x, values, group_size, bits), mx.quantized_matmul(x, *values, **settings))
    expected = mx.quantized_matmul(p, *values, transpose=False, **settings)
    assert close(widened.weighted(p, values, group_size, bits), expected)


@needs_cpu
@pytest.mark.parametrize(
    ("tokens", "dtype", "pays"), [(2048, mx.float32, True), (2048, mx.float16, False), (512, mx.float32, False)]
)
def test_attention_takes_them_where_they_pay(
    tokens: int, dtype: mx.Dtype, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tokens of float32; few, or 16-bit ones, are left to MLX. Both ways answer the same."""
    queries = mx.random.normal((2, 8, 3, 128), key=mx.random.key(9)).astype(dtype)
    keys, values = (
        (a, b.astype(dtype), c.astype(dtype))
        for a, b, c in (packed(8, 64, tokens, seed=1), packed(8, 64, tokens, seed=2))
    )
    mask = mx.arange(tokens) < mx.array([tokens - 100, 300])[:, None, None, None]
    taken = []
    for name in ("scores", "weighted"):
        was = getattr(widened, name)
        monkeypatch.setattr(widened, name, lambda *arguments, was=was: taken.append(was) or was(*arguments))
    found = attend(queries, keys, values, Quantisation(8, 64), 128**-0.5, mask, None)
    assert len(taken) == (2 if pays else 0)
    monkeypatch.setattr(widened, "_LEAST", tokens + 1)
    assert close(found, attend(queries, keys, values, Quantisation(8, 64), 128**-0.5, mask, None))
    assert len(taken) == (2 if pays else 0)
