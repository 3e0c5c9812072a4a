"""What a folder's tokenizer files say: the tokens and their ids, which of them are special, the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.inspect.files import BadFolder, DigestCache, content_digest, file_version, json_object

_ALIKE: Final = 0.99
"""Share of a model's tokens that a draft must have under the same numbers."""

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFacts(NamedTuple):
    """`size` is the number of tokens, added ones among them, 0 where tokenizer.json does not list them. `special` maps
    names (`eos_token`) to texts. `chat_template` is whether there is one."""

    size: int
    special: Mapping[str, str]
    chat_template: bool


class VocabularyDifference(NamedTuple):
    """Two tokenizers: the first's tokens, those of them that the other lacks or has under another number (`example` is
    one), and the other's tokens. `ends` are the ends of a text, of the first and of the other, where they differ."""

    wanted: int
    different: int
    has: int
    example: str
    ends: tuple[str, str] | None

    @property
    def alike(self) -> bool:
        """Whether the engine takes the other as a draft's (`runner.engine.speculative.loading`)."""
        return self.different <= (1 - _ALIKE) * self.wanted and self.has <= self.wanted / _ALIKE


def read_tokenizer(folder: Path) -> TokenizerFacts:
    """Raises BadFolder where a file is not whole."""
    settings = _settings(folder)
    template = (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
    return TokenizerFacts(len(_tokens(folder)), _special(settings), template)


def compare_vocabularies(one: Path, other: Path, cache: DigestCache) -> VocabularyDifference | None:
    """None where one of the folders does not list its tokens. Equal files are not read. Raises BadFolder."""
    digests = [_digest(folder, cache) for folder in (one, other)]
    if None in digests:
        return None
    return cache.derive("vocabularies", " ".join(map(str, digests)), lambda: _compare(one, other, digests))


def _digest(folder: Path, cache: DigestCache) -> str | None:
    parts = []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        version = file_version(folder / name)
        if version is not None:
            parts.append(version.blob or cache.remember("content", version, content_digest))
        elif name == "tokenizer.json":
            return None
        else:
            parts.append("")
    return "/".join(parts)


def _compare(one: Path, other: Path, digests: list[str | None]) -> VocabularyDifference:
    ends = [_special(_settings(folder)).get("eos_token", "") for folder in (one, other)]
    differing_ends = (ends[0], ends[1]) if ends[0] != ends[1] else None
    tokens = [(digest or "").partition("/")[0] for digest in digests]
    if tokens[0] == tokens[1]:
        return VocabularyDifference(0, 0, 0, "", differing_ends)
    wanted, has = _tokens(one), _tokens(other)
    different = [token for token, number in wanted.items() if has.get(token) != number]
    return VocabularyDifference(len(wanted), len(different), len(has), next(iter(different), ""), differing_ends)


def _tokens(folder: Path) -> dict[str, int]:
    """Tokens to their numbers, as tokenizer.json lists them."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        return dict(_listed(json_object(path)))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        raise BadFolder("E603", f"{path} does not list its tokens as tokenizers do", "download it again") from None


def _listed(data: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, Mapping):
        yield from ((str(token), int(index)) for token, index in vocabulary.items())
    else:  # a Unigram model lists [token, score]
        yield from ((str(entry[0]), index) for index, entry in enumerate(vocabulary))
    yield from ((str(token["content"]), int(token["id"])) for token in data.get("added_tokens") or ())


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json_object(path) if path.is_file() else {}


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _NAMED:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            found[name] = text
    return found
