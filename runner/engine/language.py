"""What a model's folder says of text: its tokenizer, its chat template, how it writes tool calls and reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from runner.engine.answer.conventions import Conventions, conventions
from runner.engine.chat import ChatTemplate, Render, jinja_render
from runner.engine.narrow import narrow_tokenizer
from runner.engine.tokenizer import Tokenizer
from runner.errors import EngineLoadError


class Language(msgspec.Struct, frozen=True):
    """Of one folder, and what the manifest says in its place."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    conventions: Conventions


def narrow_language(folder: Path, config: Mapping[str, Any], tool_parser: str, chat_template: str) -> Language:
    """By the narrow way. `tool_parser` and `chat_template` as `loader.load` has them.

    Raises NotNarrow, EngineLoadError, and whatever its files make libraries raise.
    """
    tokenizer, template = narrow_tokenizer(folder, config, eos_ids(config))
    render = None if template is None else jinja_render(template, tokenizer.special_tokens)
    return spoken(tokenizer, render, tool_parser, chat_template)


def spoken(tokenizer: Tokenizer, render: Render | None, tool_parser: str, chat_template: str) -> Language:
    """The same of a tokenizer and a chat template that are read, None where there is none. Raises EngineLoadError."""
    if chat_template:
        render = _other_template(Path(chat_template), tokenizer)
    vocabulary = {} if tokenizer.backend is None else tokenizer.backend.get_added_tokens_decoder()
    names = {token.content for token in vocabulary.values()}
    chat = ChatTemplate(render)
    return Language(tokenizer, chat, conventions(chat.source, names, tool_parser))


def _other_template(file: Path, tokenizer: Tokenizer) -> Render:
    """The manifest's own. Raises EngineLoadError."""
    try:
        return jinja_render(file.read_text(encoding="utf-8"), tokenizer.special_tokens)
    except (OSError, ValueError) as error:
        raise EngineLoadError(f"the chat template {file} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise EngineLoadError(f"{file}:{error.lineno}: the chat template cannot be parsed: {error.message}") from None


def eos_ids(config: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a text, as the configuration names them: one, or a list."""
    named = config.get("eos_token_id")
    if named is None:
        return frozenset()
    return frozenset(named if isinstance(named, list) else [named])
