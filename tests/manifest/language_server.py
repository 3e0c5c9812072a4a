"""A yaml-language-server, spoken to as an editor does: LSP over standard input and output."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Editor:
    """One server process with one workspace. Positions are (line, column) from 0, as the protocol has them."""

    def __init__(self, modules: Path, workspace: Path, custom_tags: Sequence[str] = ()) -> None:
        server = modules / "yaml-language-server" / "bin" / "yaml-language-server"
        self._process = subprocess.Popen(
            ["node", str(server), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._ids = itertools.count(1)
        self._workspace = workspace
        self._diagnostics: dict[str, list[dict[str, Any]]] = {}
        self._settings: dict[str, Any] = {
            "yaml": {"hover": True, "completion": True, "validate": True, "customTags": [*custom_tags]}
        }
        uri = workspace.as_uri()
        folders = [{"uri": uri, "name": "w"}]
        self.ask("initialize", processId=None, rootUri=uri, capabilities=_CAPABILITIES, workspaceFolders=folders)
        self._tell("initialized")

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def associate(self, schema: Path, pattern: str) -> None:
        """The setting `yaml.schemas`, as in VS Code's settings.json."""
        self._settings["yaml"]["schemas"] = {schema.as_uri(): [pattern]}
        self._tell("workspace/didChangeConfiguration", settings=self._settings)

    def open(self, text: str, name: str = "{}.yaml") -> str:
        """A new document that is shown; `{}` in its name is a number. Returns its URI."""
        uri = (self._workspace / name.format(next(self._ids))).as_uri()
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self._tell("textDocument/didOpen", textDocument=document)
        return uri

    def problems(self, uri: str) -> list[dict[str, Any]]:
        """What is underlined in a document, once the server has looked."""
        while uri not in self._diagnostics:
            self._take()
        return self._diagnostics[uri]

    def completions(self, uri: str, line: int, column: int) -> dict[str, dict[str, Any]]:
        """What is offered at a place, by label."""
        answer = self.ask("textDocument/completion", textDocument={"uri": uri}, position=_at(line, column))
        items = answer["items"] if isinstance(answer, dict) else answer
        return {item["label"]: item for item in items}

    def hover(self, uri: str, line: int, column: int) -> str:
        """What is shown when the mouse rests at a place; empty for nothing."""
        answer = self.ask("textDocument/hover", textDocument={"uri": uri}, position=_at(line, column))
        return str(answer["contents"]["value"]) if answer else ""

    def ask(self, method: str, **params: Any) -> Any:
        """A request, and its result."""
        number = next(self._ids)
        self._send({"id": number, "method": method, "params": params})
        while True:
            message = self._take()
            if message.get("id") == number and "method" not in message:
                assert "error" not in message, message
                return message["result"]

    def _tell(self, method: str, **params: Any) -> None:
        self._send({"method": method, "params": params})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        self._process.stdin.flush()

    def _take(self) -> dict[str, Any]:
        """The next message; what the server asks of an editor is answered."""
        assert self._process.stdout is not None
        length = 0
        while line := self._process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        assert length, "the server ended"
        message: dict[str, Any] = json.loads(self._process.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            self._diagnostics[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif message.get("method") == "workspace/configuration":
            wanted = message["params"]["items"]
            self._send({"id": message["id"], "result": [self._settings.get(i.get("section", "")) for i in wanted]})
        elif "id" in message and "method" in message:
            self._send({"id": message["id"], "result": None})
        return message


def _at(line: int, column: int) -> dict[str, int]:
    return {"line": line, "character": column}


_CAPABILITIES = {
    "textDocument": {
        "completion": {"completionItem": {"snippetSupport": True, "documentationFormat": ["markdown"]}},
        "hover": {"contentFormat": ["markdown"]},
        "publishDiagnostics": {},
    },
    "workspace": {"configuration": True},
}
