"""A model folder to a model, its tokenizer and its chat template, ready for the loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten

from runner.engine import blocked, direct, draw_kernel, exponentials, layouts, norms, tiled, zero_copy
from runner.engine.answer.conventions import Conventions
from runner.engine.beside import Beside
from runner.engine.joined import join_siblings
from runner.engine.kv.attention import install
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.engine.narrow import NotNarrow
from runner.engine.products import install as install_products
from runner.engine.weights import narrow_model
from runner.errors import EngineLoadError

if TYPE_CHECKING:
    from runner.engine.chat import ChatTemplate
    from runner.engine.language import Language
    from runner.engine.tokenizer import Tokenizer

_CONSENT: Final = "Read it; if you trust it, write trust_remote_code: true beside the source in the manifest."


class LoadedModel(msgspec.Struct, frozen=True):
    """A model in memory.

    `dtype` is what activations are computed in, `vocabulary` the width of its logits, `max_context` is in tokens (0
    where the model does not say), `layout` makes its caches, `batches` says whether rows can share a model call,
    `notes` are for the user, `conventions` say how it writes tool calls and reasoning.
    """

    model: Any
    tokenizer: Tokenizer
    chat: ChatTemplate
    architecture: str
    vocabulary: int
    max_context: int
    dtype: mx.Dtype
    weights_bytes: int
    layout: Layout
    batches: bool = True
    notes: tuple[str, ...] = ()
    conventions: Conventions = msgspec.field(default_factory=Conventions)


def load(
    folder: Path,
    tool_parser: str = "",
    slack: int = 0,
    quantisation: Quantisation | None = None,
    chat_template: str = "",
    dtype: str = "",
    *,
    trust_remote_code: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> LoadedModel:
    """Load a model folder. `tool_parser` names the convention of its tool calls, "" for what its template tells;
    `chat_template` is a file in place of its own, "" for that.

    `slack` is how many tokens its caches can take back where it has sliding windows. `dtype` is what the model
    computes in, "" for its own: but on the CPU that is float32 then, which is several times faster there.
    `trust_remote_code`: Python code that the folder brings, as its architecture or its tokenizer, is run. `meanwhile`
    is called in another thread while weights are computed. Raises EngineLoadError: the folder is not a model, or one
    that cannot be served.
    """
    config = _read_config(folder)
    notes: list[str] = []
    try:
        model, config = load_weights(folder, config, notes, trust_remote_code=trust_remote_code)
        arrange(model, dtype)
        text = _Text(folder, config, tool_parser, chat_template, trust_remote_code)
        # Weights and the trial calls are computed without Python's lock, and what is read here has most need of it.
        reading = Beside(lambda: text.read(meanwhile))
        mx.eval(model.parameters())
        served = equip(model, slack, quantisation)
        try:
            language = reading.result()
        except NotNarrow as reason:
            notes.append(f"tokenizer loaded by transformers: {reason}")
            language = text.read_in_full()
    except EngineLoadError:
        raise
    except Exception as error:
        # Upstream raises whatever its model code trips over; all of it means that this folder cannot be served.
        raise EngineLoadError(f"{folder.name} cannot be loaded: {error}") from error
    return _loaded(model, config, language, served, notes)


def arrange(model: Any, dtype: str = "") -> None:
    """Have the model's weights, which are not evaluated yet, in the type and the order that they are multiplied in."""
    if not dtype and mx.default_device() == mx.Device(mx.cpu):
        dtype = "float32"
    if dtype:
        model.set_dtype(getattr(mx, dtype))
    join_siblings(model, lambda: Layout(model).new().call(model, mx.array([[0]])))
    blocked.install(model)
    direct.install(model)


def equip(model: Any, slack: int, quantisation: Quantisation | None) -> tuple[Layout, int, bool]:
    """Have the model attend and multiply by what there is for that; returns its layout, the width of its logits, and
    whether rows can share a call."""
    install(model)
    norms.install(model)
    exponentials.install(model)
    tiled.install(model)
    draw_kernel.prepare(activation_dtype(model))
    zero_copy.prepare()
    install_products(model)
    layout, vocabulary, together = layouts.choose(model, slack)
    if quantisation is not None:
        layout = layouts.quantised(model, quantisation, layout, vocabulary)
    return layout, vocabulary, together


