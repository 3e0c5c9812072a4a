"""`mlx-run chat`: a conversation in the terminal, streamed over the runner's own HTTP port."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from runner.cli.locate import add_files, add_name, find, wanted
from runner.control import client
from runner.errors import RunnerError

Message = dict[str, str]

_HELP = "Type a message. /clear forgets the conversation, /adapter NAME switches (none: the plain model), /quit ends."


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("model", nargs="?", help="a model's name (default: the first)")
    parser.add_argument("-a", "--adapter", help="an adapter's name, or none for the plain model")
    parser.add_argument("-m", "--message", help="say this, print the answer, and end")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--api-key", default=os.environ.get("MLX_RUN_API_KEY"), help="default: $MLX_RUN_API_KEY")
    add_name(parser)
    add_files(parser)
    parser.epilog = "example:\n  mlx-run chat demo-chat --adapter pirate"


def run(arguments: argparse.Namespace) -> int:
    """0 when the conversation ends."""
    server, model = _endpoint(client.request(find(wanted(arguments)).control_socket, "status"), arguments.model)
    address = _reachable(server["address"])
    talk = Conversation(
        address, model, arguments.adapter, arguments.system, arguments.api_key, server.get("certificate")
    )
    if arguments.message is not None:
        talk.say(arguments.message)
        return 0
    print(f"{model} at {address}. {_HELP}")
    while (line := _read()) is not None:
        if line.startswith("/"):
            if not _command(talk, line):
                break
        elif line:
            _guarded(talk, line)
    return 0


class Conversation:
    """Keeps the messages, and sends them all with each new one. `certificate` is the file of the server's own."""

    def __init__(
        self,
        address: str,
        model: str,
        adapter: str | None,
        system: str | None,
        api_key: str | None = None,
        certificate: str | None = None,
    ) -> None:
        self.adapter = adapter
        self._address = urlsplit(address)
        self._model = model
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages: list[Message] = []
        self._api_key = api_key
        self._certificate = certificate

    def clear(self) -> None:
        """Forget what was said."""
        self._messages.clear()

    def say(self, text: str) -> str:
        """Send one message and print the answer as it comes. Raises RunnerError; the message is then not kept."""
        messages = [*self._system, *self._messages, {"role": "user", "content": text}]
        answer = ""
        for piece in self._stream(messages):
            answer += piece
            print(piece, end="", flush=True)
        print()
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def _stream(self, messages: list[Message]) -> Iterator[str]:
        body: dict[str, Any] = {"model": self._model, "messages": messages, "stream": True}
        if self.adapter:
            body["adapter_name"] = self.adapter
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connection = self._connection()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            yield from _pieces(connection.getresponse())
        except (OSError, HTTPException) as error:
            raise RunnerError(f"{self._address.netloc} does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        host, port = self._address.hostname or "127.0.0.1", self._address.port
        if self._certificate is None:
            return HTTPConnection(host, port)
        # Imported here: a chat without TLS need not wait for it.
        import ssl  # noqa: PLC0415

        # The very certificate is known, whatever name it is for and whoever has signed it.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(self._certificate)
        return HTTPSConnection(host, port, context=context)


def _pieces(response: HTTPResponse) -> Iterator[str]:
    """The text of each event of an OpenAI stream."""
    if response.status != 200:
        raise RunnerError(_message(response.read()))
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RunnerError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace") or "the server answered with nothing"


def _endpoint(status: dict[str, Any], wanted: str | None) -> tuple[dict[str, Any], str]:
    """The server (as in the status) and the model id to use. Raises RunnerError when nobody serves it."""
    for server in status["servers"]:
        for name in server["models"]:
            aliases: list[str] = next((m["aliases"] for m in status["models"] if m["name"] == name), [])
            if wanted is None or wanted.partition(":")[0] in (name, *aliases):
                return server, wanted or name
    served = ", ".join(m["name"] for m in status["models"]) or "none"
    raise RunnerError(f"no server serves {wanted or 'a model'!r}", hint=f"Models: {served}.")


def _reachable(address: str) -> str:
    """A server that listens on every interface is reached on the loopback one."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _read() -> str | None:
    """A line, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _command(talk: Conversation, line: str) -> bool:
    """Whether to go on after a line that starts with a slash."""
    word, _, rest = line.partition(" ")
    match word:
        case "/quit" | "/exit" | "/bye":
            return False
        case "/clear":
            talk.clear()
        case "/adapter":
            talk.adapter = rest.strip() or None
        case _:
            print(_HELP)
    return True


def _guarded(talk: Conversation, line: str) -> None:
    """One turn: an error or a Ctrl-C ends the turn, not the conversation."""
    try:
        talk.say(line)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
