"""What a person, or a program, sees of downloads."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runner.cli.result import print_line
from runner.cli.text import format_bytes
from runner.hub.download import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class PullView:
    """On a terminal a bar for each repository, else a line at its start and at its end; lines of JSON with `json`."""

    def __init__(self, *, json: bool) -> None:
        self._json = json
        self._bars: Bars | None = None
        self._tasks: dict[tuple[str, str], TaskID | None] = {}
        self._began = time.monotonic()

    def __enter__(self) -> PullView:
        if not self._json and sys.stdout.isatty():
            # Imported here: rich takes 60 ms, which a script that pulls need not wait for.
            from rich import progress  # noqa: PLC0415

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(binary_units=True),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._json and value is None:
            seconds = round(time.monotonic() - self._began, 3)
            print_line({"event": "result", "time": round(time.time(), 3), "ok": True, "seconds": seconds})

    def told(self, progress: Progress) -> None:
        """Show how far a repository has come."""
        if self._json:
            print_line(_event(progress))
        elif self._bars is not None:
            self._show_bar(self._bars, progress)
        elif progress.whole:
            print(_here(progress), flush=True)
        elif (progress.repo, progress.revision) not in self._tasks:
            self._tasks[progress.repo, progress.revision] = None
            left = progress.total - progress.done
            size = f"{format_bytes(left)} of {format_bytes(progress.total)} to come" if left else "all here"
            print(f"{progress.repo} ({progress.revision}): {size}", flush=True)

    def _show_bar(self, bars: Bars, progress: Progress) -> None:
        key = (progress.repo, progress.revision)
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = bars.add_task(progress.repo, total=progress.total)
        bars.update(task, completed=progress.done, total=progress.total)
        if progress.whole:
            bars.console.print(_here(progress), markup=False, highlight=False, soft_wrap=True)


def _here(progress: Progress) -> str:
    return f"{progress.repo} ({progress.revision}): here, commit {progress.commit}"


def _event(progress: Progress) -> dict[str, Any]:
    about = {"repo": progress.repo, "revision": progress.revision}
    if progress.whole:
        return {"event": "downloaded", **about, "commit": progress.commit, "bytes": progress.total}
    return {"event": "download_progress", **about, "done_bytes": progress.done, "total_bytes": progress.total}
