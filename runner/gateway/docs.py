"""`/openapi.json`, and `/docs`: the same as one page of HTML that needs nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec
from falcon.asgi import App, Request, Response

from runner.gateway.exchange import exchange_of
from runner.plan.spec import ListenerSpec

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; } code, pre { font: 13px/1.45 ui-monospace, monospace; }
details { border: 1px solid #8884; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } summary b { display: inline-block; width: 4.5rem; text-transform: uppercase; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td { border-top: 1px solid #8883; padding: .2rem .5rem; vertical-align: top; } .need { font-weight: 600; }
"""


def add_routes(app: App[Any, Any], spec: ListenerSpec) -> None:
    """Adds both to a listener's app."""
    docs = Docs(spec)
    app.add_route("/openapi.json", docs, suffix="document")
    app.add_route("/docs", docs)


class Docs:
    """What this listener answers, and how to ask. Made when it is first asked for."""

    def __init__(self, spec: ListenerSpec) -> None:
        self._apis = spec.apis
        self._locked = bool(spec.api_keys)
        self._made: dict[str, Any] | None = None

    async def on_get_document(self, request: Request, response: Response) -> None:
        """The document."""
        exchange_of(request).route = "/openapi.json"
        response.content_type = "application/json"
        response.data = msgspec.json.encode(self._document())

    async def on_get(self, request: Request, response: Response) -> None:
        """The page."""
        exchange_of(request).route = "/docs"
        response.content_type = "text/html; charset=utf-8"
        response.set_header("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'")
        response.data = page(self._document()).encode()

    def _document(self) -> dict[str, Any]:
        if self._made is None:
            # Most listeners are never asked, and should not pay for schemas of every request.
            from runner.gateway.openapi import document  # noqa: PLC0415

            self._made = document(self._apis, locked=self._locked)
        return self._made


def page(document: Mapping[str, Any]) -> str:
    """A document as HTML."""
    schemas: Mapping[str, Any] = document["components"]["schemas"]
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            written = "".join(_operation(path, method, operation, schemas))
            by_tag.setdefault(operation["tags"][0], []).append(written)
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in by_tag.items())
    title = escape(document["info"]["title"])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    intro = (
        f"<h1>{title}</h1><p>{escape(document['info']['description'])} Machines read <code>/openapi.json</code>.</p>"
    )
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{intro}{body}</body></html>'


def _operation(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"<details><summary><b>{method}</b> <code>{escape(path)}</code> {escape(operation['summary'])}</summary>"
    if parameters := operation.get("parameters"):
        required = [p["name"] for p in parameters if p["required"]]
        asked = {"properties": {p["name"]: p["schema"] for p in parameters}, "required": required}
        yield f"<table>{''.join(_fields(asked, schemas))}</table>"
    body = operation.get("requestBody")
    if body is not None:
        schema = body["content"]["application/json"]["schema"]
        yield f"<table>{''.join(_fields(_resolved(schema, schemas), schemas))}</table>"
    answers = "".join(
        f"<tr><td><code>{status}</code></td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    yield f"<table>{answers}</table></details>"


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    required = set(schema.get("required", ()))
    properties = sorted(schema.get("properties", {}).items(), key=lambda field: field[0] not in required)
    for name, field in properties:
        need = ' class="need"' if name in required else ""
        yield f"<tr><td{need}><code>{escape(name)}</code></td><td>{escape(_type(field, schemas))}</td></tr>"


def _type(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """A type in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return str(schemas.get(name, {}).get("description", name)).split("\n", 1)[0]
    if "anyOf" in schema:
        return " or ".join(_type(one, schemas) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items') or {}, schemas)}"
    bounds = [f"{word} {schema[key]}" for key, word in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    kind = schema.get("type", "anything")
    return " ".join([kind if isinstance(kind, str) else " or ".join(kind), *bounds])


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in schema:
        found: Mapping[str, Any] = schemas[schema["$ref"].rpartition("/")[2]]
        return found
    return schema
