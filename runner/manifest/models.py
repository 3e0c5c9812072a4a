"""What a manifest may say, as frozen pydantic models. The JSON schema that editors use is generated from them.

Validation is strict (the text "8080" is no port) and its errors are rewritten by `runner.manifest.report`, so the
models hold shapes and ranges only; what needs two places of the document at once is in `runner.manifest.checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.config import JsonDict

from runner.manifest.generation import Generation
from runner.manifest.names import PATTERNS_KEY
from runner.manifest.quantization import Quantization
from runner.manifest.section import Section as _Section
from runner.manifest.section import Text as _Text
from runner.manifest.servers import Server
from runner.manifest.values import (
    Alias,
    Duration,
    MemoryAmount,
    MemorySize,
    Name,
    Size,
    one_as_list,
    problem,
)

LoadPolicy = Literal["eager", "on_demand"]
ToolParser = Literal[
    "deepseek",
    "function_gemma",
    "gemma4",
    "glm47",
    "harmony",
    "json_tools",
    "kimi_k2",
    "kimi_k3",
    "laguna",
    "llama3",
    "longcat",
    "minicpm5",
    "minimax_m2",
    "mistral",
    "muse_spark",
    "pythonic",
    "qwen3_coder",
]
"""Those that the engine has (`runner.engine.answer.conventions.TOOL_PARSERS`); a test compares the two."""
Dtype = Literal["float16", "bfloat16", "float32"]


class Memory(_Section):
    """How much memory all engines together may use."""

    limit: MemorySize | None = Field(
        None,
        description="The most that all engines together may use: a size, or a share of the machine's memory. "
        "Default: all of the machine's memory.",
        examples=["75%", "24GiB"],
    )
    reserve: MemorySize = Field(
        MemoryAmount(),
        description="The part of the limit that is kept free, for KV caches and whatever else runs here. Models are "
        "planned into limit - reserve.",
        examples=["2GiB", "10%"],
    )


class KVCache(_Section):
    """How much of each conversation is kept, and at which precision."""

    bits: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None, description="Bits per value of a quantised KV cache. Default: not quantised.", examples=[8]
    )
    group_size: Literal[32, 64, 128] | None = Field(
        None,
        description="Values that share one scale in a quantised KV cache; divides the width of the model's heads. "
        "Default: 64.",
        examples=[64],
    )
    quantized_start: int | None = Field(
        None,
        ge=0,
        le=100_000_000,
        description="With bits, the position from which on a request's tokens see a quantised KV cache; those before "
        "it see one that is not, and shorter requests are answered as without bits. Default: 0, all are quantised.",
        examples=[4096],
    )
    max_context: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="The most tokens a request may have, prompt and completion together. Default: the model's own.",
        examples=[16384],
    )
    prefix_cache: Size | None = Field(
        None,
        description="Memory that keeps the KV cache of earlier prompts, so that a prompt that begins alike starts "
        "sooner. 0 turns it off. Default: 256MiB.",
        examples=["256MiB", "1GiB", 0],
    )


class Batching(_Section):
    """How many requests are worked on at once."""

    max_rows: int | None = Field(
        None, ge=1, le=1024, description="Requests that decode together in one batch. Default: 32.", examples=[32]
    )
    prefill_step_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Prompt tokens that are processed at a time. Smaller keeps running answers smoother, larger "
        "starts new ones sooner. Default: 512.",
        examples=[512],
    )
    max_queue: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Requests that may wait for a row; more get 503 with Retry-After. Default: 1024.",
        examples=[1024],
    )


class Draft(_Section):
    """A small model that proposes tokens for the large one to verify."""

    source: _Text = Field(
        description="Hub repository, or path relative to this file, of a model with the same tokenizer.",
        examples=["../examples/models/demo-draft"],
    )
    revision: _Text | None = Field(
        None, description="Branch, tag or commit of a hub source. Default: main.", examples=["main"]
    )
    trust_remote_code: bool = Field(
        False,
        description="As of a model, for the draft's own source: what its model says does not count.",
        examples=[True],
    )
    num_draft_tokens: int = Field(4, ge=1, le=64, description="Tokens that are proposed at a time.", examples=[4])


class Adapter(_Section):
    """A LoRA adapter, chosen per request by `adapter_name` or by the model id `model:adapter`."""

    source: _Text = Field(
        description="Hub repository, or path relative to this file, of the adapter's folder (mlx-lm or PEFT).",
        examples=["../examples/models/adapters/pirate", "org/sql-lora"],
    )
    revision: _Text | None = Field(
        None, description="Branch, tag or commit of a hub source. Default: main.", examples=["main"]
    )
    scale: float | None = Field(
        None, ge=-1000, le=1000, description="Strength, instead of the adapter's own scale.", examples=[10]
    )


def _adapter_entry(value: Any) -> Any:
    if isinstance(value, bool | int | float | list):
        raise problem("E203", "should be a path, a hub repository, or a mapping with source")
    return {"source": value} if isinstance(value, str) else value


AdapterEntry = Annotated[Adapter, BeforeValidator(_adapter_entry, json_schema_input_type=_Text | Adapter)]


_PATTERN: JsonDict = {"type": "string", "minLength": 1, "not": {"pattern": r"\*\*"}}
ADAPTER_PATTERNS: JsonDict = {
    "description": "Patterns of folders, relative to this file (*, ? and [ ]): each match that holds an adapter is "
    "one, by the folder's name. An adapter that is listed comes before one that is found.",
    "examples": ["./adapters/*", ["./adapters/*", "~/adapters/*"]],
    "anyOf": [_PATTERN, {"type": "array", "items": _PATTERN, "minItems": 1}, {"type": "null"}],
}


class Model(_Section):
    """One model to serve."""

    source: _Text = Field(
        description="Hugging Face repository (org/name), or path of a model folder relative to this file.",
        examples=["mlx-community/Llama-3.2-1B-Instruct-4bit", "../examples/models/demo-chat"],
    )
    revision: _Text | None = Field(
        None,
        description="Branch, tag or commit of a hub source. Default: main.",
        examples=["main", "08231374eeacb049a0eade7922910865b8fce912"],
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the Python code that the source brings, as its tokenizer or its architecture (mlx-lm's "
        "model_file). It can do whatever you can: read it first, and pin its revision. Default: false.",
        examples=[True],
    )
    aliases: list[Alias] = Field(
        default=[], description="Other ids that requests may use for this model.", examples=[["gpt-4o-mini"]]
    )
    quantization: Quantization | None = Field(
        None,
        description="How to quantise the source: done once, and kept in the cache folder.",
        examples=[{"bits": 4, "group_size": 64}],
    )
    dtype: Dtype | None = Field(
        None,
        description="What the model computes in, and what is not quantised is kept in. Default: the source's own, and "
        "float32 where MLX has no GPU.",
        examples=["bfloat16"],
    )
    memory_limit: Size | None = Field(
        None, description="The most memory this model's engine may use.", examples=["4GiB"]
    )
    kv_cache: KVCache | None = Field(None, description="KV cache and prefix cache.", examples=[{"max_context": 16384}])
    batching: Batching | None = Field(None, description="Continuous batching.", examples=[{"max_rows": 32}])
    draft: Draft | None = Field(
        None, description="Draft model for speculative decoding.", examples=[{"source": "org/small-model"}]
    )
    adapters: dict[Name, AdapterEntry] = Field(
        default={},
        description="LoRA adapters by name: a path or hub repository, or source, revision and scale. "
        "from: ./adapters/* takes every folder there that holds an adapter, by the folder's name.",
        examples=[{"pirate": "../examples/models/adapters/pirate"}, {"from": "../examples/models/adapters/*"}],
        json_schema_extra={"properties": {PATTERNS_KEY: ADAPTER_PATTERNS}},
    )
    default_adapter: Name | None = Field(
        None, description="Adapter of requests that name none. Default: the plain model.", examples=["pirate"]
    )
    generation: Generation | None = Field(
        None,
        description="Defaults for what requests leave out.",
        examples=[{"temperature": 0.7, "max_tokens": 1024}],
    )
    chat_template: _Text | None = Field(
        None,
        description="Path of a Jinja file, relative to this file, in place of the model's own chat template.",
        examples=["./templates/chat.jinja"],
    )
    tool_parser: ToolParser | None = Field(
        None,
        description="How the model writes tool calls, where its chat template does not tell.",
        examples=["qwen3_coder"],
    )
    load: LoadPolicy | None = Field(
        None,
        description="eager: load at start, and stay. on_demand: load at the first request, and give way, while idle, "
        "to others that need the memory. Default: eager.",
        examples=["on_demand"],
    )
    idle_timeout: Duration | None = Field(
        None,
        description="Unload after so long without a request; the next one loads it again. Default: never.",
        examples=["30m"],
    )
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Who comes first where memory is short: models of a higher priority are loaded before others that "
        "wait, and idle ones of a lower priority give way before others.",
        examples=[10],
    )


class Defaults(_Section):
    """What models leave out. Sections are filled in key by key."""

    load: LoadPolicy | None = Field(None, description="`load` of models that have none.", examples=["eager"])
    idle_timeout: Duration | None = Field(
        None, description="`idle_timeout` of models that have none.", examples=["30m"]
    )
    kv_cache: KVCache | None = Field(
        None, description="`kv_cache` keys that models leave out.", examples=[{"max_context": 8192}]
    )
    batching: Batching | None = Field(
        None, description="`batching` keys that models leave out.", examples=[{"max_rows": 16}]
    )
    generation: Generation | None = Field(
        None,
        description="`generation` keys that models leave out.",
        examples=[{"temperature": 0.7}],
    )


class EnvFile(_Section):
    """A file of variables."""

    path: _Text = Field(description="The file, relative to this one.", examples=["./local.env"])
    required: bool = Field(True, description="false: the file may be missing.", examples=[False])


def _env_file_entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


EnvFileEntry = Annotated[EnvFile, BeforeValidator(_env_file_entry, json_schema_input_type=_Text | EnvFile)]
_EnvFiles = Annotated[list[EnvFileEntry], Field(min_length=1)]
EnvFiles = Annotated[_EnvFiles, BeforeValidator(one_as_list, json_schema_input_type=_Text | _EnvFiles)]


class Manifest(_Section):
    """What mlx-run should serve."""

    name: Name = Field(description="Name of this runner; one of a name runs at a time on a machine.", examples=["dev"])
    env_file: EnvFiles | None = Field(
        None,
        description="Files of NAME=value lines that fill in ${NAME}, where the environment does not. Later files win.",
        examples=[".env", [".env", {"path": "local.env", "required": False}]],
    )
    memory: Memory | None = Field(
        None,
        description="Memory of all engines together.",
        examples=[{"limit": "75%", "reserve": "2GiB"}],
    )
    servers: dict[Name, Server] = Field(
        min_length=1, description="Listeners by name, one a port.", examples=[{"main": {"port": 8080}}]
    )
    defaults: Defaults | None = Field(
        None, description="What models leave out.", examples=[{"generation": {"temperature": 0.7}}]
    )
    models: dict[Name, Model] = Field(
        min_length=1,
        description="Models by the name that requests use.",
        examples=[{"chat": {"source": "mlx-community/Llama-3.2-1B-Instruct-4bit"}}],
    )
