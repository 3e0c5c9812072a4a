"""Manifests by the thousand from a seed: valid ones, and ones with a single damage of a known class."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml

Data = dict[str, Any]
KeyPath = tuple[str | int, ...]


class Case(NamedTuple):
    """`damage` is "" of a valid one. `codes` are those of which at least one has to be told. `sayable`: whether a JSON
    schema can refuse it, None where it never comes to that. `path` is where an unknown key was put."""

    text: str
    damage: str = ""
    codes: frozenset[str] = frozenset()
    sayable: bool | None = None
    path: KeyPath = ()


def cases(count: int, seed: int) -> Iterator[Case]:
    """A third valid, the others damaged, each class of damage in turn."""
    damages = list(DAMAGES)
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        data = _manifest(chance)
        if number % 3 == 0:
            yield Case(_dump(chance, data))
            continue
        yield _damaged(chance, data, damages[(number - number // 3 - 1) % len(damages)])


def _damaged(chance: random.Random, data: Data, damage: str) -> Case:
    while True:
        attempt = copy.deepcopy(data)
        case = DAMAGES[damage](chance, attempt)
        if case is not None:
            return case._replace(damage=damage, text=case.text or _dump(chance, attempt))
        data = _manifest(chance)


# ------------------------------------------------------------- valid


def _manifest(chance: random.Random) -> Data:
    names = chance.sample(["chat", "llama-3.2", "embed", "x", "a_b", "0", "voice.v2"], chance.randint(1, 3))
    servers = chance.sample(["lm", "lan", "main", "local-1"], chance.randint(1, 3))
    data: Data = {
        "name": chance.choice(["dev", "prod-1", "a.b", "0"]),
        "servers": {name: _server(chance, 8000 + at, names) for at, name in enumerate(servers)},
        "models": {name: _model(chance, name) for name in names},
    }
    memory: dict[str, list[Any]] = {"limit": ["75%", "24GiB", 2**30], "reserve": ["2GiB", "10 %"]}
    _maybe(chance, data, "memory", lambda: _some(chance, memory))
    _maybe(chance, data, "defaults", lambda: _sections(chance, "defaults"))
    _maybe(chance, data, "x-note", lambda: chance.choice(["text", 5, None, {"any": ["thing", "$5"]}]))
    _maybe(chance, data, "env_file", lambda: [{"path": "none.env", "required": False}])
    keys = list(data)
    chance.shuffle(keys)
    return {key: data[key] for key in keys}


def _maybe(chance: random.Random, data: Data, key: str, value: Callable[[], Any], share: float = 0.5) -> None:
    if chance.random() < share:
        data[key] = value()


def _some(chance: random.Random, choices: dict[str, list[Any]]) -> Data:
    """Some of the keys, each with one of its values; seldom without a value."""
    chosen = [key for key in choices if chance.random() < 0.5]
    return {key: None if chance.random() < 0.05 else chance.choice(choices[key]) for key in chosen}


def _server(chance: random.Random, port: int, names: list[str]) -> Data:
    server: Data = {"port": chance.choice([port, port, f"${{PORT_{port}:-{port}}}"])}
    host = chance.choice(["", "127.0.0.1", "localhost", "0.0.0.0", "::1", "192.168.1.5"])
    if host:
        server["host"] = host
    if host in ("0.0.0.0", "192.168.1.5") or chance.random() < 0.3:
        keys = {"api_keys": chance.choice([["key-1"], ["${KEY}", "key-2"]])}
        server["auth"] = chance.choice([keys, {"allow_unauthenticated": True}])
    _maybe(chance, server, "models", lambda: chance.sample(names, chance.randint(1, len(names))))
    _maybe(chance, server, "apis", lambda: chance.sample(["openai", "anthropic", "ollama"], chance.randint(1, 3)))
    _maybe(
        chance,
        server,
        "cors",
        lambda: {"allow_origins": chance.choice([["*"], ["http://localhost:3000", "tauri://x"]])},
    )
    _maybe(chance, server, "tls", lambda: {"cert": "./tls/cert.pem", "key": "./tls/key.pem"}, 0.2)
    _maybe(chance, server, "x-why", lambda: None, 0.1)
    return server


def _model(chance: random.Random, name: str) -> Data:
    on_hub = chance.random() < 0.5
    model: Data = {"source": chance.choice(["org/name", "mlx-community/Llama-3.2"]) if on_hub else "./models/chat"}
    if on_hub:
        _maybe(chance, model, "revision", lambda: chance.choice(["main", "v1.0", "0" * 40]))
    _maybe(chance, model, "aliases", lambda: [f"{name}-{n}" for n in range(chance.randint(0, 3))])
    _maybe(chance, model, "memory_limit", lambda: chance.choice(["4GiB", "512 MB", "1.5GiB", 10**9]))
    _maybe(chance, model, "adapters", lambda: _adapters(chance))
    if model.get("adapters") and chance.random() < 0.5:
        model["default_adapter"] = next(iter(model["adapters"]))
    return model | _sections(chance, "models.*")


def _adapters(chance: random.Random) -> Data:
    entries = [
        "./a",
        {"source": "./a", "scale": 2.5},
        {"source": "org/a", "revision": "main"},
        {"source": "./a", "x-n": 1},
    ]
    return {name: chance.choice(entries) for name in chance.sample(["pirate", "sql", "x-1"], chance.randint(1, 3))}


def _sections(chance: random.Random, above: str) -> Data:
    """`kv_cache`, `batching`, `generation`, `load` and `idle_timeout`, without what is refused as yet."""
    choices: dict[str, dict[str, list[Any]]] = {
        "kv_cache": {
            "bits": [4, 8],
            "group_size": [64],
            "quantized_start": [0, 512],
            "max_context": [1, 16384],
            "prefix_cache": [0, "1 MiB"],
        },
        "batching": {"max_rows": [1, 32], "prefill_step_size": [512], "max_queue": [0, 64]},
        "generation": {
            "temperature": [0, 0.7, 2], "top_p": [0.9, 1], "top_k": [0, 40], "min_p": [0.05], "max_tokens": [1, 1024],
            "seed": [7], "stop": ["###", ["a", "b"]], "repetition_penalty": [1.1], "presence_penalty": [-2, 0.5],
            "chat_template_kwargs": [{"enable_thinking": False, "x": [1, {"y": None}]}],
        },
    }  # fmt: skip
    found: Data = {}
    for section, keys in choices.items():
        _maybe(chance, found, section, lambda keys=keys: _some(chance, keys))  # type: ignore[misc]
    _maybe(chance, found, "load", lambda: chance.choice(["eager", "on_demand"]))
    _maybe(chance, found, "idle_timeout", lambda: chance.choice(["30s", "1h30m"]))
    return found


def _yaml(data: Data, **options: Any) -> str:
    text: str = yaml.dump(data, Dumper=yaml.CSafeDumper, **options)
    return text


def _dump(chance: random.Random, data: Data) -> str:
    """In one of the ways in which people write YAML."""
    if chance.random() < 0.1:
        return json.dumps(data, indent=chance.choice([None, 2]))
    text: str = _yaml(
        data,
        default_flow_style=chance.choice([False, False, None, True]),
        indent=chance.choice([2, 4]),
        sort_keys=False,
        width=chance.choice([60, 1000]),
        allow_unicode=True,
    )
    breaks = chance.choice(["\n", "\n", "\r\n"])
    return chance.choice(["", "\ufeff", "# a comment\n", "---\n"]) + text.replace("\n", breaks)


# ------------------------------------------------------------- damage


def _places(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key of the manifest's own, with its value."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        here = (*path, key)
        if str(key).startswith("x-") or "chat_template_kwargs" in path:
            continue
        yield here, value
        yield from _places(value, here)


def _sections_of(data: Data) -> list[tuple[KeyPath, Data]]:
    """Mappings with fixed keys."""
    found: list[tuple[KeyPath, Data]] = [((), data)]
    for path, value in _places(data):
        names = path[-1] in ("servers", "models", "adapters", "chat_template_kwargs")
        if isinstance(value, dict) and not (names and not isinstance(path[-1], int)):
            found.append((path, value))
    return found


def _put(data: Data, path: KeyPath, value: Any) -> None:
    parent: Any = data
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value


def _case(*codes: str, sayable: bool | None = True, text: str = "", path: KeyPath = ()) -> Case:
    return Case(text, "", frozenset(codes), sayable, path)


def _unknown_key(chance: random.Random, data: Data) -> Case | None:
    path, section = chance.choice(_sections_of(data))
    key = chance.choice(
        ["sorce", "modles", "Port", "temprature", "max-tokens", "kubernetes", "y-mine", "X-mine", "size"]
    )
    section[key] = chance.choice([1, "text", None, [], {"a": 1}])
    return _case("E201", path=(*path, key))


def _misspelt_key(chance: random.Random, data: Data) -> Case | None:
    path, section = chance.choice([(p, s) for p, s in _sections_of(data) if s])
    key = chance.choice(list(section))
    if key.startswith("x-"):
        return None
    wrong = key[:-1] if len(key) > 2 and chance.random() < 0.5 else f"{key}s"
    section[wrong] = section.pop(key)
    return _case("E201", path=(*path, wrong))


_FREE_TEXT = {"source", "revision", "path"}


def _wrong_kind(chance: random.Random, data: Data) -> Case | None:
    path, value = chance.choice([(p, v) for p, v in _places(data) if v is not None])
    others: list[Any] = [["a"], {"a": 1}, 5, "text", True, 1.5]
    if path[-1] in ("memory_limit", "prefix_cache", "limit", "reserve"):
        return None
    if "env_file" in path or "adapters" in path or path[-1] in ("stop", "default_adapter"):
        return None
    kinds = {list: list, dict: dict, bool: bool, int: (int, float), float: (int, float), str: str}
    kind = kinds[type(value)]
    wrong = [other for other in others if not isinstance(other, kind) or (isinstance(other, bool) and kind is not bool)]
    if isinstance(value, str) and value.startswith("${"):
        return None
    new = chance.choice(wrong)
    if isinstance(new, str) and path[-2:-1] == ("auth",):
        return None
    _put(data, path, new)
    return _case("E201", "E202", "E203", "E205", "E206", "E207", "E208", "E209")


_RANGES: dict[str, list[Any]] = {
    "port": [0, 65536, -1], "max_context": [0, 10**9], "max_rows": [0, 1025], "prefill_step_size": [0, 65537],
    "max_queue": [-1, 10**7], "temperature": [-0.1, 2.1], "top_p": [-1, 1.1], "top_k": [-1], "min_p": [2],
    "max_tokens": [0, 2**31], "seed": [-1], "repetition_penalty": [0, 11], "presence_penalty": [-3, 3],
    "scale": [1001, -1001], "memory_limit": [-1], "prefix_cache": [-1],
}  # fmt: skip


def _out_of_range(chance: random.Random, data: Data) -> Case | None:
    found = [(p, v) for p, v in _places(data) if p[-1] in _RANGES]
    if not found:
        return None
    path, _ = chance.choice(found)
    _put(data, path, chance.choice(_RANGES[str(path[-1])]))
    return _case("E204")


_REQUIRED = {"name", "servers", "models", "port", "source", "allow_origins"}


def _missing(chance: random.Random, data: Data) -> Case | None:
    path, _ = chance.choice(
        [(p, v) for p, v in _places(data) if (p[-1] in _REQUIRED and len(p) != 3) or p[-1] == "port"]
    )
    parent: Any = data
    for part in path[:-1]:
        parent = parent[part]
    if path[-1] not in parent or (path[-1] == "models" and path != ("models",)):
        return None
    if chance.random() < 0.5:
        del parent[path[-1]]
    else:
        parent[path[-1]] = None
    return _case("E202", "E205")


def _empty(chance: random.Random, data: Data) -> Case | None:
    found = [
        p for p, v in _places(data) if p[-1] in ("source", "revision", "api_keys", "allow_origins", "apis", "servers")
    ]
    found += [p for p, v in _places(data) if p == ("models",) or (p[-1] == "models" and isinstance(v, list))]
    path = chance.choice(found)
    mapping = path in (("servers",), ("models",))
    _put(data, path, {} if mapping else "" if path[-1] in _FREE_TEXT else [])
    return _case("E205")


_ENUMS: dict[str, list[Any]] = {"load": ["lazy", "Eager", 5], "bits": [7, 1], "group_size": [63]}


def _not_one_of(chance: random.Random, data: Data) -> Case | None:
    found = [p for p, v in _places(data) if p[-1] in _ENUMS or p[-2:-1] == ("apis",)]
    if not found:
        return None
    path = chance.choice(found)
    _put(data, path, chance.choice(_ENUMS.get(str(path[-1]), ["openapi", "OpenAI", "grpc"])))
    return _case("E206")


def _bad_name(chance: random.Random, data: Data) -> Case | None:
    section = chance.choice(["servers", "models", "name", "alias", "adapter"])
    wrong = chance.choice(["Chat", "a b", "a:b", "", "-a", "ä", "a" * 64, ".a"])
    model = chance.choice(list(data["models"].values()))
    if section == "name":
        data["name"] = wrong
    elif section == "alias":
        model["aliases"] = [chance.choice(["a:b", "", "/a", "a b", "-a"])]
    elif section == "adapter":
        model["adapters"] = {wrong: "./a"}
        model.pop("default_adapter", None)
    else:
        old = chance.choice(list(data[section]))
        data[section][wrong] = data[section].pop(old)
    return _case("E207")


def _bad_amount(chance: random.Random, data: Data) -> Case | None:
    model = chance.choice(list(data["models"].values()))
    chance.choice(
        [
            lambda: model.update(memory_limit=chance.choice(["4G", "4gib", "lots", "75%", "", "-4GiB", "1e9 B"])),
            lambda: model.update(kv_cache={"prefix_cache": chance.choice(["4G", "x", "5%"])}),
            lambda: data.update(memory={"limit": chance.choice(["101%", "%", "1,5GiB", "-1%"])}),
        ]
    )()
    return _case("E208")


def _bad_address(chance: random.Random, data: Data) -> Case | None:
    server = chance.choice(list(data["servers"].values()))
    if chance.random() < 0.5:
        server["host"] = chance.choice(
            ["example.com", "", "127.0.0.1:80", "http://localhost", "*", "256.1.1.1", "[::1]"]
        )
    else:
        server["cors"] = {"allow_origins": [chance.choice(["localhost", "http://", "http://a/b", "**", "http://u@a"])]}
    return _case("E209")


# what a schema cannot say


def _bad_address_by_value(chance: random.Random, data: Data) -> Case | None:
    """A pattern can tell how an IPv6 address looks, not whether its parts are possible."""
    chance.choice(list(data["servers"].values()))["host"] = chance.choice(
        ["1:2:3", ":::", "1::2::3", "1:2:3:4:5:6:7:8:9"]
    )
    return _case("E209", sayable=False)


def _reference(chance: random.Random, data: Data) -> Case | None:
    if chance.random() < 0.5:
        chance.choice(list(data["servers"].values()))["models"] = ["no-such-model"]
        return _case("E301", sayable=False)
    chance.choice(list(data["models"].values()))["default_adapter"] = "no-such-adapter"
    return _case("E302", sayable=False)


def _collision(chance: random.Random, data: Data) -> Case | None:
    name, model = chance.choice(list(data["models"].items()))
    servers = list(data["servers"].values())
    match chance.choice(["alias", "port", "twice", "reserved", "revision"]):
        case "alias":
            model["aliases"] = chance.choice([[name], ["a", "a"]])
            return _case("E303", sayable=False)
        case "port":
            data["servers"]["again"] = {"port": 9000, "host": "127.0.0.1"}
            data["servers"]["and-again"] = {"port": 9000}
            return _case("E304", sayable=False)
        case "twice":
            servers[0]["models"] = [name, name]
            return _case("E305", sayable=False)
        case "reserved":
            model["adapters"] = {chance.choice(["base", "none"]): "./a"}
            model.pop("default_adapter", None)
            return _case("E306", sayable=False)
        case _:
            model.update(source="./chat", revision="main")
            return _case("E307", sayable=False)


def _unset(chance: random.Random, data: Data) -> Case | None:
    model = chance.choice(list(data["models"].values()))
    model["source"] = chance.choice(["${NOT_SET}", "./${NOT_SET:?say where}"])
    model.pop("revision", None)
    return _case("E501", sayable=False)


def _bad_reference(chance: random.Random, data: Data) -> Case | None:
    model = chance.choice(list(data["models"].values()))
    model.pop("revision", None)
    model["source"] = chance.choice(["costs $5", "${", "${A", "${A:x}", "$HOME/x"])
    return _case("E502", sayable=False)


def _secret(chance: random.Random, data: Data) -> Case | None:
    server = chance.choice(list(data["servers"].values()))
    match chance.choice(["missing", "place", "spaces", "open", "admin", "both"]):
        case "missing":
            server["auth"] = {"api_keys": ["${file:no/such/key}"]}
            return _case("E503", sayable=False)
        case "place":
            chance.choice(list(data["models"].values()))["source"] = "${file:key}"
            return _case("E504", sayable=False)
        case "spaces":
            server["auth"] = {"api_keys": ["two words"]}
            return _case("E505", sayable=False)
        case "open":
            server["host"] = "0.0.0.0"
            server.pop("auth", None)
            return _case("E506", sayable=False)
        case "admin":
            server.update(host="0.0.0.0", auth={"allow_unauthenticated": True}, apis=["admin"])
            return _case("E512", sayable=False)
        case _:
            server["auth"] = chance.choice([{}, {"api_keys": ["k"], "allow_unauthenticated": True}])
            return _case("E507", sayable=False)


def _no_env_file(chance: random.Random, data: Data) -> Case | None:
    data["env_file"] = chance.choice(["no.env", ["no.env"], [{"path": "no.env"}]])
    return _case("E508", sayable=False)


def _variable_of_the_wrong_kind(chance: random.Random, data: Data) -> Case | None:
    """A schema sees `${WORD}`, and not what it stands for."""
    chance.choice(list(data["servers"].values()))["port"] = "${WORD}"
    return _case("E203", sayable=False)


# what no YAML reader takes, or only one that passes over things


def _twice(chance: random.Random, data: Data) -> Case | None:
    text = _yaml(data, sort_keys=False)
    lines = [line for line in text.splitlines() if ":" in line and not line.lstrip().startswith("-")]
    line = chance.choice([line for line in lines if not line.startswith(" ")])
    return _case("E109", sayable=None, text=f"{text}{line.partition(':')[0]}: 5\n")


def _broken_text(chance: random.Random, data: Data) -> Case | None:
    text = _yaml(data, sort_keys=False, default_flow_style=False)
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    broken = chance.choice(
        ["{", "\tport: 8080", "@x: 1", "a: b: c", "*nobody", '"open', "- a\nb: c", "!tag x: 1", "\x07"]
    )
    lines.insert(at, broken)
    return _case("E201", *(f"E{number}" for number in range(101, 114)), sayable=None, text="\n".join(lines))


def _cut_off(chance: random.Random, data: Data) -> Case | None:
    text = json.dumps(data)
    return _case("E105", "E106", sayable=None, text=text[: chance.randint(5, len(text) - 1)])


DAMAGES: dict[str, Callable[[random.Random, Data], Case | None]] = {
    function.__name__.strip("_"): function
    for function in (
        _unknown_key, _misspelt_key, _wrong_kind, _out_of_range, _missing, _empty, _not_one_of, _bad_name, _bad_amount,
        _bad_address, _bad_address_by_value, _reference, _collision, _unset, _bad_reference, _secret,
        _no_env_file, _variable_of_the_wrong_kind, _twice, _broken_text, _cut_off,
    )
}  # fmt: skip
