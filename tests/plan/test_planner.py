import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.inspect.estimate import ModelMemory
from runner.plan.actions import (
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
from runner.plan.forecast import ENGINE_BYTES, Forecast, footprint
from runner.plan.planner import Observed, plan
from runner.plan.render import plan_json
from runner.plan.spec import DraftSpec, EngineLimits, KVCacheSpec, ModelSpec, QuantizationSpec, TlsSpec

from .specs import GIB, UNHURRIED, adapter, desired, listener, model, observed, states


def test_from_nothing_opens_ports_before_it_starts_models() -> None:
    made = plan(desired(model()), Observed(memory_bytes=16 * GIB))
    assert [type(a) for a in made.actions] == [OpenListener, StartModel]
    assert made.memory == Forecast(before=0, after=GIB, peak=GIB, most=GIB, limit=16 * GIB)


def test_nothing_to_do_when_observed_is_desired() -> None:
    made = plan(desired(model()), observed(model()))
    assert made.empty
    assert made.unchanged == ("models.chat", "servers.lm")


def test_removed_things_stop_last() -> None:
    made = plan(desired(listeners=()), observed(model()))
    assert [type(a) for a in made.actions] == [StopModel, CloseListener]
    assert made.memory.after == 0


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
    ("fields", "path"),
    [
        ({"aliases": ("gpt",)}, "aliases"),
        ({"generation": {"temperature": 1}}, "generation.temperature"),
        ({"limits": EngineLimits(max_rows=4)}, "batching.max_rows"),
        ({"load": "on_demand"}, "load"),
        ({"idle_timeout": 5.0}, "idle_timeout"),
        ({"priority": 3}, "priority"),
    ],
)
def test_what_needs_no_process_is_changed_in_place(fields: dict[str, object], path: str) -> None:
    (action,) = plan(desired(model(**fields)), observed(model())).actions
    assert isinstance(action, UpdateModel)
    assert action.load == action.drop == ()
    assert action.reason == f"changed: {path}"


def test_other_weights_surge_when_both_fit() -> None:
    (action,) = plan(desired(model(weights="w2", source="./other")), observed(model())).actions
    assert isinstance(action, ReplaceModel)
    assert action.disruption is Disruption.SURGE
    assert action.reason == "source ./chat → ./other"


