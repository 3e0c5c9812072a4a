"""A plan as plain data, for the control socket, the generation file and `--json`.

Secrets are not in it: actions carry targets and reasons, and reasons name fields, not values.
"""

from __future__ import annotations

from typing import Any, Final

from runner.plan.actions import Action, Plan, ReplaceModel, UpdateModel

FORMAT_VERSION: Final = 1

_VERBS: Final = {
    "StartModel": "start",
    "ReplaceModel": "replace",
    "UpdateModel": "update",
    "StopModel": "stop",
    "OpenListener": "open",
    "MoveListener": "move",
    "UpdateListener": "update",
    "CloseListener": "close",
}


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data. `version` changes when a reader would have to."""
    return {
        "version": FORMAT_VERSION,
        "name": plan.name,
        "actions": [_action_json(action) for action in plan.actions],
        "unchanged": list(plan.unchanged),
        "weights_before_bytes": plan.weights_before,
        "weights_after_bytes": plan.weights_after,
    }


def _action_json(action: Action) -> dict[str, Any]:
    data: dict[str, Any] = {
        "action": _VERBS[type(action).__name__],
        "target": action.target,
        "reason": action.reason,
        "disruption": str(action.disruption),
        "memory_delta_bytes": action.memory_delta,
    }
    if isinstance(action, ReplaceModel):
        data["surge_bytes"] = action.spec.weights_bytes
    if isinstance(action, UpdateModel):
        data["adapters_loaded"] = [a.name for a in action.load]
        data["adapters_dropped"] = [a.name for a in action.drop]
    return data
