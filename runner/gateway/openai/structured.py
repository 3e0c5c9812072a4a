"""What a request says its answer has to match → `Grammar`. Whether that can be compiled is the engine's to say."""

from __future__ import annotations

import msgspec

from runner.errors import InvalidRequest
from runner.gateway.formats import any_object
from runner.gateway.openai.wire import CommonFields, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from runner.protocol import Grammar


def grammar_of(request: CommonFields) -> Grammar | None:
    """The grammar that a request asks for, in either of its fields. Raises InvalidRequest."""
    outputs = request.structured_outputs
    match request.response_format:
        case JsonSchemaFormat(json_schema=asked):
            param = "response_format.json_schema.schema"
            if not (schema := _json(asked.schema)):
                raise InvalidRequest(f"`{param}` is missing", param=param, code="missing_field")
            grammar = Grammar("json", schema, param)
        case JsonObjectFormat():
            grammar = any_object("response_format")
        case _:
            return None if outputs is None else _structured(outputs)
    if outputs is not None:
        raise InvalidRequest(
            "`structured_outputs` and `response_format` both say what the answer should be; send one",
            param="structured_outputs",
        )
    return grammar


def _structured(outputs: StructuredOutputs) -> Grammar:
    grammars = []
    if outputs.json is not msgspec.UNSET and (schema := _json(outputs.json)):
        grammars.append(Grammar("json", schema, "structured_outputs.json"))
    if outputs.regex is not None:
        grammars.append(Grammar("regex", outputs.regex, "structured_outputs.regex"))
    if outputs.choice is not None:
        choices = msgspec.json.encode(outputs.choice).decode()
        grammars.append(Grammar("choice", choices, "structured_outputs.choice"))
    if outputs.grammar is not None:
        grammars.append(Grammar("lark", outputs.grammar, "structured_outputs.grammar"))
    if len(grammars) != 1:
        message = "`structured_outputs` should have exactly one of `json`, `regex`, `choice` and `grammar`"
        raise InvalidRequest(message, param="structured_outputs")
    return grammars[0]


def _json(raw: msgspec.Raw) -> str:
    """The text of a schema, "" for none; one that is given as a string is what the string says."""
    text = bytes(raw).decode()
    if text == "null":
        return ""
    if text.startswith('"'):
        decoded: str = msgspec.json.decode(text)
        return decoded
    return text
