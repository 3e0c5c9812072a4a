"""A plan in its JSON form (`runner.plan.render.plan_json`) as people read it. Imports the standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from runner.cli.text import format_bytes

_SIGNS: Final = {
    "start": "+", "open": "+", "replace": "±", "move": "±", "update": "~", "rename": "~", "stop": "-", "close": "-",
}  # fmt: skip
_CHANGES: Final = {"added": "+", "changed": "~", "removed": "-"}


def render_plan(plan: dict[str, Any], *, diff: bool = False) -> str:
    """All of it; with `diff` every field that differs too."""
    return "\n".join(_lines(plan, diff=diff))


def _lines(plan: dict[str, Any], *, diff: bool) -> Iterator[str]:
    actions, unchanged = plan["actions"], len(plan["unchanged"])
    if not actions:
        yield f"{plan['name']}: nothing to do, {unchanged} unchanged ({_against(plan['against'])})."
    else:
        yield f"{plan['name']}: {len(actions)} to do, {unchanged} unchanged ({_against(plan['against'])})."
    if plan.get("drift"):
        yield f"  Drift, by the admin API: {', '.join(plan['drift'])}. `mlx-run adopt` writes it into the manifest."
    columns = [(f"{_SIGNS[a['action']]} {a['target']}", a["action"], _cost(a), a["reason"]) for a in actions]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)][:-1]
    for action, column in zip(actions, columns, strict=True):
        yield "  " + "  ".join([*(f"{text:<{width}}" for text, width in zip(column, widths, strict=False)), column[-1]])
        if "wait" in action:
            held = f"{action['wait']['hold_seconds']:g} s"
            yield f"      its requests wait meanwhile; one that has waited {held} gets 503 with Retry-After"
        if diff:
            yield from (f"      {render_change(change)}" for change in action["changes"])
    for download in plan["downloads"]:
        size = "size unknown" if download["bytes"] is None else format_bytes(download["bytes"])
        yield f"Download: {download['repo']} ({download['revision']}), {size}, for {', '.join(download['targets'])}."
    yield from _memory(plan["memory"], complete=not plan["downloads"])


def _against(against: dict[str, Any]) -> str:
    return {
        "runner": f"against what runs, generation {against['generation']}",
        "generation": f"no runner is up: against what was live last, generation {against['generation']}",
        "nothing": "nothing is deployed",
    }[against["what"]]


def _cost(action: dict[str, Any]) -> str:
    cost: str = action["disruption"]
    extra = action.get("surge_bytes", action["memory_delta_bytes"])
    if extra > 0:
        cost += f" +{format_bytes(extra)}"
    if action.get("first"):
        cost += ", first"
    return cost


def render_change(change: dict[str, Any]) -> str:
    """One field (`runner.plan.render.change_json`) in a line."""
    sign, path = _CHANGES[change["change"]], change["path"]
    if change.get("secret"):
        return f"{sign} {path}: (secret, {change['change']})"
    old, new = (_value(change[side], change.get("unit", "")) for side in ("old", "new"))
    return f"{sign} {path}: " + {"added": new, "removed": old, "changed": f"{old} → {new}"}[change["change"]]


def _value(value: Any, unit: str) -> str:
    if unit == "bytes" and value is not None:
        return format_bytes(value)
    if isinstance(value, str) and re.fullmatch(r"[^\s\"'\[\]{},]+", value) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False)


def _memory(memory: dict[str, Any], *, complete: bool) -> Iterator[str]:
    before, after, peak = memory["before_bytes"], memory["after_bytes"], memory["peak_bytes"]
    if before == after == peak:
        return
    text = f"Memory: {format_bytes(before)} → {format_bytes(after)}"
    if memory["most_bytes"] > after:
        text += f" ({format_bytes(memory['most_bytes'])} at its busiest)"
    if peak > max(before, after):
        text += f", {format_bytes(peak)} while old and new overlap"
    text += f"; {format_bytes(memory['limit_bytes'])} may be used"
    yield text + ("." if complete else ", and what is to be downloaded comes on top.")
