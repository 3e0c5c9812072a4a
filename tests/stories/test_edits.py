"""Story: adapters come, change and go by edits of the YAML while others are streaming."""

import random
import shutil

import pytest

from tests.stories.demo import LONG, long_answer
from tests.stories.harness import MODELS, Bench, until
from tests.stories.traffic import Stream, Traffic

pytestmark = [pytest.mark.story, pytest.mark.mlx]

OTHER = f"""
  other:
    source: {MODELS / "demo-chat"}
"""
SUM = "What is 17 + 25?"
STYLES = {"none": "base", "pirate": "pirate", "shout": "shout"}


def test_each_edit_is_live_in_the_next_request_and_moves_nothing_else(bench: Bench) -> None:
    bench.write({"pirate": "./adapters/pirate"}, extra=OTHER)
    with bench.serving():
        loads = _loads(bench)
        base, pirate = bench.ask(SUM), bench.ask(SUM, "pirate")
        assert base != pirate

        streams = [Stream(bench.client(), LONG, "pirate") for _ in range(16)]
        for stream in streams:
            stream.start()
        for stream in streams:
            assert stream.first.wait(30)

        # added
        bench.write({"pirate": "./adapters/pirate", "loud": "./adapters/shout"}, extra=OTHER)
        until(lambda: "demo-chat:loud" in _ids(bench))
        shout = bench.ask(SUM, "loud")
        assert shout == shout.upper() != base

        # changed under the same name: new weights in the same folder
        shutil.copy(bench.folder / "adapters/shout/adapter_config.json", bench.folder / "adapters/pirate")
        shutil.copy(bench.folder / "adapters/shout/adapters.safetensors", bench.folder / "adapters/pirate")
        until(lambda: bench.ask(SUM, "pirate") == shout)

        # removed
        bench.write({"loud": "./adapters/shout"}, extra=OTHER)
        until(lambda: "demo-chat:pirate" not in _ids(bench))
        assert bench.client().models.list().data

        for stream in streams:
            stream.join()
            assert stream.answer.error == ""
            assert stream.answer.text == long_answer("pirate"), "a row finishes on the version it began with"
            assert stream.answer.finish_reason == "stop"
        assert _loads(bench) == loads


def test_fifty_random_edits_under_load_fail_no_request(bench: Bench) -> None:
    choose = random.Random(7)
    fixed = {"pirate": "./adapters/pirate", "shout": "./adapters/shout"}
    bench.write(fixed, extra=OTHER)
    with bench.serving():
        loads = _loads(bench)
        generation = bench.status()["generation"]
        expected = {style: bench.ask(SUM, style) for style in fixed}
        with Traffic(bench.client(), LONG, list(STYLES), count=16) as traffic:
            for number in range(50):
                adapters = dict(fixed)
                if choose.random() < 0.7:
                    adapters["extra"] = choose.choice(["./adapters/pirate", "./adapters/shout"])
                options = choose.choice(
                    ["aliases: [gpt-x]", "generation: {top_p: 0.9}", "batching: {max_rows: 24}", ""]
                )
                bench.write(adapters, model_extra=f"    {options}\n    x-edit: {number}\n", extra=OTHER)
                if "extra" in adapters:
                    until(lambda: "demo-chat:extra" in _ids(bench))
                    wanted = expected["pirate" if "pirate" in adapters["extra"] else "shout"]
                    until(lambda wanted=wanted: bench.ask(SUM, "extra") == wanted)
                else:
                    until(lambda: "demo-chat:extra" not in _ids(bench))
        assert len(traffic.answers) >= 16
        assert [a for a in traffic.answers if a.error] == []
        for answer in traffic.answers:
            assert answer.text == long_answer(STYLES[answer.adapter])
        assert _loads(bench) == loads
        assert bench.status()["generation"] > generation
        assert bench.status()["in_sync"]


def _ids(bench: Bench) -> set[str]:
    return {model.id for model in bench.client().models.list()}


def _loads(bench: Bench) -> dict[str, tuple[float, int]]:
    """When each model was loaded, and by which process."""
    return {m["name"]: (m["loaded_at"], m["pid"]) for m in bench.status()["models"]}


def test_an_adapter_is_dropped_into_a_folder_and_taken_out_again(bench: Bench) -> None:
    shutil.move(bench.folder / "adapters" / "shout", bench.folder / "shout")
    bench.write({"from": "./adapters/*"})
    with bench.serving():
        loads = _loads(bench)
        base = bench.ask(SUM)
        assert bench.ask(SUM, "pirate") != base
        shutil.copytree(bench.folder / "shout", bench.folder / "adapters" / "shout")
        until(lambda: "demo-chat:shout" in _ids(bench))
        shout = bench.ask(SUM, "shout")
        assert shout == shout.upper() != base
        shutil.rmtree(bench.folder / "adapters" / "pirate")
        until(lambda: "demo-chat:pirate" not in _ids(bench))
        assert bench.ask(SUM, "shout") == shout
        assert _loads(bench) == loads
