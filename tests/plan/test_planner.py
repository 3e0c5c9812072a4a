from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.plan.actions import (
    CloseListener,
    Disruption,
    MoveListener,
    OpenListener,
    Plan,
    ReplaceModel,
    StartModel,
    StopModel,
    UpdateListener,
    UpdateModel,
)
from runner.plan.planner import Observed, plan
from runner.plan.render import plan_json
from runner.plan.spec import AdapterSpec, Desired, EngineLimits, ListenerSpec, ModelSpec

GIB = 2**30


def adapter(name: str, digest: str = "d1") -> AdapterSpec:
    return AdapterSpec(name, Path("/adapters") / name, f"{name}-{digest}")


def model(name: str = "chat", weights: str = "w1", size: int = GIB, **fields: object) -> ModelSpec:
    base = ModelSpec(name, f"./{name}", Path("/models") / name, weights, size)
    return replace(base, **fields)  # type: ignore[arg-type]


def listener(name: str = "lm", port: int = 8080, **fields: object) -> ListenerSpec:
    return replace(ListenerSpec(name, "127.0.0.1", port, ("chat",)), **fields)  # type: ignore[arg-type]


def desired(*models: ModelSpec, listeners: tuple[ListenerSpec, ...] = (listener(),), limit: int = 0) -> Desired:
    return Desired("dev", models, listeners, limit)


def observed(*models: ModelSpec, listeners: tuple[ListenerSpec, ...] = (listener(),)) -> Observed:
    return Observed(models, listeners, memory_bytes=16 * GIB)


def test_from_nothing_opens_ports_before_it_starts_models() -> None:
    made = plan(desired(model()), Observed(memory_bytes=16 * GIB))
    assert [type(a) for a in made.actions] == [OpenListener, StartModel]
    assert (made.weights_before, made.weights_after) == (0, GIB)


def test_nothing_to_do_when_observed_is_desired() -> None:
    made = plan(desired(model()), observed(model()))
    assert made.empty
    assert made.unchanged == ("models.chat", "servers.lm")


def test_removed_things_stop_last() -> None:
    made = plan(desired(listeners=()), observed(model()))
    assert [type(a) for a in made.actions] == [StopModel, CloseListener]
    assert made.weights_after == 0


@pytest.mark.parametrize(
    ("old", "new", "load", "drop", "reason"),
    [
        ([], ["pirate-1"], ["pirate"], [], "adapter pirate added"),
        (["pirate-1"], [], [], ["pirate"], "adapter pirate removed"),
        (["pirate-1"], ["pirate-2"], ["pirate"], ["pirate"], "adapter pirate changed"),
        (["pirate-1"], ["pirate-1", "shout-1"], ["shout"], [], "adapter shout added"),
    ],
)
def test_adapter_edits_stay_inside_the_engine(
    old: list[str], new: list[str], load: list[str], drop: list[str], reason: str
) -> None:
    def build(names: list[str]) -> ModelSpec:
        return model(adapters=tuple(adapter(*n.split("-")) for n in names))

    (action,) = plan(desired(build(new)), observed(build(old))).actions
    assert isinstance(action, UpdateModel)
    assert [a.name for a in action.load] == load
    assert [a.name for a in action.drop] == drop
    assert action.reason == reason
    assert action.disruption is Disruption.NONE


def test_a_scale_makes_another_key() -> None:
    plain, scaled = adapter("pirate"), replace(adapter("pirate"), scale=10.0)
    assert plain.key != scaled.key
    (action,) = plan(desired(model(adapters=(scaled,))), observed(model(adapters=(plain,)))).actions
    assert isinstance(action, UpdateModel)
    assert action.load == (scaled,)
    assert action.drop == (plain,)


@pytest.mark.parametrize(
    "fields",
    [{"aliases": ("gpt",)}, {"generation": {"temperature": 1}}, {"limits": EngineLimits(max_rows=4)}],
)
def test_what_needs_no_process_is_changed_in_place(fields: dict[str, object]) -> None:
    (action,) = plan(desired(model(**fields)), observed(model())).actions
    assert isinstance(action, UpdateModel)
    assert action.load == action.drop == ()
    assert next(iter(fields)) in action.reason


def test_other_weights_surge_when_both_fit() -> None:
    (action,) = plan(desired(model(weights="w2", source="./other")), observed(model())).actions
    assert isinstance(action, ReplaceModel)
    assert action.disruption is Disruption.SURGE
    assert action.reason == "source ./chat → ./other"


def test_other_weights_drain_first_when_both_do_not_fit() -> None:
    (action,) = plan(desired(model(weights="w2"), limit=GIB + GIB // 2), observed(model())).actions
    assert isinstance(action, ReplaceModel)
    assert action.disruption is Disruption.DRAIN


def test_listener_moves_only_for_another_address() -> None:
    (moved,) = plan(desired(model(), listeners=(listener(port=9000),)), observed(model())).actions
    assert isinstance(moved, MoveListener)
    assert moved.disruption is Disruption.NONE
    (same_port,) = plan(desired(model(), listeners=(listener(host="127.0.0.2"),)), observed(model())).actions
    assert same_port.disruption is Disruption.DRAIN, "one port cannot be had twice"
    (updated,) = plan(desired(model(), listeners=(listener(api_keys=("secret",)),)), observed(model())).actions
    assert isinstance(updated, UpdateListener)


def test_a_plan_never_shows_a_secret() -> None:
    made = plan(desired(model(), listeners=(listener(api_keys=("s3cret",)),)), observed(model()))
    assert "s3cret" not in repr(made)
    assert "s3cret" not in str(plan_json(made))


names = st.sampled_from(["a", "b", "c"])
specs = st.builds(
    lambda name, weights, adapters, rows: model(
        name, weights, adapters=tuple(adapter(x) for x in sorted(adapters)), limits=EngineLimits(max_rows=rows)
    ),
    names,
    st.sampled_from(["w1", "w2"]),
    st.sets(names),
    st.integers(1, 2),
)
states = st.dictionaries(names, specs).map(lambda d: tuple(replace(m, name=n) for n, m in d.items()))


@given(states, states)
def test_every_plan_leads_to_what_is_desired(before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...]) -> None:
    made = plan(desired(*after), observed(*before))
    assert {m.name: m for m in after} == _carried_out(made, before)


def _carried_out(made: Plan, before: tuple[ModelSpec, ...]) -> dict[str, ModelSpec]:
    live = {m.name: m for m in before}
    for action in made.actions:
        if isinstance(action, StartModel):
            assert action.spec.name not in live
            live[action.spec.name] = action.spec
        elif isinstance(action, StopModel):
            del live[action.spec.name]
        elif isinstance(action, ReplaceModel | UpdateModel):
            assert live[action.spec.name] == action.old
            live[action.spec.name] = action.spec
        if isinstance(action, UpdateModel):
            keys = {a.key for a in action.old.adapters} | {a.key for a in action.load}
            assert keys - {a.key for a in action.drop} == {a.key for a in action.spec.adapters}
    return live
