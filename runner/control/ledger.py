"""What the reconciler knows of generations: which one is current, what it writes of a pass, and how an old one comes
back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from runner.control.compiled import Compiled
from runner.control.generations import BadGeneration, Body, Generation, Generations, shown_actions
from runner.control.seal import Sealer, available
from runner.control.state_folder import StateFolder
from runner.errors import RunnerError, StaleGeneration
from runner.plan.actions import Plan
from runner.plan.render import plan_json
from runner.plan.spec import Desired
from runner.plan.stored import NotReadable, SealedAway, from_stored, key_sources, stored_digest, stored_form, to_compare
from runner.plan.tls import BadCertificate, with_present_certificates

logger = logging.getLogger(__name__)

Via = Literal["start", "watch", "apply", "rollback", "api"]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why there is a pass. `generation`, where it is given, has to be the current one."""

    via: Via
    user: str
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """What a pass is about to make so. `restores` is the generation that a rollback goes back to, else 0."""

    desired: Desired
    plan: Plan
    cause: Cause
    manifest: tuple[str, ...]
    seen: str
    restores: int = 0


class Ledger:
    """The generations of the runner that owns `folder`."""

    def __init__(self, folder: StateFolder) -> None:
        self._generations = Generations(folder.generations, _log_damage)
        self._seal = Sealer(folder.seal_key, create=True)
        self.current: Generation | None = self._generations.current()
        self._kept: tuple[Intent, Generation | None] | None = None

    @property
    def number(self) -> int:
        """The current generation's, 0 before the first."""
        return self.current.number if self.current else 0

    def require(self, generation: int | None) -> None:
        """Raises StaleGeneration where a request was made for another generation than the current one."""
        if generation is None or generation == self.number:
            return
        current = self.current
        since = f" (by {current.user}, {current.via})" if current else ""
        raise StaleGeneration(
            f"generation {self.number} is current{since}, and this was made for generation {generation}",
            hint="Look at what changed (`mlx-run history`, `mlx-run plan`), and apply again.",
        )

    def seen(self, compiled: Compiled) -> str:
        """Stands for a manifest's content and all that it came to, secrets included; equal where nothing was edited."""
        came_to = self.digest(compiled.desired) if compiled.desired is not None else ""
        return self._seal(f"{sorted(compiled.inputs.files.items())} {came_to}")

    def digest(self, desired: Desired) -> str:
        """The desired state's, as in `Generation.digest`."""
        return stored_digest(stored_form(desired, self._seal))

    def holds(self, seen: str) -> bool:
        """Whether a rollback is in effect that a manifest which was not edited since does not undo."""
        return self.current is not None and self.current.restores != 0 and self.current.seen == seen

    def drift(self, seen: str) -> str:
        """How what is live differs from the manifest on purpose; empty where it does not."""
        current = self.current
        if current is None or not self.holds(seen):
            return ""
        return f"rolled back to {current.restores}; the manifest was last applied as {current.manifest_generation}"

    def status(self) -> dict[str, Any]:
        """The current generation's part of `mlx-run status`."""
        current = self.current
        return {
            "generation": self.number,
            "digest": current.digest if current else "",
            "applied_at": current.time if current else None,
            "applied_by": current.user if current else "",
            "applied_via": current.via if current else "",
            "restores": current.restores if current else 0,
        }

    # ------------------------------------------------------------- keeping

    def keep(self, intent: Intent, seconds: float) -> None:
        """Write the generation that goes live now, unless it is the current one. Raises RunnerError."""
        spec = stored_form(intent.desired, self._seal)
        digest = stored_digest(spec)
        current = self.current
        if current is not None and current.digest == digest and not intent.restores and not current.restores:
            return
        header = self._header(intent, digest, seconds)
        self._write(header, {"plan": plan_json(intent.plan), "spec": spec})
        self._kept = (intent, current)
        self.current = header

    def keep_failed(self, intent: Intent, seconds: float, error: str) -> None:
        """Write what was tried in vain; the same again is one entry. A generation that cannot be written is logged."""
        spec = stored_form(intent.desired, self._seal)
        number = None
        if self._kept is not None and self._kept[0] is intent:  # it failed when it was written and about to go live
            number, self.current = self.number, self._kept[1]
        header = self._header(intent, stored_digest(spec), seconds)._replace(error=error)
        latest = self._generations.find(header.number - 1)
        if latest is not None and not latest.ok and latest.digest == header.digest and latest.via == header.via:
            header = header._replace(number=latest.number, attempts=latest.attempts + 1)
        if number is not None:
            header = header._replace(number=number)
        try:
            self._write(header, {"plan": plan_json(intent.plan), "spec": spec})
        except RunnerError as problem:
            logger.warning("a failed generation was not kept", extra={"reason": str(problem)})

    def _header(self, intent: Intent, digest: str, seconds: float) -> Generation:
        actions = tuple(shown_actions(plan_json(intent.plan)))
        current = self.current
        from_manifest = (current.manifest_generation or current.number) if current and intent.restores else 0
        return Generation(
            number=max(self._generations.next_number(), self.number + 1),
            time=round(time.time(), 3),
            digest=digest,
            via=intent.cause.via,
            user=intent.cause.user,
            manifest=intent.manifest,
            seen=intent.seen,
            seconds=round(seconds, 3),
            actions=actions,
            action_count=len(actions),
            restores=intent.restores,
            manifest_generation=from_manifest,
        )

    def _write(self, header: Generation, body: Body) -> None:
        try:
            self._generations.write(header, body)
        except OSError as error:
            raise RunnerError(
                f"generation {header.number} cannot be kept in {self._generations.folder}: {error.strerror}",
                hint="Nothing was changed. Make room, or mend the folder, and apply again.",
            ) from None

    # ------------------------------------------------------------- going back

    def target(self, number: int | None) -> Generation:
        """The generation that a rollback means: of that number, or the one before the current. Raises RunnerError."""
        if self.current is None:
            raise RunnerError("nothing was applied yet, so there is nothing to go back to")
        if number is None:
            before = self._generations.before(self.number)
            if before is None:
                raise RunnerError(f"there is no generation before {self.number}, the current one")
            return before
        found = self._generations.find(number)
        if found is None:
            raise unknown(number, self._generations.all())
        if number == self.number:
            raise RunnerError(f"generation {number} is the current one")
        return found

    def recall(self, number: int, known: Iterable[str]) -> Desired:
        """The desired state of a generation. Its secrets are taken from `known`, or from where they came from.

        Certificates are those of now. Raises RunnerError where a secret is gone or another, where a certificate
        cannot be used any more, and where the generation cannot be read.
        """
        try:
            spec: dict[str, Any] = self._generations.body(number)["spec"]
            desired = from_stored(spec, self._seal, [*known, *available(key_sources(spec))])
            return replace(desired, listeners=with_present_certificates(desired.listeners))
        except BadCertificate as error:
            raise RunnerError(
                f"generation {number} needs a certificate that {error.message}", hint=error.hint
            ) from None
        except (BadGeneration, NotReadable, KeyError) as error:
            raise RunnerError(f"generation {number} cannot be read: {error}") from None
        except SealedAway as error:
            gone = "; ".join(f"servers.{name}: {_describe_source(source)}" for name, source in error.missing)
            raise RunnerError(
                f"generation {number} needs API keys that are gone or were changed: {gone}",
                hint="Keys are never stored. Put the old key back where it was, or apply a manifest with the new one.",
            ) from None


