"""What is said of a plan's actions while they are carried out."""

from __future__ import annotations

from runner.control.live import Live
from runner.plan.actions import Action
from runner.plan.render import VERBS


class Progress:
    """Tells the events of `live` of each action."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._told: set[tuple[str, str]] = set()

    def began(self, action: Action) -> None:
        """Said before the work of an action begins."""
        self._live.emit("action_started", action=VERBS[type(action)], target=action.target, reason=action.reason)

    def done(self, action: Action, seconds: float = 0.0) -> None:
        """Said once of each action, when it is done: of those that can be undone until the commit, then."""
        verb = VERBS[type(action)]
        if (verb, action.target) not in self._told:
            self._told.add((verb, action.target))
            self._live.emit(
                "action_done",
                action=verb,
                target=action.target,
                disruption=str(action.disruption),
                seconds=round(seconds, 3),
            )
