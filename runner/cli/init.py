"""`mlx-run init`: writes a first manifest for this machine, from what the hub's cache holds."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from runner.errors import ManifestError, RunnerError, UsageError
from runner.gateway.sockets import is_free
from runner.hub.cache import hub_cache
from runner.inspect.files import DigestCache
from runner.machine import Machine, this_machine
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics
from runner.manifest.values import format_size
from runner.plan.candidates import Candidate, Fit, fit, fitting, in_hub_cache, named
from runner.plan.resolve import look
from runner.plan.starter import KEY_VARIABLE, Chosen, Starter, compose, recommended
from runner.plan.verdict import budget

DEFAULT_FILE: Final = "mlx-run.yaml"
_FIRST_PORT, _PORTS = 8080, 100
_SHOWN: Final = 15
"""Models of the cache that are listed."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("file", nargs="?", default=DEFAULT_FILE, metavar="FILE", help=f"default: {DEFAULT_FILE}")
    parser.add_argument("-y", "--yes", action="store_true", help="ask nothing: take what fits best")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument(
        "-m", "--model", action="append", metavar="SOURCE", help="a repository or folder to serve; may be repeated"
    )
    parser.add_argument("--name", help="the runner's name (default: the folder's)")
    parser.add_argument("--port", type=_port, help=f"default: {_FIRST_PORT}, or the next that is free")
    parser.epilog = (
        "Looks at the models that are in the Hugging Face hub's cache and at this machine's memory, and writes a\n"
        "manifest that fits, with comments. It downloads nothing and starts nothing.\n\n"
        "example:\n  mlx-run init --yes && mlx-run apply mlx-run.yaml"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when FILE is written. Raises RunnerError: it is there already, or nothing can be served."""
    path = Path(arguments.file)
    if path.exists() and not arguments.force:
        raise RunnerError(f"{path} is there already", hint="Choose another file, or overwrite it with --force.")
    if not path.parent.is_dir():
        raise RunnerError(f"there is no folder {path.parent}", hint="Make it first.")
    asking = not arguments.yes
    if asking and not sys.stdin.isatty():
        raise UsageError("there is nobody to ask", hint="Say --yes to take what fits best.")
    starter = _Wizard(this_machine(), path, asking=asking).decide(arguments)
    _write(path, compose(starter), overwrite=arguments.force)
    _say_what_next(path, starter)
    return 0


class _Wizard:
    """Decides, with or without asking. All sizes are bytes."""

    def __init__(self, machine: Machine, path: Path, *, asking: bool) -> None:
        self._machine = machine
        self._path = path
        self._asking = asking
        self._digests = DigestCache()
        self._cache = hub_cache(os.environ)
        self._budget = budget(machine)

    def decide(self, arguments: argparse.Namespace) -> Starter:
        """Everything that the manifest needs. Raises RunnerError."""
        cached = in_hub_cache(self._cache, self._digests)
        fitting_alone = list(fitting(cached, self._budget, float32=self._machine.float32))
        sources: list[str] = arguments.model or self._sources(cached, fitting_alone)
        chosen = self._choose([named(source, self._cache, self._digests) for source in sources])
        others = [Chosen(c, found) for c, found in fitting_alone if c.source not in sources]
        port = arguments.port or self._ask_port()
        return Starter(
            file=str(self._path),
            name=arguments.name or _runner_name(self._path),
            port=port,
            chosen=[self._seen_from_the_file(one) for one in chosen],
            others=others[:_SHOWN],
            machine=self._machine.memory,
            open_to_network=self._asking and _yes("May other machines use it, with a key?"),
        )

    def _sources(self, cached: Sequence[Candidate], fitting_alone: Sequence[tuple[Candidate, Fit]]) -> list[str]:
        """What to serve: asked, else the largest that fits and can chat, else one to download."""
        best = [c.source for c, _ in fitting_alone[:1]] or [recommended(self._budget, gpu=not self._machine.float32)]
        if not self._asking:
            if not fitting_alone:
                print(f"No model that fits is in {self._cache}: {best[0]} is downloaded by the first apply.")
            return best
        self._show(cached, dict(fitting_alone))
        while True:
            words = _ask("Which to serve? Numbers, repositories or folders", ", ".join(best)).replace(",", " ").split()
            wrong = [w for w in words if w.isdigit() and not 1 <= int(w) <= min(len(cached), _SHOWN)]
            if not wrong:
                return [cached[int(word) - 1].source if word.isdigit() else word for word in words]
            print(f"There is no number {wrong[0]}.")

    def _show(self, cached: Sequence[Candidate], fits: dict[Candidate, Fit]) -> None:
        print(
            f"This machine has {format_size(self._machine.memory)}; models may use {format_size(self._budget)} of it."
        )
        print(f"In {self._cache}:" if cached else f"There are no models in {self._cache}.")
        width = max((len(c.source) for c in cached[:_SHOWN]), default=0)
        for number, candidate in enumerate(cached[:_SHOWN], 1):
            size = format_size(candidate.stored) if candidate.stored else ""
            print(f"  {number:>2}  {candidate.source:<{width}}  {size:>9}  {self._verdict(candidate, fits)}")

    @staticmethod
    def _verdict(candidate: Candidate, fits: dict[Candidate, Fit]) -> str:
        if candidate.problem:
            return f"no: {candidate.problem}"
        found = fits.get(candidate)
        if found is None:
            return "does not fit"
        chats = "" if candidate.chats else ", no chat template"
        return f"{found.rows} requests of {found.context} tokens{chats}"

    def _choose(self, candidates: Sequence[Candidate]) -> list[Chosen]:
        """Limits for models that share the memory: their weights, and equal parts of the rest. Raises RunnerError."""
        for candidate in candidates:
            if candidate.problem:
                raise RunnerError(f"{candidate.source} cannot be served: {candidate.problem}")
        here = [c for c in candidates if c.facts is not None]
        held = {c: c.memory(1, 1, float32=self._machine.float32).held for c in here}
        share = (self._budget - sum(held.values())) // max(1, len(here))
        chosen = []
        for candidate in candidates:
            if candidate.facts is None:
                chosen.append(Chosen(candidate, None))
                continue
            found = fit(candidate, held[candidate] + share, float32=self._machine.float32)
            if found is None:
                needed, total = format_size(held[candidate]), format_size(self._budget)
                beside = " beside the others" if len(here) > 1 else ""
                raise RunnerError(
                    f"{candidate.source} does not fit{beside}: its weights take {needed}, and models may use {total}",
                    hint="Serve fewer or smaller models.",
                )
            chosen.append(Chosen(candidate, found))
        return chosen

    def _seen_from_the_file(self, chosen: Chosen) -> Chosen:
        """Folders are relative to the manifest, where they are below it."""
        candidate = chosen.candidate
        folder = Path(candidate.source).expanduser()
        if candidate.revision or not folder.is_dir():
            return chosen
        whole, home = folder.resolve(), self._path.parent.resolve()
        source = f"./{whole.relative_to(home)}" if whole.is_relative_to(home) else str(whole)
        return Chosen(Candidate(source, "", candidate.facts, candidate.chats), chosen.fit)

    def _ask_port(self) -> int:
        free = next((p for p in range(_FIRST_PORT, _FIRST_PORT + _PORTS) if is_free("127.0.0.1", p)), _FIRST_PORT)
        while self._asking:
            text = _ask("Port", str(free))
            try:
                return _port(text)
            except argparse.ArgumentTypeError as error:
                print(error)
        return free


def _write(path: Path, text: str, *, overwrite: bool) -> None:
    """Checks the manifest where it will be, then puts it there. Raises ManifestError and RunnerError."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8") as beside:
            beside.write(text)
            beside.flush()
            _check(Path(beside.name), path)
            if overwrite:
                path.write_text(text, encoding="utf-8")
            else:
                os.link(beside.name, path)  # unlike a rename it never replaces what has come meanwhile
                path.chmod(0o644)
    except FileExistsError:
        raise RunnerError(f"{path} is there already", hint="Overwrite it with --force.") from None
    except OSError as error:
        raise RunnerError(f"cannot write {path}: {error.strerror}") from None


