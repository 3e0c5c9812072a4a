"""Random edits, overlays, broken files, crashes and rollbacks against a real runner: whatever happens, what it settles
on is what was declared, and nothing is left over or lost (hypothesis, stateful)."""

import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.control.world import ADAPTERS, SOURCES, Declared, Model, World

pick = st.integers(0, 2**16)
steps = 0

BROKEN = {
    "syntax": "models: [unclosed\n",
    "unknown key": "{marker}: true\n",
    "no folder": "models:\n  {marker}: {{source: ./models/{marker}}}\n",
    "refused": "models:\n  {marker}: {{source: ./models/refused}}\n",
}


class RunnerMachine(RuleBasedStateMachine):
    """`wanted` is what the files say, `live` what has to be live once all is quiet; they differ while a file is broken
    or a rollback holds. `pending` is what was saved since it was last quiet. `undone` is the text of the files that the
    last rollback went back from: while nothing else has gone live, who takes an edit back to it has edited nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="mlxrun-"))
        self.world = World(self.folder)
        self.marks = 0
        self.pending = False
        self.broken = ""
        self.held = False
        self.undone = ""
        self.known: dict[int, tuple[Declared, dict[str, Any]]] = {}
        self.kills: dict[str, int] = {}
        self.pids: dict[str, tuple[str, int]] = {}  # of each model its digest and its engine, when last quiet

    @initialize()
    def begin(self) -> None:
        refused = self.folder / "models" / "refused"
        shutil.copytree(self.folder / "models" / "m0", refused)
        config = (refused / "config.json").read_text().replace('"fake": {', '"fake": {"refuse": "no such thing", ')
        (refused / "config.json").write_text(config)
        self.wanted = self.live = Declared((("chat", Model("m0")),), self.world.ports[0])
        self.world.write(self.wanted)
        self.world.start()
        self.quiet()

    def teardown(self) -> None:
        try:
            if hasattr(self, "wanted"):
                self.quiet()
            self.world.close()
        except BaseException:
            log = self.folder / "state" / "dev" / "logs" / "runner.log"
            print(log.read_text()[-8000:] if log.exists() else "no log", (self.folder / "out").read_text()[-2000:])
            raise
        finally:
            self.world.close()
            shutil.rmtree(self.folder)

    @staticmethod
    def count() -> None:
        global steps
        steps += 1

    # ------------------------------------------------------------- edits

    def save(self, declared: Declared) -> None:
        """A valid edit: it is what has to be live from now on."""
        self.count()
        changed = declared != self.wanted or self.broken
        taken_back = declared.text() == self.undone
        if taken_back and self.pending:
            self.quiet()  # whether what is taken back was looked at decides whether it was an edit
            taken_back = declared.text() == self.undone
        if self.broken:
            self.world.save("dev.yaml", declared.base())
        self.world.write(declared)
        if changed:
            self.wanted = declared
            self.live = self.live if taken_back else declared
            self.broken = ""
            self.held = taken_back
            self.pending = True

    def models(self) -> dict[str, Model]:
        return dict(self.wanted.models)

    @rule(
        name=st.sampled_from(["chat", "code", "vision"]),
        source=st.sampled_from(SOURCES),
        adapters=st.sets(st.sampled_from(ADAPTERS)),
    )
    def put_model(self, name: str, source: str, adapters: set[str]) -> None:
        models = self.models() | {name: Model(source, tuple(sorted(adapters)))}
        self.save(replace(self.wanted, models=tuple(models.items())))

    @rule(which=pick)
    def remove_model(self, which: int) -> None:
        models = self.models()
        if len(models) > 1:
            del models[list(models)[which % len(models)]]
        self.save(replace(self.wanted, models=tuple(models.items())))

    @rule(which=pick)
    def rename_model(self, which: int) -> None:
        models = self.models()
        old = list(models)[which % len(models)]
        new = f"{old[:4]}{which % 3}"
        if new not in models:
            self.save(replace(self.wanted, models=tuple((new if n == old else n, m) for n, m in self.wanted.models)))

    @rule(which=pick)
    def change_alias(self, which: int) -> None:
        models = self.models()
        name = list(models)[which % len(models)]
        self.marks += 1
        models[name] = replace(models[name], alias=f"alias{self.marks}")
        self.save(replace(self.wanted, models=tuple(models.items())))

    @rule()
    def change_overlay(self) -> None:
        self.marks += 1
        self.save(replace(self.wanted, over="" if self.marks % 3 == 0 else f"over{self.marks}"))

    @rule(port=st.integers(0, 1), more=st.booleans())
    def change_servers(self, port: int, more: bool) -> None:
        self.save(replace(self.wanted, lm=self.world.ports[port], more=self.world.ports[2] if more else 0))

    @rule(which=st.sampled_from(ADAPTERS))
    def change_adapter(self, which: str) -> None:
        self.touch(which, {a for _, m in self.wanted.models for a in m.adapters}, self.world.change_adapter)

    @rule(which=st.sampled_from(SOURCES))
    def change_model(self, which: str) -> None:
        self.touch(which, {m.source for _, m in self.wanted.models}, self.world.change_model)

    def touch(self, which: str, watched: set[str], change: Any) -> None:
        """Files of a folder are part of the manifest that names it: changing them is an edit."""
        self.count()
        if self.held or self.broken or self.pending:
            self.quiet()
        if self.broken or (self.held and which not in watched):
            return  # what is live goes on with what it has; there is nothing to wait for
        change(which)
        self.known.clear()  # generations that need the old files cannot be had again
        if which in watched:
            self.live, self.held, self.pending = self.wanted, False, True

    @rule(how=st.sampled_from(sorted(BROKEN)))
    def break_file(self, how: str) -> None:
        self.count()
        self.quiet()
        self.marks += 1
        marker = f"mark{self.marks}"
        text = self.wanted.base() + BROKEN[how].removeprefix("models:\n").format(marker=marker)
        if how == "syntax":  # which no name can be put into; the line tells one from another
            text = "\n" * self.marks + BROKEN[how]
            marker = f"dev.yaml:{self.marks + 2}:"
        self.world.save("dev.yaml", text)
        self.broken = marker
        self.held = False

    # ------------------------------------------------------------- crashes, requests, rollbacks

    @rule(which=pick)
    def kill_engine(self, which: int) -> None:
        self.count()
        pids = {m["name"]: m["pid"] for m in self.world.status()["models"] if m["state"] == "ready"}
        name = list(pids)[which % len(pids)] if pids else ""
        if pids and self.kills.get(name, 0) < 2:  # each doubles the backoff
            self.kills[name] = self.kills.get(name, 0) + 1
            self.world.kill_engine(pids[name])
            self.pids.clear()

    @precondition(lambda self: not self.broken)
    @rule(settled=st.booleans(), edit=st.booleans())
    def kill_runner(self, settled: bool, edit: bool) -> None:
        self.count()
        if settled:
            self.quiet()
        pids = dict(self.pids) if not self.pending else {}
        self.world.kill()
        if edit:
            self.change_alias(self.marks)
        self.world.start()
        self.quiet()
        if pids:
            assert self.pids == pids, "engines that serve what is wanted are taken over"

    @rule(which=pick)
    def stream(self, which: int) -> None:
        self.count()
        if self.pending or not self.pids:
            self.quiet()
        name, model = self.live.models[which % len(self.live.models)]
        names = [name, *(f"{name}:{adapter}" for adapter in model.adapters)]
        self.world.ask(self.live.lm, names[which % len(names)], self.pids[name][1])

    @rule(which=pick)
    def roll_back(self, which: int) -> None:
        self.count()
        self.quiet()
        current = self.world.status()["generation"]
        numbers = [n for n in self.known if n != current]
        if not numbers:
            return
        number = numbers[which % len(numbers)]
        self.world.request("rollback", to=number, user="tester", generation=current)
        self.live = self.known[number][0]
        self.held, self.pending, self.undone = True, True, self.world.text()

    @precondition(lambda self: not self.broken)
    @rule(which=pick)
    def edit_and_roll_back_at_once(self, which: int) -> None:
        self.count()
        self.quiet()
        numbers = [n for n in self.known if n != self.world.status()["generation"]]
        if not numbers:
            return
        target, before = numbers[which % len(numbers)], self.world.history()[-1].number
        asking = threading.Thread(target=self.world.request, args=("rollback",), kwargs={"to": target})
        asking.start()
        self.change_alias(which)
        asking.join()

        def both() -> bool:
            found = [header for header in self.world.history() if header.ok and header.number > before]
            return sorted(header.via for header in found) == ["rollback", "watch"]

        self.world.until(both, "neither the edit nor the rollback is lost")
        self.held = self.world.history()[-1].via == "rollback"
        self.undone = self.world.text()
        self.live = self.known[target][0] if self.held else self.wanted

    @rule(seconds=st.sampled_from([0.03, 0.1, 0.2, 0.3]))
    def pass_time(self, seconds: float) -> None:
        self.count()
        time.sleep(seconds)  # so that what follows happens at any point of what is under way

    @rule()
    def look(self) -> None:
        self.count()
        self.quiet()

    # ------------------------------------------------------------- quiet points

    def quiet(self) -> None:
        """Wait until what is live is what has to be, and look at everything that can be left over or lost."""
        world, expected = self.world, self.world.expected(self.live)
        last: dict[str, Any] = {}

        def settled() -> bool:
            last["status"] = status = world.status()
            if world.observed(status) != expected:
                return False
            if self.broken and not self.held:
                return self.broken in status["manifest_error"]
            return bool(status["settled"]) and bool(status["drift"]) == self.held

        try:
            world.until(settled, "what is live is what was declared")
        except AssertionError:
            print(f"declared: {self.live}\nbroken: {self.broken!r}, held: {self.held}\nexpected: {expected}")
            print(f"observed: {world.observed(last['status'])}\nstatus: {last['status']}")
            raise
        status = last["status"]
        assert {m["name"] for m in status["models"] if m["state"] == "ready"} == {n for n, _ in self.live.models}
        world.finish()
        world.until(
            lambda: world.engine_pids() == {m["pid"] for m in world.status()["models"] if m["pid"]},
            "only the engines that serve are left",
        )
        world.until(lambda: not world.strays(), "nothing of an earlier runner is left")
        world.until(
            lambda: world.listening() == {port for port, _ in expected["servers"].values()}, "ports are those declared"
        )
        self.look_at_answers()
        self.look_at_history(status)
        self.pids = {m["name"]: (m["digest"], m["pid"]) for m in world.status()["models"] if m["state"] == "ready"}
        self.pending = False

    def look_at_answers(self) -> None:
        for name, model in self.live.models:
            for adapter in ("", *model.adapters):
                code, text = self.world.complete(self.live.lm, f"{name}:{adapter}" if adapter else name)
                assert code == 200
                key = self.world.expected(self.live)["models"][name]["adapters"][adapter] if adapter else "base"
                assert text.startswith(key)
        assert self.world.complete(self.live.lm, "nobody")[0] == 404

    def look_at_history(self, status: dict[str, Any]) -> None:
        current = self.world.generations.current()
        assert current is not None
        self.world.history()
        assert (current.number, current.digest) == (status["generation"], status["digest"])
        if not (self.broken or self.held):
            self.undone = ""
        if not self.broken:
            self.known[current.number] = (self.live, status)
        kept = {header.number for header in self.world.history()}
        self.known = {number: entry for number, entry in self.known.items() if number in kept}


def run(examples: int, length: int, *, derandomize: bool) -> int:
    """Steps that were taken."""
    global steps
    steps = 0
    chosen = settings(
        max_examples=examples,
        stateful_step_count=length,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a shorter sequence would be another race
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(RunnerMachine, settings=chosen)
    return steps


@pytest.mark.timeout(600)
def test_two_hundred_steps() -> None:
    assert run(examples=6, length=45, derandomize=True) >= 200


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_two_thousand_steps() -> None:
    assert run(examples=50, length=50, derandomize=False) >= 2000
