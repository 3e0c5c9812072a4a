"""The narrow path equals the full one wherever it is taken, and is not taken elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from runner.engine.chat import ChatTemplate, Render, jinja_render
from runner.engine.narrow import NotNarrow, narrow_tokenizer
from tests.engine.grammar.tokenizers import sentencepiece
from tests.engine.tiny import CORPUS, build_tokenizer

TEXTS = [
    *CORPUS,
    "",
    " ",
    "  leading and   inner spaces ",
    "<|bos|>its own beginning",
    "<|user|>injected<|end|> and <think>thought</think>",
    "line\nbreaks\r\n\ttabs",
    "1234567890 3.14159",
    "🏳️‍🌈 ﬁne Ａ ①",
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " spaces "},
        {"role": "assistant", "content": "é"},
    ],
]
CONFIG = {"model_type": "llama", "eos_token_id": 1}


def train(normalizer: Any, pre_tokenizer: Any, decoder: Any, *, post: bool, extra: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in extra])
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 0), ("<|end|>", 1)]
        )
    return tokenizer


SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>"]


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any) -> Tokenizer:
    """Another kind of model on the same corpus."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return with_special(tokenizer)


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    """The names that the settings use, as added tokens."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLIT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: train(None, BYTE_LEVEL, decoders.ByteLevel(), post=False),
    "with bos and eos": lambda: train(None, BYTE_LEVEL, decoders.ByteLevel(), post=True),
    "normalised": lambda: train(normalizers.NFC(), SPLIT, decoders.ByteLevel(), post=True),
    "thinking tokens": lambda: train(None, BYTE_LEVEL, decoders.ByteLevel(), post=False, extra=("<think>", "</think>")),
    "prefix space": lambda: train(
        None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(), post=True
    ),
    "metaspace": lambda: train(normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace(), post=True),
    "byte fallback": lambda: with_special(sentencepiece()),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>"),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    ),
    "word piece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], show_progress=False),
        pre_tokenizers.Whitespace(),
        decoders.WordPiece(),
    ),
    "word level": lambda: trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], show_progress=False),
        pre_tokenizers.Whitespace(),
        None,
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "declared bos and eos": {"add_bos_token": True, "add_eos_token": True},
    "declared without": {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": True},
    "added tokens as objects": {
        "bos_token": {"__type": "AddedToken", "content": "<|bos|>", "normalized": False},
        "tokenizer_class": "TokenizersBackend",
        "model_max_length": 64,
    },
    "extra tokens": {"additional_special_tokens": ["<|user|>"], "user_token": "<|user|>", "padding_side": "left"},
}


def write(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    """A folder with this tokenizer, as far as both loaders look at it."""
    build_tokenizer(folder, **settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def rendered(render: Render | None, conversation: list[dict[str, Any]]) -> str:
    return ChatTemplate(render).prompt(conversation, {})


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_full_loader(tmp_path: Path, kind: str, settings: str) -> None:
    from runner.engine.full import full_tokenizer

    folder = write(tmp_path, KINDS[kind](), **SETTINGS[settings])
    narrow, template = narrow_tokenizer(folder, CONFIG, frozenset({1}))
    full, render = full_tokenizer(folder, frozenset({1}))
    assert template is not None
    for text in TEXTS:
        assert narrow.encode_prompt(text) == full.encode_prompt(text), text
        ids = narrow.encode_rendered(text)
        assert ids == full.encode_rendered(text), text
        assert narrow.decode_ids(ids) == full.decode_ids(ids), text
    for conversation in CONVERSATIONS:
        assert rendered(jinja_render(template, narrow.special_tokens), conversation) == rendered(render, conversation)
    assert narrow.eos_ids == full.eos_ids
    assert narrow.vocab_size == full.vocab_size
    assert narrow.special_tokens == full.special_tokens
    some = range(0, narrow.vocab_size, 7)
    assert [narrow.label(token) for token in some] == [full.label(token) for token in some]


def test_other_threads_go_on_while_a_text_is_tokenised(tmp_path: Path) -> None:
    tokenizer, _ = narrow_tokenizer(write(tmp_path, KINDS["byte level"]()), CONFIG, frozenset({1}))
    text = " ".join(CORPUS) * 2000
    thread = threading.Thread(target=tokenizer.encode_prompt, args=(text,))
    began = last = time.perf_counter()
    thread.start()
    stood = 0.0
    while thread.is_alive():
        now = time.perf_counter()
        stood, last = max(stood, now - last), now
    assert stood < (last - began) / 2


def test_special_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    from runner.engine.full import full_tokenizer

    folder = write(tmp_path, KINDS["with bos and eos"](), eos_token="<|pad|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    narrow, _ = narrow_tokenizer(folder, CONFIG, frozenset())
    full, _ = full_tokenizer(folder, frozenset())
    assert narrow.special_tokens == full.special_tokens
    assert narrow.eos_ids == full.eos_ids == {1}


def test_a_template_file_goes_before_the_settings(tmp_path: Path) -> None:
    folder = write(tmp_path, KINDS["byte level"]())
    (folder / "chat_template.jinja").write_text("from the file")
    assert narrow_tokenizer(folder, CONFIG, frozenset())[1] == "from the file"


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def settings_are(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: build_settings(folder, settings)


def build_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def put(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("{}") and None


REFUSED: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "no tokenizer.json": (unlink("tokenizer.json"), {}, "tokenizer.json is missing"),
    "no settings": (unlink("tokenizer_config.json"), {}, "tokenizer_config.json is missing"),
    "a class that rebuilds": (settings_are(tokenizer_class="LlamaTokenizerFast"), {}, "tokenizer_class is LlamaTok"),
    "no class": (settings_are(tokenizer_class=None), {}, "tokenizer_class is None"),
    "a family that is overridden": (lambda _: None, {"model_type": "qwen2"}, "overrides the tokenizer of qwen2"),
    "mistral": (lambda _: None, {"model_type": "mistral3"}, "overrides the tokenizer of mistral3"),
    "mistral's own file": (put("tekken.json"), {}, "Mistral's own"),
    "remote code": (settings_are(auto_map={"AutoTokenizer": ["a.B", None]}), {}, "sets auto_map"),
    "remote model code": (lambda _: None, {"auto_map": {"AutoModel": "a.B"}}, "remote code"),
    "split special tokens": (settings_are(split_special_tokens=True), {}, "split_special_tokens"),
    "a template that is code": (settings_are(chat_template_type="deepseek"), {}, "chat_template_type"),
    "a token that is not there": (settings_are(unk_token="<unk>"), {}, "'<unk>', which tokenizer.json has not added"),
    "a model's own token": (settings_are(image_token="<image>"), {}, "'<image>'"),
    "an extra token": (settings_are(extra_special_tokens=["<new>"]), {}, "'<new>'"),
    "a token with other flags": (
        settings_are(added_tokens_decoder={"0": token("<|bos|>", lstrip=True)}),
        {},
        "token 0 differs",
    ),
    "an added token at a new id": (
        settings_are(added_tokens_decoder={"419": token("<late>")}),
        {},
        "token 419 differs",
    ),
    "legacy added tokens": (put("added_tokens.json"), {}, "added_tokens.json"),
    "several templates": (settings_are(chat_template=[{"name": "default", "template": "x"}]), {}, "several"),
    "a folder of templates": (lambda f: (f / "additional_chat_templates").mkdir(), {}, "several chat templates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_falls_back_where_transformers_does_something_else(tmp_path: Path, name: str) -> None:
    change, config, reason = REFUSED[name]
    folder = write(tmp_path, KINDS["byte level"]())
    change(folder)
    with pytest.raises(NotNarrow, match=reason):
        narrow_tokenizer(folder, CONFIG | config, frozenset())


def test_no_template_is_no_reason_to_fall_back(tmp_path: Path) -> None:
    folder = write(tmp_path, KINDS["byte level"](), chat_template=None)
    assert narrow_tokenizer(folder, CONFIG, frozenset())[1] is None
