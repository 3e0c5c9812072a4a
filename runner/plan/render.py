"""A plan as plain data, for the control socket, the generation file and `--json` (`schemas/plan.schema.json`).

The value of a secret is not in it: of a field that holds one it says only that it changed.
"""

from __future__ import annotations

from typing import Any, Final

from runner.plan.actions import (
    Action,
    Bounds,
    CloseListener,
    Disruption,
    MoveListener,
    OpenListener,
    Plan,
    RenameModel,
    ReplaceModel,
    StartModel,
    StopModel,
    UpdateListener,
    UpdateModel,
)
from runner.plan.changes import Change
from runner.plan.forecast import footprint

FORMAT_VERSION: Final = 1

VERBS: Final[dict[type[Action], str]] = {
    StartModel: "start",
    ReplaceModel: "replace",
    UpdateModel: "update",
    RenameModel: "rename",
    StopModel: "stop",
    OpenListener: "open",
    MoveListener: "move",
    UpdateListener: "update",
    CloseListener: "close",
}


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data. `version` changes when a reader would have to; sizes are bytes, times seconds."""
    return {
        "version": FORMAT_VERSION,
        "name": plan.name,
        "against": {"what": plan.against.what, "generation": plan.against.generation},
        "drift": list(plan.drift),
        "actions": [_action_json(action, plan.bounds) for action in plan.actions],
        "unchanged": list(plan.unchanged),
        "downloads": [
            {"repo": d.repo, "revision": d.revision, "bytes": d.bytes_left, "targets": list(d.targets)}
            for d in plan.downloads
        ],
        "memory": {
            "before_bytes": plan.memory.before,
            "after_bytes": plan.memory.after,
            "peak_bytes": plan.memory.peak,
            "most_bytes": plan.memory.most,
            "limit_bytes": plan.memory.limit,
        },
    }


def _action_json(action: Action, bounds: Bounds) -> dict[str, Any]:
    data: dict[str, Any] = {
        "action": VERBS[type(action)],
        "target": action.target,
        "reason": action.reason,
        "disruption": str(action.disruption),
        "memory_delta_bytes": action.memory_delta,
        "changes": [change_json(change) for change in action.changes],
    }
    if isinstance(action, RenameModel):
        data["from"] = f"models.{action.old.name}"
    if isinstance(action, ReplaceModel) and action.disruption is Disruption.SURGE:
        data["surge_bytes"] = footprint(action.spec)
    if isinstance(action, ReplaceModel) and action.disruption is Disruption.DRAIN:
        data["wait"] = {"drain_seconds": bounds.drain, "hold_seconds": bounds.hold}
    if isinstance(action, StopModel):
        data["first"] = action.first
    if isinstance(action, UpdateModel):
        data["adapters_loaded"] = [a.name for a in action.load]
        data["adapters_dropped"] = [a.name for a in action.drop]
    return data


def change_json(change: Change) -> dict[str, Any]:
    """One field as plain data."""
    data: dict[str, Any] = {"path": change.path, "change": change.change}
    if change.secret:
        return {**data, "secret": True}
    data |= {"old": change.old, "new": change.new}
    return {**data, "unit": change.unit} if change.unit else data
