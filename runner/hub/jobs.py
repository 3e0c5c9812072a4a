"""What passes between a process that fetches from the hub and whoever started it: one JSON object in, a line of JSON
for each thing that happens out."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

Kind = Literal["model", "adapter"]
KINDS: Final[tuple[Kind, ...]] = ("model", "adapter")


class Job(NamedTuple):
    """A repository at a revision. `kinds` say what it is to serve as, nothing: whatever it is.

    `verify`: read what is in the cache already, too, and fetch again what is not as the hub says. `code`: its Python
    files as well.
    """

    repo: str
    revision: str
    kinds: tuple[Kind, ...] = ()
    verify: bool = False
    code: bool = False

    def __str__(self) -> str:
        return f"{self.repo} ({self.revision})" if self.revision else self.repo


class Failure(NamedTuple):
    """Why a job came to nothing: a code of `runner.manifest.codes`, what happened, and what to do about it.

    `passing`: trying again later may help.
    """

    repo: str
    revision: str
    code: str
    message: str
    hint: str = ""
    passing: bool = False


class Patience(NamedTuple):
    """How often something is tried that may work the next time, and how many seconds lie between: `first`, twice that,
    and so on up to `longest`. A hub that asks for more than `asked` seconds is not waited for."""

    tries: int = 6
    first: float = 1.0
    longest: float = 30.0
    asked: float = 120.0

    def pause(self, tried: int, retry_after: float | None) -> float | None:
        """Seconds until the next try after `tried` of them; None: no more tries. `retry_after` is what the hub asks."""
        if tried >= self.tries or (retry_after or 0.0) > self.asked:
            return None
        return min(self.first * 2 ** (tried - 1), self.longest) if retry_after is None else retry_after


class File(NamedTuple):
    """One file of a repository. `digest` is `sha256:HEX`, or `git:HEX` (the blob's id) of what is not in LFS: in either
    case the hex digits are the name of its blob in the cache. `size` is bytes."""

    name: str
    size: int
    digest: str

    @property
    def blob(self) -> str:
        """Its name in the cache's `blobs` folder."""
        return self.digest.partition(":")[2]


class Listing(NamedTuple):
    """The commit that a revision means, what the repository is to serve as, and the files that this takes."""

    commit: str
    kinds: tuple[Kind, ...]
    files: list[File]


def request(jobs: list[Job], token: str, patience: Patience) -> dict[str, Any]:
    """As the process gets it."""
    return {"jobs": [job._asdict() for job in jobs], "token": token, "patience": patience._asdict()}


def read_request(given: dict[str, Any]) -> tuple[list[Job], str, Patience]:
    """What `request` made."""
    jobs = [Job(**{**job, "kinds": tuple(job["kinds"])}) for job in given["jobs"]]
    return jobs, given["token"], Patience(**given["patience"])
