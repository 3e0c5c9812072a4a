"""YAML's syntax: libyaml's parser without YAML 1.1's guesses, and its error messages in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import yaml

from runner.errors import Diagnostic, ManifestError
from runner.manifest.foreign import foreign
from runner.manifest.source import Source

if TYPE_CHECKING:
    from yaml import SafeLoader as _Loader
else:
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

PLAIN: Final = "plain"
TEXT: Final = "tag:yaml.org,2002:str"
SEQUENCE: Final = "tag:yaml.org,2002:seq"
MAPPING: Final = "tag:yaml.org,2002:map"
_MAX_DEPTH: Final = 200


class SyntaxLoader(_Loader):
    """Composes nodes; what plain scalars mean is left to `runner.manifest.scalars`."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        """The tag of a node that has none in the document."""
        if kind is yaml.ScalarNode:
            return PLAIN if implicit[0] else TEXT
        return SEQUENCE if kind is yaml.SequenceNode else MAPPING


# code, libyaml's and PyYAML's words for a problem, and ours; the first that is part of the problem counts
_WORDS: Final = (
    ("E113", "maximum nesting depth", "is nested too deeply", ""),
    ("E106", "tab character", "a tab is used for indentation", "indent with spaces"),
    ("E105", "mapping values are not allowed", 'a ":" is not allowed here', "check the indentation, or quote the text"),
    ("E105", "sequence entries are not allowed", 'a "-" list entry is not allowed here', "put it in a line of its own"),
    ("E105", "could not find expected ':'", 'a key has no ":"', "write key: value, and check the indentation above"),
    ("E105", "cannot start any token", "a value cannot begin with this character", "put quotes around the value"),
    ("E105", "expected ',' or ']'", 'a list that began with "[" goes on here without "," or "]"', 'close it with "]"'),
    ("E105", "expected ',' or '}'", 'a mapping that began with "{" goes on here without "," or "}"',
        'close it; quote "${…}"'),
    ("E105", "unexpected end of stream", "a quoted text is not closed", "add the closing quote"),
    ("E105", "unknown escape character", 'an unknown escape after "\\"',
        "use single quotes, or write \\\\ for a backslash"),
    ("E107", "undefined alias", "an alias (*) without its anchor (&)", "define the anchor above it"),
    ("E108", "another document", "a second YAML document begins here", "a manifest is one document: remove the ---"),
    ("E106", "expected '-' indicator", 'a list entry should begin with "-" here', "check the indentation"),
    ("E106", "expected key", "the indentation does not fit the lines above", "align it with the key it belongs to"),
    ("E106", "<block end>", "the indentation does not fit the lines above", "align it with the key it belongs to"),
    ("E106", "<document start>", "the indentation does not fit the lines above", "align it with the first key"),
    ("E107", "second occurrence", "an anchor (&) of this name exists already", "give it another name"),
    ("E107", "duplicate anchor", "an anchor (&) of this name exists already", "give it another name"),
    ("E105", "incompatible YAML document", "this version of YAML is not known", "remove the %YAML line"),
    ("E105", "comment or line break", 'text after "|" or ">"', "begin the text in the next line"),
    ("E105", "indentation indicators", 'text after "|" or ">"', "begin the text in the next line"),
)  # fmt: skip


def explain(source: Source, error: yaml.YAMLError) -> Diagnostic:
    """PyYAML's error as a diagnostic."""
    if isinstance(error, yaml.reader.ReaderError):
        before = source.text.partition(chr(error.character))[0]  # `position` counts bytes or characters, by parser
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        message = f"the control character U+{error.character:04X} is not allowed in YAML"
        return _diagnostic("E103", source, line, column, message, "remove it")
    problem = " ".join(str(part) for part in (getattr(error, "problem", ""), getattr(error, "context", "")) if part)
    mark: Any = getattr(error, "problem_mark", None)
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    if it := foreign(source.text, line):
        return _diagnostic("E105", source, *it)
    if mark and source.character(mark.line, mark.column) == "," and "block mapping" in problem:
        hint = "remove it, or put { } around all of it"
        return _diagnostic("E105", source, line, column, 'a "," stands between the lines, as in JSON', hint)
    ends = bool(mark) and line > source.text.count("\n") + (not source.text.endswith("\n"))
    if mark and source.excerpt(line)[column - 1 : column] == "\t":
        problem = "tab character"
    for code, words, message, hint in _WORDS:
        if words in problem:
            hint = "the file ends here: was it cut off?" if ends and words != "unexpected end of stream" else hint
            return _diagnostic(code, source, line, column, message, hint)
    return _diagnostic("E105", source, line, column, f"is not YAML: {problem}")


def _diagnostic(code: str, source: Source, line: int, column: int, message: str, hint: str = "") -> Diagnostic:
    """Without an excerpt where the text nearby may hold API keys: they can only be told from it once it parses."""
    found = source.diagnostic(code, line, column, "", message, hint)
    nearby = "\n".join(source.excerpt(at) for at in range(max(1, line - 20), line + 1))
    return found._replace(excerpt="") if "api_keys" in nearby else found


def refuse_deep_nesting(source: Source) -> None:
    """libyaml's composer recurses on the C stack, and a document of brackets alone would overflow it.

    Raises ManifestError; the scan by events, which do not recurse, is only made where nesting could be deep at all.
    """
    text = source.text
    if text.count("[") + text.count("{") + text.count("- ") + text.count("? ") < _MAX_DEPTH:
        return
    depth = 0
    try:
        for event in yaml.parse(text, SyntaxLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    mark: Any = event.start_mark
                    at = (mark.line + 1, mark.column + 1)
                    raise ManifestError([_diagnostic("E113", source, *at, "is nested too deeply")])
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except yaml.YAMLError as error:
        raise ManifestError([explain(source, error)]) from None