def test_other_weights_drain_first_when_both_do_not_fit() -> None:
    (action,) = plan(desired(model(weights="w2"), limit=GIB + GIB // 2), observed(model())).actions
    assert isinstance(action, ReplaceModel)
    assert action.disruption is Disruption.DRAIN


def test_a_draft_is_part_of_the_process_and_its_length_is_not() -> None:
    one, other = (DraftSpec(f"./{name}", Path("/models", name), name) for name in ("small", "smaller"))
    for old, new, reason in (
        (None, one, "draft ./small added"),
        (one, None, "draft removed"),
        (one, other, "draft ./small → ./smaller"),
        (one, replace(one, digest="later"), "the draft's files changed"),
    ):
        (action,) = plan(desired(model(draft=new)), observed(model(draft=old))).actions
        assert isinstance(action, ReplaceModel)
        assert action.reason == reason
    with_draft = [model(draft=one, limits=EngineLimits(num_draft_tokens=count)) for count in (2, 4)]
    (action,) = plan(desired(with_draft[1]), observed(with_draft[0])).actions
    assert isinstance(action, UpdateModel)


def test_what_is_loaded_on_demand_takes_no_planned_memory() -> None:
    lazy = [model(name, size=12 * GIB, load="on_demand") for name in ("a", "b", "c")]
    made = plan(desired(*lazy), observed())
    assert [action.disruption for action in made.actions] == [Disruption.NONE] * 3
    assert (made.memory.after, made.memory.peak) == (0, 0)
    (action,) = plan(desired(replace(lazy[0], weights_digest="w2")), observed(lazy[0])).actions
    assert isinstance(action, ReplaceModel)
    assert action.disruption is Disruption.DRAIN


def test_quantisation_is_part_of_the_process() -> None:
    four, six = (QuantizationSpec(bits, 64) for bits in (4, 6))
    rules = replace(four, layers={"*.lm_head": {"bits": 8, "group_size": 64, "mode": "affine"}, "a": False})
    for new, reason, changed in (
        (four, "quantization as the source is → affine 4 bits (groups of 64)", "quantization.bits"),
        (rules, "quantization as the source is → affine 4 bits (groups of 64, 2 rules)", "quantization.layers.a"),
    ):
        (action,) = plan(desired(model(quantization=new)), observed(model())).actions
        assert isinstance(action, ReplaceModel)
        assert action.reason == reason
        assert changed in [change.path for change in action.changes]
    (action,) = plan(desired(model(dtype="float16")), observed(model())).actions
    assert action.reason == "dtype of the source → float16"
    order = {"b": False, "a": False}
    keys = {four.key, six.key, rules.key, replace(four, layers=order).key}
    keys.add(replace(four, layers=dict(reversed(order.items()))).key)
    assert len(keys) == 5, "the first rule that matches decides, so their order counts"


def test_the_kv_cache_s_format_is_part_of_the_process() -> None:
    (action,) = plan(desired(model(kv_cache=KVCacheSpec(8, 32))), observed(model())).actions
    assert isinstance(action, ReplaceModel)
    assert action.reason == "KV cache as computed → 8 bits (groups of 32)"
    assert [(change.path, change.new) for change in action.changes] == [
        ("kv_cache.bits", 8),
        ("kv_cache.group_size", 32),
    ]
    late = model(kv_cache=KVCacheSpec(8, 32, 512))
    (action,) = plan(desired(late), observed(model(kv_cache=KVCacheSpec(8, 32)))).actions
    assert isinstance(action, ReplaceModel)
    assert action.reason == "KV cache 8 bits (groups of 32) → 8 bits (groups of 32) from 512 tokens on"
    assert [(change.path, change.old, change.new) for change in action.changes] == [
        ("kv_cache.quantized_start", None, 512)
    ]


def test_a_port_that_another_server_gets_is_given_back_first() -> None:
    made = plan(desired(model(), listeners=(listener(name="new"),)), observed(model()))
    opened, closed = made.actions
    assert isinstance(opened, OpenListener)
    assert isinstance(closed, CloseListener)
    assert (closed.heir, closed.reason) == ("new", "removed from the manifest; servers.new gets its port")
    both = (listener(port=9000), listener(name="new"))
    moved, opened = plan(desired(model(), listeners=both), observed(model())).actions
    assert isinstance(moved, MoveListener)
    assert (moved.heir, moved.disruption) == ("new", Disruption.DRAIN)


def test_listener_moves_only_for_another_address() -> None:
    (moved,) = plan(desired(model(), listeners=(listener(port=9000),)), observed(model())).actions
    assert isinstance(moved, MoveListener)
    assert moved.disruption is Disruption.NONE
    (same_port,) = plan(desired(model(), listeners=(listener(host="127.0.0.2"),)), observed(model())).actions
    assert same_port.disruption is Disruption.DRAIN, "one port cannot be had twice"
    secured = listener(tls=TlsSpec(Path("cert.pem"), Path("key.pem"), "digest"))
    (secure,) = plan(desired(model(), listeners=(secured,)), observed(model())).actions
    assert isinstance(secure, MoveListener)
    assert (secure.disruption, secure.reason) == (Disruption.NONE, "changed: tls.cert, tls.key")
    (updated,) = plan(desired(model(), listeners=(listener(api_keys=("secret",)),)), observed(model())).actions
    assert isinstance(updated, UpdateListener)


def test_a_plan_never_shows_a_secret() -> None:
    made = plan(desired(model(), listeners=(listener(api_keys=("s3cret",)),)), observed(model()))
    assert "s3cret" not in repr(made)
    assert "s3cret" not in str(plan_json(made))


@UNHURRIED
@given(states, states)
def test_every_plan_leads_to_what_is_desired(before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...]) -> None:
    made = plan(desired(*after), observed(*before))
    assert {m.name: m for m in after} == _carried_out(made, before)


def _carried_out(made: Plan, before: tuple[ModelSpec, ...]) -> dict[str, ModelSpec]:
    """What is live afterwards: what goes and what is renamed gives its name back before others take it."""
    live = {m.name: m for m in before}
    for action in made.actions:
        if isinstance(action, StopModel):
            assert live.pop(action.spec.name) == action.spec
        elif isinstance(action, RenameModel):
            assert live.pop(action.old.name) == action.old
    for action in made.actions:
        if isinstance(action, StartModel | RenameModel):
            assert action.spec.name not in live
        elif isinstance(action, ReplaceModel | UpdateModel):
            assert live[action.spec.name] == action.old
        if isinstance(action, StartModel | ReplaceModel | UpdateModel):
            live[action.spec.name] = action.spec
        if isinstance(action, UpdateModel):
            assert action.old.process_digest == action.spec.process_digest
            keys = {a.key for a in action.old.adapters} | {a.key for a in action.load}
            assert keys - {a.key for a in action.drop} == {a.key for a in action.spec.adapters}
    return live


@UNHURRIED
@given(states, states)
def test_nothing_is_loaded_that_runs_already(before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...]) -> None:
    made = plan(desired(*after), observed(*before))
    loaded = sum(isinstance(a, StartModel | ReplaceModel) for a in made.actions)
    missing = Counter(m.process_digest for m in after) - Counter(m.process_digest for m in before)
    assert loaded == missing.total()


