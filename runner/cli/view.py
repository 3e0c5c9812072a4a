"""What a person sees while a manifest takes effect: a line for each thing that happened, and what still loads."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runner.cli.plan_text import render_plan
from runner.cli.text import format_bytes

if TYPE_CHECKING:
    from rich.status import Status


class View:
    """Shows events (`runner.control.events`) as they come. On a terminal, a spinner names what is being loaded."""

    def __init__(self, manifests: Sequence[Path], began: float, *, watch: bool = True) -> None:
        """`began` is when the command did, by `time.monotonic`; `watch` is whether edits are followed from now on."""
        self._manifests = manifests
        self._watch = watch
        self._began = began
        self._loading: list[str] = []
        self._coming: dict[str, str] = {}
        self._spinner: Status | None = None
        self._settled = False

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_spinner()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event; those that mean nothing to a person are passed over."""
        method = getattr(self, f"_on_{event.get('event', '')}", None)
        if method is not None:
            method(event)

    def summary(self, name: str) -> None:
        """The last line of a command that leaves a runner behind."""
        print(f"`mlx-run status {name}` shows it, `mlx-run down {name}` stops it.")

    def _print(self, text: str) -> None:
        if self._spinner is not None:
            self._spinner.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    # ------------------------------------------------------------- one method an event

    def _on_planned(self, event: dict[str, Any]) -> None:
        self._print(render_plan(event["plan"]))

    def _on_held(self, event: dict[str, Any]) -> None:
        self._print(
            f"The manifest was not edited since the rollback to generation {event['restores']}, which goes on. "
            "It goes live with its next edit, or with `mlx-run apply` while this runs."
        )

    def _on_unchanged(self, event: dict[str, Any]) -> None:
        self._print("Nothing to do: what runs is what the manifest says.")

    def _on_warned(self, event: dict[str, Any]) -> None:
        for warning in event["warnings"]:
            self._print(f"warning: {warning}")

    def _on_left_out(self, event: dict[str, Any]) -> None:
        self._print(f"Left out by {event['scope']}: {', '.join(event['actions'])}. An apply without it does that too.")

    def _on_listening(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: {event['address']}")

    def _on_downloading(self, event: dict[str, Any]) -> None:
        self._print(f"{event['repo']}: downloading {event['revision']} into the hub's cache")
        self._coming[event["repo"]] = ""
        self._update_spinner()

    def _on_download_progress(self, event: dict[str, Any]) -> None:
        done, total = event["done_bytes"], event["total_bytes"]
        self._coming[event["repo"]] = f" {format_bytes(done)} of {format_bytes(total)}"
        self._update_spinner()

    def _on_downloaded(self, event: dict[str, Any]) -> None:
        self._coming.pop(event["repo"], None)
        self._print(f"{event['repo']}: {format_bytes(event['bytes'])} are here, commit {event['commit'][:12]}")
        self._update_spinner()

    def _on_converting(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: quantising, {event['percent']} %")

    def _on_action_started(self, event: dict[str, Any]) -> None:
        if event["action"] in ("start", "replace", "update", "rename"):
            self._loading.append(event["target"])
            self._update_spinner()

    def _on_action_done(self, event: dict[str, Any]) -> None:
        if event["target"] in self._loading:
            self._loading.remove(event["target"])
        if event["action"] in ("start", "replace"):  # the others go by too quickly to tell
            self._print(f"{event['target']}: ready in {event['seconds']:.2f} s")
        self._update_spinner()

    def _on_applied(self, event: dict[str, Any]) -> None:
        self._stop_spinner()
        if event.get("restores"):
            self._print(
                f"Rolled back to generation {event['restores']}; it is live as generation {event['generation']}. "
                "The manifest goes live again with its next edit, or with `mlx-run apply`."
            )
        elif self._settled:
            self._print(f"Generation {event['generation']} is live.")
        else:
            self._settled = True
            files = " and ".join(path.name for path in self._manifests)
            later = (
                f"Edits of {files} go live as you save" if self._watch else "Edits wait for the next `mlx-run apply`"
            )
            self._print(
                f"Ready after {time.monotonic() - self._began:.2f} s (generation {event['generation']}). "
                f"{later}; `mlx-run chat` talks to it."
            )

    def _on_apply_failed(self, event: dict[str, Any]) -> None:
        self._stop_spinner()
        self._loading.clear()
        self._coming.clear()
        if self._settled:
            self._print(f"The edit is not in effect, what ran goes on:\n{event['error']}")

    def _on_engine_died(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: the engine (pid {event['pid']}) ended unexpectedly; starting it again")

    def _on_memory_short(self, event: dict[str, Any]) -> None:
        needed, left = format_bytes(event["needed"]), format_bytes(event["available"])
        self._print(f"warning: {event['target']} needs {needed}, and the machine has {left} left now")

    def _on_loaded(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: loaded in {event['seconds']:.2f} s")

    def _on_unloaded(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: unloaded ({event['reason']})")

    def _on_load_failed(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: could not be loaded: {event['error']}")

    def _on_engine_out_of_memory(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: {event['reason']}")

    def _on_engine_restarted(self, event: dict[str, Any]) -> None:
        self._print(f"{event['target']}: back, pid {event['pid']}")

    def _on_stopping(self, event: dict[str, Any]) -> None:
        self._stop_spinner()
        self._print(f"Draining for at most {event['drain_seconds']:.0f} s; Ctrl-C again stops at once.")

    def _on_stopped(self, event: dict[str, Any]) -> None:
        self._print("Stopped.")

    def _on_stopping_now(self, event: dict[str, Any]) -> None:
        self._print("Stopping now.")

    # ------------------------------------------------------------- spinner

    def _update_spinner(self) -> None:
        if not self._loading and not self._coming:
            self._stop_spinner()
            return
        if not sys.stdout.isatty():
            return
        doing = [f"loading {', '.join(self._loading)}"] if self._loading else []
        doing += [f"downloading {repo}{share}" for repo, share in self._coming.items()]
        text = ", ".join(doing)
        if self._spinner is None:
            # Imported here: by now the listeners are open, so nobody waits for it.
            from rich.console import Console  # noqa: PLC0415
            from rich.status import Status  # noqa: PLC0415

            self._spinner = Status(text, console=Console())
            self._spinner.start()
        else:
            self._spinner.update(text)

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
