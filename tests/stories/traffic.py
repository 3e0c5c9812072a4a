"""Streams that run while a test does something to the runner."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from openai import OpenAI


@dataclass
class Answer:
    """How one stream ended. `error` is empty when it came to its end."""

    adapter: str
    text: str = ""
    finish_reason: str | None = None
    error: str = ""


class Stream(threading.Thread):
    """One streamed answer, read in a thread; `first` is set at its first piece."""

    def __init__(
        self, client: OpenAI, prompt: str, adapter: str = "none", model: str = "demo-chat", max_tokens: int = 600
    ) -> None:
        super().__init__(daemon=True)
        self.answer = Answer(adapter)
        self.first = threading.Event()
        self._client = client
        self._prompt = prompt
        self._model = model
        self._max_tokens = max_tokens

    def run(self) -> None:
        try:
            stream = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": self._prompt}],
                temperature=0,
                stream=True,
                max_tokens=self._max_tokens,
                extra_body={"adapter_name": self.answer.adapter},
            )
            for chunk in stream:
                choice = chunk.choices[0]
                self.answer.text += choice.delta.content or ""
                self.answer.finish_reason = choice.finish_reason
                if choice.delta.content:
                    self.first.set()
        except Exception as error:  # noqa: BLE001 - whatever ends a stream is what the test wants to know
            self.answer.error = f"{type(error).__name__}: {error}"
        finally:
            self.first.set()


class Traffic:
    """`count` clients that stream one answer after the other until told to stop."""

    def __init__(self, client: OpenAI, prompt: str, adapters: list[str], count: int) -> None:
        self.answers: list[Answer] = []
        self._client = client
        self._prompt = prompt
        self._adapters = adapters
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._loop, args=(seed,), daemon=True) for seed in range(count)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _loop(self, seed: int) -> None:
        choose = random.Random(seed)
        while not self._stop.is_set():
            stream = Stream(self._client, self._prompt, choose.choice(self._adapters))
            stream.run()
            self.answers.append(stream.answer)