@UNHURRIED
@given(states, states, st.integers(1, 20))
def test_old_and_new_overlap_as_far_as_memory_allows(
    before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...], limit: int
) -> None:
    made = plan(desired(*after, limit=limit * GIB), observed(*before))
    leaving = [a.spec if isinstance(a, StopModel) else a.old for a in made.actions if isinstance(a, _ENDING)]
    ended_first = [
        a.spec if isinstance(a, StopModel) else a.old
        for a in made.actions
        if isinstance(a, _ENDING) and (a.disruption is Disruption.DRAIN or (isinstance(a, StopModel) and a.first))
    ]
    coming = sum(footprint(a.spec) for a in made.actions if isinstance(a, StartModel | ReplaceModel))
    held = sum(footprint(m) for m in before)
    overlap = held + coming - sum(footprint(m) for m in ended_first)
    assert overlap <= limit * GIB or len(ended_first) == len(leaving), "no more is held than may be, where it can be"
    for spared in ended_first:
        assert overlap + footprint(spared) > limit * GIB, "nothing ends first that need not"
    assert made.memory.peak == max(held, overlap)


_ENDING = ReplaceModel | StopModel


@UNHURRIED
@given(states, states, st.randoms(use_true_random=False))
def test_the_order_of_what_runs_does_not_matter(
    before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...], chance: random.Random
) -> None:
    shuffled = chance.sample(before, len(before))
    assert plan(desired(*after), observed(*shuffled)) == plan(desired(*after), observed(*before))


def test_a_rename_keeps_the_engine() -> None:
    old, new = (
        model("chat", adapters=(adapter("pirate"),)),
        model("talk", source="./chat", adapters=(adapter("shout"),)),
    )
    (action,) = plan(desired(new), observed(old)).actions
    assert isinstance(action, RenameModel)
    assert (action.target, action.disruption) == ("models.talk", Disruption.NONE)
    assert action.reason == "renamed from models.chat; adapter shout added; adapter pirate removed"
    assert plan_json(plan(desired(new), observed(old)))["actions"][0]["from"] == "models.chat"


def test_two_models_that_swap_their_sources_swap_their_engines() -> None:
    before = (model("a", "w1"), model("b", "w2"))
    after = (model("a", "w2"), model("b", "w1"))
    made = plan(desired(*after), observed(*before))
    assert [type(a) for a in made.actions] == [RenameModel, RenameModel]


def test_a_name_that_moves_on_is_free_for_another_model() -> None:
    before, after = model("chat", "w1"), (model("chat", "w2"), model("chat-old", "w1"))
    start, rename = plan(desired(*after), observed(before)).actions
    assert isinstance(start, StartModel)
    assert start.reason == "its engine goes on as models.chat-old"
    assert isinstance(rename, RenameModel)


def test_a_model_that_takes_another_ones_engine_gives_its_own_up() -> None:
    before, after = (model("a", "w1"), model("b", "w2")), (model("a", "w2"),)
    rename, stop = plan(desired(*after), observed(*before)).actions
    assert isinstance(rename, RenameModel)
    assert isinstance(stop, StopModel)
    assert (stop.target, stop.reason) == ("models.a", "models.a goes on with the engine of models.b")


def test_what_goes_ends_first_where_its_memory_is_needed() -> None:
    made = plan(desired(model("new", "w2", 3 * GIB), limit=4 * GIB), observed(model("old", "w1", 2 * GIB)))
    stop, start = made.actions
    assert isinstance(stop, StopModel)
    assert stop.first
    assert isinstance(start, StartModel)
    assert made.memory == Forecast(before=2 * GIB, after=3 * GIB, peak=3 * GIB, most=3 * GIB, limit=4 * GIB)


def test_two_replacements_that_fit_one_by_one_do_not_both_surge() -> None:
    before = (model("a", "w1", 2 * GIB), model("b", "w2", 3 * GIB))
    after = (model("a", "w3", 2 * GIB), model("b", "w4", 3 * GIB))
    made = plan(desired(*after, limit=9 * GIB), observed(*before))
    assert [a.disruption for a in made.actions] == [Disruption.DRAIN, Disruption.SURGE]
    assert made.memory.peak == 8 * GIB


def test_memory_is_that_of_the_estimate_where_there_is_one() -> None:
    estimate = ModelMemory(weights=2 * GIB, adapters=GIB, first=GIB, kv_row=GIB, rows=4, prefix_cache=GIB)
    idle, limited = model("a", memory=estimate), model("b", memory=estimate, memory_limit_bytes=6 * GIB)
    made = plan(desired(idle, limited, limit=20 * GIB), observed())
    both = 8 * GIB + 2 * ENGINE_BYTES
    assert made.memory == Forecast(before=0, after=both, peak=both, most=both + 6 * GIB, limit=20 * GIB)
    (one, other) = (a.memory_delta for a in made.actions)
    assert one == other == 4 * GIB + ENGINE_BYTES
