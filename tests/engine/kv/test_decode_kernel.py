"""Few tokens' attention by tensor cores computes what separate operations compute, on the host."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.kv import attention_kernel, decode_kernel
from runner.engine.kv.attention_kernel import Call
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.decode_on_host import DecodeOnHost
from tests.engine.kv.launches import only_with_arrays_on_the_host, separately
from tests.engine.kv.test_attention_kernel import Geometry, check, rotations

NO_NUMBER = float("nan")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    only_with_arrays_on_the_host()
    return tmp_path


nightly = pytest.mark.nightly


@pytest.mark.parametrize(
    ("geometry", "dtype", "splits", "crowd", "apart"),
    [
        ((4, 1, 64), mx.bfloat16, 1, 1 << 20, 0),
        ((4, 1, 64), mx.float16, 4, 1 << 20, 8),
        pytest.param((8, 1, 64), mx.bfloat16, 8, 1, 0, marks=nightly),
        pytest.param((3, 3, 64), mx.bfloat16, 2, 1 << 20, 0, marks=nightly),
        pytest.param((20, 1, 64), mx.float16, 2, 1 << 20, 0, marks=nightly),
        pytest.param((10, 2, 128), mx.bfloat16, 2, 1 << 20, 8, marks=nightly),
        pytest.param((8, 1, 256), mx.float16, 1, 1 << 20, 0, marks=nightly),
    ],
    ids=str,
)
def test_on_the_host(
    scratch: Path, geometry: Geometry, dtype: mx.Dtype, splits: int, crowd: int, apart: int
) -> None:
    launch = DecodeOnHost(scratch, splits, crowd=crowd, apart=apart)
    check(launch, geometry, dtype, rows=3, longest=150)
