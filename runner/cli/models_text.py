"""Models and adapters as people read them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from runner.cli.text import format_age, format_bytes, table
from runner.plan.available import Available
from runner.plan.verdict import Found, Verdict


def listing(found: Sequence[Available], cache: Path) -> str:
    """A line for each."""
    if not found:
        return f"There are no models in {cache}. `mlx-run pull ORG/NAME` brings one."
    rows = [("SOURCE", "KIND", "ARCHITECTURE", "PARAMETERS", "QUANTISATION", "SIZE", "LAST USED", "USED BY")]
    for one in found:
        name = one.source if not one.commit else f"{one.source}@{', '.join(one.refs) or one.commit[:12]}"
        used_by = "; ".join(one.used_by) or (f"({one.problem})" if one.problem else "")
        rows.append(
            (
                name,
                one.kind,
                one.architecture,
                _count(one.parameters),
                one.quantization,
                format_bytes(one.size),
                _ago(one.used),
                used_by,
            )
        )
    return "\n".join(line.rstrip() for line in table(rows).splitlines())


def card(one: Available, judgement: Verdict | None) -> str:
    """Everything that is known of one."""
    lines = [
        ("folder", str(one.folder)),
        ("commit", f"{one.commit} ({', '.join(one.refs)})" if one.refs else one.commit),
        ("kind", one.kind),
        ("architecture", one.architecture),
        ("parameters", _count(one.parameters)),
        ("quantisation", one.quantization),
        ("context", f"{one.max_context} tokens" if one.max_context else ""),
        ("size", format_bytes(one.size)),
        ("last used", _ago(one.used)),
        ("used by", "; ".join(one.used_by)),
        ("here", f"{judgement.why} ({format_bytes(judgement.needed)} of weights)" if judgement else ""),
        ("problem", one.problem),
    ]
    shown = [(f"  {name}", value) for name, value in lines if value]
    return "\n".join([one.source, table(shown)])


def matches(found: Sequence[Found]) -> str:
    """A line for each repository that a search found."""
    rows = [("REPOSITORY", "WEIGHTS", "DOWNLOADS", "ON THIS MACHINE")]
    for match, judgement, here in found:
        size = format_bytes(judgement.needed) if judgement.needed else ""
        notes = [judgement.why if judgement.fits else f"no: {judgement.why}"]
        notes += ["in the cache"] if here else []
        notes += ["gated"] if match.gated else []
        rows.append((match.repo, size, str(match.downloads), ", ".join(notes)))
    return table(rows)


def _count(parameters: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters) if parameters else ""


def _ago(when: float) -> str:
    return f"{format_age(time.time() - when)} ago" if when else ""