def _loaded(
    model: Any, config: Mapping[str, Any], language: Language, served: tuple[Layout, int, bool], notes: Sequence[str]
) -> LoadedModel:
    layout, vocabulary, together = served
    architectures = config.get("architectures") or [config.get("model_type", "")]
    return LoadedModel(
        model=model,
        tokenizer=language.tokenizer,
        chat=language.chat,
        architecture=str(architectures[0]),
        layout=layout,
        batches=together,
        vocabulary=vocabulary,
        max_context=_max_context(config),
        dtype=activation_dtype(model),
        weights_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        notes=(*notes, *_notes(layout, together=together)),
        conventions=language.conventions,
    )


def _notes(layout: Layout, *, together: bool) -> list[str]:
    notes = []
    if layout.quantisation is not None and (kept := layout.leaves - layout.straight):
        notes.append(f"kv_cache.bits: {kept} of {layout.leaves} layers stay as they are: their size is bounded")
    if not together:
        notes.append("mlx_lm does not batch this architecture correctly: requests are served one at a time")
    return notes


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
    except FileNotFoundError as error:
        raise EngineLoadError(f"{folder} is not a model folder: config.json is missing") from error
    except (OSError, ValueError) as error:
        raise EngineLoadError(f"{path} cannot be read: {error}") from error
    generation = folder / "generation_config.json"
    if generation.is_file():
        try:
            eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            eos = None  # upstream ignores a broken one as well
        if eos:
            config["eos_token_id"] = eos
    return config


def load_weights(
    folder: Path, config: dict[str, Any], notes: list[str], *, trust_remote_code: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, not yet evaluated, and its configuration. Raises EngineLoadError where it brings its
    architecture as code that may not be run, and what upstream raises."""
    if (named := config.get("model_file")) and not trust_remote_code:
        raise EngineLoadError(f"{folder.name} brings its architecture as Python code ({named})", hint=_CONSENT)
    try:
        if "__float__" in json.dumps(config):
            raise NotNarrow("config.json has tagged numbers")
        return narrow_model(folder, config), config
    except NotNarrow as reason:
        notes.append(f"weights loaded by mlx_lm: {reason}")
    # Imported here: 1.2 s and 77 MB that most models need not pay.
    from runner.engine.full import full_model  # noqa: PLC0415

    return full_model(folder, trust_remote_code=trust_remote_code)


class _Text(msgspec.Struct, frozen=True):
    """What is read of a folder beside its weights, and what the manifest says in its place."""

    folder: Path
    config: Mapping[str, Any]
    tool_parser: str
    chat_template: str
    trust_remote_code: bool

    def read(self, then: Callable[[], object]) -> Language:
        """By the narrow way; `then` is called behind it. Raises as `narrow_language`."""
        # Imported here: jinja and tokenizers are a tenth of a start, and the weights need neither.
        from runner.engine.language import narrow_language  # noqa: PLC0415

        language = narrow_language(self.folder, self.config, self.tool_parser, self.chat_template)
        then()
        return language

    def read_in_full(self) -> Language:
        """By upstream's loader. Raises EngineLoadError, and what upstream does."""
        from runner.engine.full import full_tokenizer  # noqa: PLC0415 - see above
        from runner.engine.language import eos_ids, spoken  # noqa: PLC0415

        try:
            ends = eos_ids(self.config)
            tokenizer, render = full_tokenizer(self.folder, ends, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            if self.trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise EngineLoadError(f"{self.folder.name} brings its tokenizer as Python code", hint=_CONSENT) from None
        return spoken(tokenizer, render, self.tool_parser, self.chat_template)


def _max_context(config: Mapping[str, Any]) -> int:
    nested = config.get("text_config")
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
            if isinstance(value := source.get(key), int) and value > 0:
                return value
    return 0


def activation_dtype(model: Any) -> mx.Dtype:
    """What the model computes in: the type of its norms and scales, which quantisation leaves alone."""
    found: Callable[[mx.array], bool] = lambda array: bool(mx.issubdtype(array.dtype, mx.floating))  # noqa: E731
    return next((array.dtype for _, array in tree_flatten(model.parameters()) if found(array)), mx.float32)
