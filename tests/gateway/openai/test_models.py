from __future__ import annotations

import pytest

from runner.gateway.openai.resources import OTHER_KINDS
from tests.gateway.conftest import Client


async def test_list_has_models_aliases_and_adapters(client: Client) -> None:
    answer = (await client.get("/v1/models")).json
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["chat", "org/gpt-4o", "chat:pirate", "chat:shout"]
    assert answer["data"][2] == {
        "id": "chat:pirate",
        "object": "model",
        "created": 1700000000,
        "owned_by": "mlx-run",
        "root": "chat",
        "adapter": "pirate",
        "ready": True,
        "loaded": True,
    }


@pytest.mark.parametrize("path", ["chat", "org/gpt-4o", "chat:pirate", "chat%3Apirate", "org%2Fgpt-4o"])
async def test_one_by_an_id_of_any_kind(client: Client, path: str) -> None:
    response = await client.get(f"/v1/models/{path}")
    assert response.status_code == 200
    assert response.json["id"] == path.replace("%3A", ":").replace("%2F", "/")


async def test_unknown_model(client: Client) -> None:
    response = await client.get("/v1/models/gpt-9")
    assert (response.status_code, response.json["error"]["code"]) == (404, "model_not_found")
    assert "gpt-9" in response.json["error"]["message"]
    answer = await client.chat(model="gpt-9")
    assert (answer.status_code, answer.json["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("path", OTHER_KINDS)
async def test_other_kinds_of_models_are_refused_by_name(client: Client, path: str) -> None:
    for body, kind in ((b'{"model": "chat", "input": "x"}', "application/json"), (b"--x--", "multipart/form-data")):
        answer = await client.post(path, body, kind)
        error = answer.json["error"]
        assert (answer.status_code, error["type"], error["code"]) == (
            400,
            "invalid_request_error",
            "unsupported_endpoint",
        )
        assert path in error["message"]
        assert "/v1/chat/completions" in error["message"]
