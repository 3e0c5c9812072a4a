"""What is said of an adapter by headers alone is what the engine says once it has loaded both."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.adapters.bank import AdapterBank, read_adapter
from runner.engine.adapters.check import adaptable_modules, check, layer_shape
from runner.engine.adapters.formats import AdapterRefusal
from runner.engine.loader import LoadedModel, load
from runner.errors import EngineLoadError
from runner.inspect import fit
from runner.inspect.adapter import read_adapter as read_facts
from runner.inspect.files import BadFolder, DigestCache
from runner.inspect.layers import Layers
from runner.inspect.model import read_model
from runner.inspect.resident import adapter_bytes
from runner.inspect.tensors import at_block
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import draw, linear_shapes, write_mlx, write_peft
from tests.engine.adapters.test_refusals import REFUSED
from tests.engine.tiny import CONFIGS, build_model

pytestmark = pytest.mark.mlx

READS_VALUES = {"not a number"}
"""What headers do not tell."""

FOLDER_ITSELF = {"no folder", "no config", "no tensor file"}
"""What `runner.plan.digests` has said before anything is read."""


class Base:
    """One model, loaded by the engine, and read by its headers."""

    def __init__(self, folder: Path, model_type: str, bits: int) -> None:
        self.folder = build_model(folder, model_type, bits=bits)
        self.loaded: LoadedModel = load(folder)
        self.layers: Layers = read_model(folder, str(folder), DigestCache()).linear_layers()

    def engine_says(self, adapter: Path) -> str:
        try:
            check(read_adapter(adapter, None), adaptable_modules(self.loaded.model))
        except (AdapterRefusal, EngineLoadError) as refusal:
            return str(refusal)
        return ""

    def headers_say(self, adapter: Path) -> str:
        try:
            facts = read_facts(adapter)
        except BadFolder as error:
            return error.message
        return facts.no_scale or fit.misfit(facts, self.layers)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, int], Base]:
    kinds = [*((kind, 0) for kind in CONFIGS), ("llama", 4), ("qwen3_moe", 4)]
    return {(kind, bits): Base(tmp_path_factory.mktemp(f"{kind}-{bits}"), kind, bits) for kind, bits in kinds}


def test_every_linear_layer_is_found_with_its_shape(bases: Mapping[tuple[str, int], Base]) -> None:
    for base in bases.values():
        found = {}
        for layer in base.layers.linear:
            blocks = [n for n in range(layer.blocks.bit_length()) if layer.blocks >> n & 1] or [0]
            found |= {at_block(layer.path, n): (layer.experts, layer.inputs, layer.outputs) for n in blocks}
        modules = adaptable_modules(base.loaded.model)
        assert found == {path: layer_shape(module) for path, module in modules.layers.items()}
        assert base.layers.depth == modules.depth


@pytest.mark.parametrize("case", sorted(REFUSED.keys() - READS_VALUES - FOLDER_ITSELF))
def test_what_the_engine_refuses_is_refused(case: str, tmp_path: Path, bases: Mapping[tuple[str, int], Base]) -> None:
    base = bases["llama", 0]
    make, reason = REFUSED[case]
    pairs = draw(linear_shapes(base.loaded, ("self_attn.q_proj", "self_attn.v_proj")), 4, seed=1)
    adapter = make(tmp_path / "adapter", pairs)
    assert reason in base.engine_says(adapter)
    assert base.headers_say(adapter)


def test_random_adapters_get_the_same_verdict(tmp_path: Path, bases: Mapping[tuple[str, int], Base]) -> None:
    rng = random.Random(7)
    verdicts = {True: 0, False: 0}
    for number in range(150):
        base = rng.choice(list(bases.values()))
        adapter = _random_adapter(tmp_path / str(number), base, rng)
        said = base.engine_says(adapter)
        assert bool(said) == bool(base.headers_say(adapter)), (adapter, said, base.headers_say(adapter))
        verdicts[bool(said)] += 1
    assert min(verdicts.values()) > 30


def _random_adapter(folder: Path, base: Base, rng: random.Random) -> Path:
    """One that fits, or one with something wrong about it."""
    modules = adaptable_modules(base.loaded.model)
    shapes = {path: layer_shape(module) for path, module in modules.layers.items()}
    plain = {path: (inputs, outputs) for path, (experts, inputs, outputs) in shapes.items() if not experts}
    chosen = dict(rng.sample(sorted(plain.items()), rng.randint(1, min(6, len(plain)))))
    pairs = draw(chosen, rng.choice([1, 4]), seed=1)
    path = rng.choice(list(pairs))
    keys: tuple[str, ...] | None = None
    match rng.randrange(8):
        case 0:
            inputs, outputs = chosen[path]
            pairs |= draw({path: rng.choice([(inputs + 8, outputs), (inputs, outputs // 2)])}, 4, seed=2)
        case 1:
            pairs[path.replace(".0.", ".7.").replace("layers.1.", "layers.11.")] = pairs.pop(path)
        case 2:
            pairs[path.removeprefix("model.")] = pairs.pop(path)
        case 3:
            pairs[path.rpartition(".")[2]] = pairs.pop(path)
        case 4:
            keys = tuple({p.split(".", 3)[-1] for p in pairs if ".layers." in p})
        case 5:
            a, b = pairs[path]
            pairs[path] = (a, mx.concatenate([b, b]))
        case _:
            pass
    if rng.random() < 0.4:
        return write_peft(folder, pairs, r=next(iter(pairs.values()))[0].shape[-1])
    return write_mlx(folder, pairs, keys=keys, num_layers=rng.choice([-1, 1]))


def test_adapters_take_what_the_engine_says(tmp_path: Path, bases: Mapping[tuple[str, int], Base]) -> None:
    for (kind, bits), base in bases.items():
        loaded = load(base.folder)  # the bank wraps its layers
        bank = AdapterBank(loaded.model, mx.float32)
        facts = []
        for number, (names, rank) in enumerate([(("q_proj", "v_proj"), 4), (("down_proj", "q_proj"), 8)]):
            pairs = draw(linear_shapes(loaded, names), rank, seed=number)
            if not pairs:
                continue
            folder = write_mlx(tmp_path / f"{kind}-{bits}-{number}", pairs, keys=None)
            bank.load(AdapterSource(key=str(number), path=str(folder)))
            facts.append(read_facts(folder))
        assert adapter_bytes(facts, base.layers, 4) == bank.nbytes > 0
