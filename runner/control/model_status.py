"""What `mlx-run status` says of a model."""

from __future__ import annotations

from typing import Any

from runner.control.deployment import Deployment
from runner.control.health import Health


def status_of(deployment: Deployment) -> dict[str, Any]:
    """What `mlx-run status` shows, as plain data. Times are seconds since the epoch, sizes bytes."""
    engine = deployment.engine or deployment.starting.engine
    loaded, stats = (engine.loaded, engine.stats) if engine else (None, None)
    return {
        "name": deployment.name,
        "state": deployment.state,
        "on_demand": deployment.rests,
        "loaded": deployment.loaded,
        "stage": engine.stage if engine else deployment.starting.stage,
        "source": deployment.spec.source,
        "digest": deployment.spec.weights_digest,
        "aliases": list(deployment.spec.aliases),
        "adapters": [{"name": a.name, "key": a.key} for a in deployment.spec.adapters],
        "draft": deployment.spec.draft.source if deployment.spec.draft else None,
        "drafted_tokens": stats.drafted_tokens_total if stats else 0,
        "accepted_tokens": stats.accepted_tokens_total if stats else 0,
        "default_adapter": deployment.spec.default_adapter,
        "pid": engine.pid if engine else None,
        "started_at": engine.started_at if engine else None,
        "loaded_at": engine.loaded_at if engine else None,
        "load_seconds": loaded.seconds if loaded else None,
        "device": loaded.device if loaded else "",
        "notes": loaded.notes if loaded else [],
        "weights_bytes": deployment.spec.weights_bytes,
        "active_bytes": stats.active_bytes if stats else (loaded.active_bytes if loaded else None),
        "hard_limit_bytes": engine.bounds.limit_of(engine.pid) if engine else 0,
        "rows": stats.rows if stats else 0,
        "waiting": (stats.waiting if stats else 0) + deployment.held.count,
        "in_flight": engine.connection.in_flight if engine and engine.alive else 0,
        "restarts": deployment.restarts,
        "last_error": deployment.last_error,
        "conditions": deployment.health.as_json,
    }


def absent(name: str) -> dict[str, Any]:
    """The status of a model that is wanted and has no deployment yet: the same fields, with nothing in them."""
    nothing = Health(lambda: f"models.{name}", lambda *_, **__: None, 0.0)
    return {
        **dict.fromkeys(("pid", "started_at", "loaded_at", "load_seconds", "active_bytes")),
        **dict.fromkeys(("stage", "source", "digest", "device", "last_error"), ""),
        **dict.fromkeys(("weights_bytes", "hard_limit_bytes", "rows", "waiting", "in_flight", "restarts"), 0),
        **dict.fromkeys(("drafted_tokens", "accepted_tokens"), 0),
        "aliases": [],
        "adapters": [],
        "notes": [],
        "name": name,
        "state": "pending",
        "on_demand": False,
        "loaded": False,
        "default_adapter": None,
        "draft": None,
        "conditions": nothing.as_json,
    }
