"""Every error that mlx-run raises on purpose.

::

    MlxRunError                 what to tell the user, in one or two lines
    ├── ManifestError           the manifest is wrong: a list of diagnostics with file:line:column
    │   ├── NotDownloaded       all that is wrong is that hub sources are not in the hub's cache yet
    │   └── DownloadFailed      hub sources could not be brought there
    ├── UsageError              the command line asks for what cannot be
    ├── Interrupted             whoever asked for something gave it up
    ├── RunnerError             the command cannot be carried out
    │   ├── NotRunning          no runner of that name is up
    │   ├── AlreadyRunning      a runner of that name is up, and this command needs none
    │   ├── StaleGeneration     a request was made for a generation that is not the current one any more
    │   └── ControlError        the runner answered with an error
    ├── EngineError             a model could not be brought up or kept up
    │   ├── EngineLoadError     the model (or an adapter) cannot be loaded; trying again will not help
    │   ├── EngineDied          the engine process ended; it is started again with backoff
    │   └── SourceChanged       files changed while they were loaded; they are read and planned again
    ├── ListenerError           a port could not be opened
    └── RequestError            one request is refused; each has its HTTP status
        ├── InvalidRequest      400, names the field
        ├── Unauthorized        401
        ├── NotServed           404, model or adapter unknown here
        ├── Conflict            409, what was asked for does not go with how things stand
        ├── TooLarge            413
        ├── CannotBeDone        422, understood, tried, and not possible; nothing was changed
        ├── EngineFailed        500, the engine failed or died while it worked on this request
        ├── HubFailed           502, the answer is the hub's, and it gave none
        └── Unavailable         503 with Retry-After: loading, draining, or the queue is full

Each boundary maps the tree once: the CLI to an exit code (`runner.cli.main`), the gateway to an OpenAI-shaped body
(`runner.gateway.errors`), the control socket to a JSON object (`runner.control.control_socket`), the engine to a
message.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple


class MlxRunError(Exception):
    """Base of the tree.

    `str(error)` is what happened; `hint` is what to do about it, or empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class Diagnostic(NamedTuple):
    """One thing wrong in a manifest, at one place.

    `line` and `column` count from 1; 0 means the place is not known. `path` is dotted (`models.chat.source`). `code` is
    stable, and explained by `mlx-run explain` (`runner.manifest.codes`). A warning does not keep a manifest from use.
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    hint: str = ""
    excerpt: str = ""
    code: str = ""
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        text = f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"
        text += f" [{self.code}]" if self.code else ""
        return f"{text} ({self.hint})" if self.hint else text


class ManifestError(MlxRunError):
    """The manifest cannot be used; nothing was changed."""

    def __init__(self, diagnostics: list[Diagnostic]) -> None:
        assert diagnostics, "a manifest error names at least one place"
        self.diagnostics = diagnostics
        super().__init__("\n".join(str(d) for d in diagnostics))


class NotDownloaded(ManifestError):  # noqa: N818 - a condition, read as `except NotDownloaded`
    """Nothing is wrong but that hub sources are not in the local cache; `repo` and `revision` are the first's."""

    def __init__(self, diagnostics: list[Diagnostic], repo: str, revision: str) -> None:
        super().__init__(diagnostics)
        self.repo = repo
        self.revision = revision


class DownloadFailed(ManifestError):  # noqa: N818
    """Hub sources could not be brought into the cache. `passing`: trying again later may help."""

    def __init__(self, diagnostics: list[Diagnostic], *, passing: bool = False) -> None:
        super().__init__(diagnostics)
        self.passing = passing


class UsageError(MlxRunError):
    """The command line asks for what cannot be; the code is EX_USAGE of BSD's sysexits."""

    exit_code = 64


class Interrupted(MlxRunError):  # noqa: N818 - a condition
    """Whoever asked for something gave it up, and it was undone; the code is a shell's for Ctrl-C."""

    exit_code = 130


class RunnerError(MlxRunError):
    """The command cannot be carried out."""


class NotRunning(RunnerError):  # noqa: N818 - these names are conditions, read as `except NotRunning`
    """No runner of that name is up."""


class AlreadyRunning(RunnerError):  # noqa: N818
    """A runner of that name is up already."""


class StaleGeneration(RunnerError):  # noqa: N818
    """A request was made for a generation that is not the current one any more; nothing was changed."""


class ControlError(RunnerError):
    """The runner answered a control request with an error."""


class EngineError(MlxRunError):
    """A model could not be brought up or kept up."""


class EngineLoadError(EngineError):
    """The model or adapter cannot be loaded; only an edit helps."""


class EngineDied(EngineError):  # noqa: N818
    """The engine process ended without being asked to."""


class SourceChanged(EngineError):  # noqa: N818
    """What an engine loaded is not what was planned, because its files changed meanwhile; planning again helps."""


class ListenerError(MlxRunError):
    """A listener could not be opened (port taken, address not of this machine)."""


class RequestError(MlxRunError):
    """One request is refused or failed.

    `status` is the HTTP status, `kind` OpenAI's error `type`, `code` its `code`, `param` the field at fault or None.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequest(RequestError):  # noqa: N818
    """The request itself is wrong: `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class Unauthorized(RequestError):  # noqa: N818
    """No API key, or not one of this listener's."""

    status = 401
    kind = "authentication_error"


class NotServed(RequestError):  # noqa: N818
    """The model or adapter is not served here."""

    status = 404
    kind = "invalid_request_error"


class Conflict(RequestError):  # noqa: N818
    """What was asked for does not go with how things stand now."""

    status = 409
    kind = "invalid_request_error"


class TooLarge(RequestError):  # noqa: N818
    """The body is over the listener's limit."""

    status = 413
    kind = "invalid_request_error"


class CannotBeDone(RequestError):  # noqa: N818
    """The request was understood and tried, and cannot be carried out; nothing was changed."""

    status = 422
    kind = "invalid_request_error"


class EngineFailed(RequestError):  # noqa: N818
    """The engine failed, or died, while it worked on this request."""

    status = 500
    kind = "server_error"


class HubFailed(RequestError):  # noqa: N818
    """The hub, whose answer it takes, cannot be reached or refuses; `code` is of `runner.manifest.codes`."""

    status = 502
    kind = "server_error"


class Unavailable(RequestError):  # noqa: N818
    """Not now: the model is loading or draining, or its queue is full. `retry_after` is in seconds."""

    status = 503
    kind = "server_error"

    def __init__(
        self, message: str, *, retry_after: float = 1.0, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after