def unknown(number: int, existing: Iterable[Generation]) -> RunnerError:
    """The error for a generation that is not there."""
    numbers = ", ".join(str(header.number) for header in existing) or "none"
    return RunnerError(f"there is no generation {number}", hint=f"There are: {numbers}.")


def kept_spec(generations: Generations, number: int) -> Desired | None:
    """The desired state of a generation, to be compared only: a secret is its seal, which tells nothing. None where it
    cannot be read."""
    try:
        return to_compare(generations.body(number)["spec"], str, ())
    except (BadGeneration, NotReadable, KeyError):
        return None


def load_committed(folder: StateFolder, known: Iterable[str]) -> tuple[Generation, Desired] | None:
    """The current generation and its desired state, to compare a manifest with while no runner is up; None before the
    first, or where it cannot be read.

    `known` are the API keys of that manifest: a kept key that equals none of them is another text. Nothing is written.
    """
    generations = Generations(folder.generations, _log_damage)
    current = generations.current()
    if current is None:
        return None
    try:
        spec = generations.body(current.number)["spec"]
        return current, to_compare(spec, Sealer(folder.seal_key, create=False), known)
    except (BadGeneration, NotReadable, KeyError):
        return None


def _describe_source(source: str) -> str:
    kind, _, name = source.partition(":")
    return {"file": f"the file {name}", "variable": f"the variable {name}"}.get(kind, "a key written in the manifest")


def _log_damage(path: Path, reason: str) -> None:
    logger.warning("a generation is passed over", extra={"file": str(path), "reason": reason})
