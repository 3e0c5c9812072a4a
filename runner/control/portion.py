"""How much of the manifest is to be live: `apply --target` and `--prune=false` hold until an apply without them."""

from __future__ import annotations

from runner.control.compiled import Compiled
from runner.plan.planner import Observed, plan
from runner.plan.render import VERBS
from runner.plan.scope import Scope, require_targets, within
from runner.plan.spec import Desired, Download


class Portion:
    """`left_out` says what an apply of the whole manifest would do, in words, and is empty where that is nothing."""

    def __init__(self, scope: Scope | None = None) -> None:
        self.scope = scope or Scope()
        self.left_out: tuple[str, ...] = ()

    def of(self, whole: Desired, observed: Observed, *, strict: bool = False) -> Desired:
        """What of `whole` is to be live. `strict`: a person asks. Raises RunnerError where it cannot be had."""
        if strict:
            require_targets(self.scope, whole, observed)
        return within(self.scope, whole, observed)

    def missing(self, compiled: Compiled, observed: Observed) -> tuple[Download, ...]:
        """What has to be downloaded first. Raises RunnerError as `of` does."""
        if compiled.provisional is None:
            return ()
        return within(self.scope, compiled.provisional, observed).downloads

    def settle(self, whole: Desired, observed: Observed) -> None:
        """See what is left out, now that the rest is live. Where that is nothing, nothing is held back later either."""
        actions = () if self.scope.whole else plan(whole, observed).actions
        self.left_out = tuple(f"{VERBS[type(action)]} {action.target}" for action in actions)
        if not self.left_out:
            self.scope = Scope()

    def drift(self) -> str:
        """How what is live differs from the manifest on purpose; empty where it does not."""
        return f"{self.scope} left out: {', '.join(self.left_out)}" if self.left_out else ""
