"""Asks the hub through its own library, with patience, and says in plain words what went wrong."""

from __future__ import annotations

import email.utils
import random
import re
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, TypeVar

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_token, hf_raise_for_status

from runner.hub.jobs import Failure, Job, Patience

T = TypeVar("T")

PASSING_STATUSES: Final = (408, 425, 429, 500, 502, 503, 504)
"""Of answers that may be others the next time."""

NETWORK_ERRORS: Final = (import_module(type(get_session()).__module__.partition(".")[0]).TransportError,)
"""Of the HTTP library that the hub's uses (httpx or httpx2, by its version)."""


class Failed(Exception):  # noqa: N818 - a condition
    """A job came to nothing."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Client:
    """One per process; threads share it. `token` is empty for the one that the library finds by itself."""

    def __init__(self, token: str, patience: Patience, sleep: Callable[[float], None] = time.sleep) -> None:
        self.token = token or None
        self.api = HfApi(token=self.token, library_name="mlx-run")
        self.has_token = bool(token or get_token())
        self._patience = patience
        self._sleep = sleep

    def headers(self) -> dict[str, str]:
        """Of a request for a file's content, which has to come as it is."""
        headers: dict[str, str] = build_hf_headers(token=self.token, library_name="mlx-run")
        return {**headers, "Accept-Encoding": "identity"}

    def patiently(self, job: Job, work: Callable[[], T], progressed: Callable[[], bool] = lambda: False) -> T:
        """`work()`, tried again while what it raises may pass. Tries count anew once `progressed`. Raises Failed."""
        tried = 0
        while True:
            try:
                return work()
            except (HfHubHTTPError, *NETWORK_ERRORS) as error:
                tried = 1 if progressed() else tried + 1
                pause = self._patience.pause(tried, _retry_after(error)) if _may_pass(error) else None
                if pause is None:
                    raise Failed(self.explain(job, error, tried)) from error
                self._sleep(pause * random.uniform(1.0, 1.1))  # clients that were refused together come apart

    def explain(self, job: Job, error: Exception, tried: int = 1) -> Failure:
        """What an error of the library means for a job."""
        code, message, hint = self._explain(job, error, tried)
        return Failure(job.repo, job.revision, code, f"{job} cannot be had: {message}", hint, _may_pass(error))

    def _explain(self, job: Job, error: Exception, tried: int) -> tuple[str, str, str]:
        page = f"{self.api.endpoint}/{job.repo}"
        log_in = "" if self.has_token else "; set HF_TOKEN, in the environment or an env_file of the manifest"
        match error:
            case GatedRepoError():
                hint = (
                    "with the account of HF_TOKEN" if self.has_token else "and set HF_TOKEN to a token of that account"
                )
                return "E802", "it is gated", f"accept its terms at {page} {hint}"
            case RevisionNotFoundError():
                return (
                    "E803",
                    f"it has no revision {job.revision!r}",
                    f"its branches and commits are at {page}/tree/main",
                )
            case EntryNotFoundError():
                return "E803", "it lacks a file that it lists", "its owner may be changing it: try again"
            case RepositoryNotFoundError():
                why = "the hub has no such repository, or does not show it" + (
                    "" if self.has_token else " without a token"
                )
                return "E803", why, f"check the name{log_in}; a folder is written with ./ before it"
            case HFValidationError():
                return "E803", str(error).splitlines()[0], "a repository is org/name"
            case HfHubHTTPError():
                return self._by_status(error.response.status_code, tried, log_in)
            case _:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                what = f"the hub at {self.api.endpoint} cannot be reached ({said})"
                return "E804", what + _times(tried), "check the network and HF_ENDPOINT; what is there already is kept"

    def _by_status(self, status: int, tried: int, log_in: str) -> tuple[str, str, str]:
        if status in (401, 403):
            whose = "the token is not let in" if self.has_token else "it takes a token"
            return "E802", f"{whose} (HTTP {status})", f"check that HF_TOKEN may read it{log_in}"
        if status == 429:
            what = "the hub says that these are too many requests (HTTP 429)"
            return "E804", what + _times(tried), f"wait some minutes{log_in}; what is there already is kept"
        hint = "try again later; what is there already is kept"
        return "E804", f"the hub answers with HTTP {status}" + _times(tried), hint


def check(response: Any) -> None:
    """Raises the library's error for an answer that is none of success."""
    hf_raise_for_status(response)


def _times(tried: int) -> str:
    return f", {tried} times" if tried > 1 else ""


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUSES
    return isinstance(error, NETWORK_ERRORS)


def _retry_after(error: Exception) -> float | None:
    """Seconds that the hub asks to wait for; None where it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    # The hub's own (draft-ietf-httpapi-ratelimit-headers): `"api";r=0;t=55`, seconds until there is room again.
    if not text and (match := re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))) is not None:
        return float(match[1])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