def _check(written: Path, path: Path) -> None:
    """As `mlx-run validate` does, with a key in place of the one that the user will set. Raises ManifestError."""
    try:
        loaded = load_manifest(written, {KEY_VARIABLE: "key", **os.environ})
        found = look(loaded, this_machine(), DigestCache())
        wrong, warnings = found.wrong, found.desired.warnings
    except ManifestError as error:
        wrong, warnings = error.diagnostics, ()
    if wrong:
        raise ManifestError([diagnostic._replace(file=str(path)) for diagnostic in wrong])
    if warnings:
        print(render_diagnostics([diagnostic._replace(file=str(path)) for diagnostic in warnings]), file=sys.stderr)


def _say_what_next(path: Path, starter: Starter) -> None:
    models = ", ".join(chosen.candidate.source for chosen in starter.chosen)
    print(f"{path}: {models} on port {starter.port}.")
    if starter.open_to_network:
        print(f"Clients need a key. To make one up: export {KEY_VARIABLE}={secrets.token_urlsafe(24)}")
    print(f"Start it with `mlx-run apply {path}`.")


def _runner_name(path: Path) -> str:
    """The folder's name, in the manifest's alphabet."""
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in path.resolve().parent.name.lower())
    return letters.strip("-")[:60] or "home"


def _ask(question: str, default: str) -> str:
    """What is answered, or the default for nothing. Raises RunnerError at the end of input."""
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        print()
        raise RunnerError("nothing was written") from None


def _yes(question: str) -> bool:
    return _ask(question, "no").lower() in ("y", "yes")


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)
