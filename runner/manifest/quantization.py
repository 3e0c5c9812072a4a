"""What a manifest may say of a quantisation: for the whole model, and for layers that differ."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from runner.manifest.section import Section as _Section
from runner.manifest.section import Text as _Text
from runner.manifest.values import problem

_Bits = Literal[2, 3, 4, 5, 6, 8]
_GroupSize = Literal[16, 32, 64, 128]
_Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]


class LayerQuantization(_Section):
    """How to quantise some layers: what it leaves out is as for all."""

    bits: _Bits | None = Field(None, description="Bits per weight.", examples=[8])
    group_size: _GroupSize | None = Field(None, description="Weights that share one scale.", examples=[64])
    mode: _Mode | None = Field(None, description="Quantisation mode.", examples=["affine"])


def _layer_rule(value: Any) -> Any:
    if value is None:
        raise problem("E205", "has no value", "write false, or {bits: 8}")
    if value is True:
        raise problem("E203", "should be false, or a mapping with bits, group_size or mode")
    return None if value is False else value


_LayerRule = Annotated[
    LayerQuantization | None,
    BeforeValidator(_layer_rule, json_schema_input_type=Literal[False] | LayerQuantization),
]


class Quantization(_Section):
    """How to quantise a source that is not quantised; made once and cached."""

    bits: _Bits | None = Field(None, description="Bits per weight. Default: 4, of mxfp8 8.", examples=[4])
    group_size: _GroupSize | None = Field(
        None,
        description="Weights that share one scale. Default: 64, of mxfp4 and mxfp8 32, of nvfp4 16.",
        examples=[64],
    )
    mode: _Mode = Field("affine", description="Quantisation mode.", examples=["affine"])
    layers: dict[_Text, _LayerRule] = Field(
        default={},
        description="Layers that are quantised otherwise, by their path in the model (* stands for anything, and a "
        "leading *. also for nothing): bits, group_size and mode, or false to leave them as they are. Of several "
        "that match a layer the first decides.",
        examples=[{"*.lm_head": {"bits": 8}, "*.down_proj": {"bits": 6}, "model.embed_tokens": False}],
    )
