"""What a manifest may say of its servers: ports, who may use them, and how they speak."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from runner.manifest.section import Section, Text
from runner.manifest.values import ApiKey, Host, Name, Origin

Api = Literal["openai", "anthropic", "ollama", "admin"]


class Auth(Section):
    """Who may use a server. Give exactly one of the two."""

    api_keys: list[ApiKey] | None = Field(
        None,
        min_length=1,
        description="Keys that clients send as `Authorization: Bearer KEY`. Keep them out of the file with "
        "${VARIABLE} or ${file:path}.",
        examples=[["${MLX_RUN_API_KEY}"], ["${file:secrets/api_key}"]],
    )
    allow_unauthenticated: bool = Field(
        False,
        description="true: whoever reaches the port may use it. Needed on purpose where `host` is not loopback.",
        examples=[True],
    )


class Cors(Section):
    """Which web pages may call a server from a browser."""

    allow_origins: list[Origin] = Field(
        min_length=1,
        description="Origins of the pages that may call this server, or * for any.",
        examples=[["http://localhost:3000"]],
    )


class Tls(Section):
    """The certificate of a server, for HTTPS."""

    cert: Text = Field(
        description="PEM file of the certificate, followed by those that sign it, relative to this file. A renewed one "
        "counts as it is saved.",
        examples=["./tls/fullchain.pem"],
    )
    key: Text = Field(description="PEM file of its private key, without a passphrase.", examples=["./tls/privkey.pem"])


class Server(Section):
    """One port: a listener with the models and APIs it serves."""

    port: int = Field(ge=1, le=65535, description="TCP port to listen on.", examples=[8080])
    host: Host = Field(
        "127.0.0.1",
        description="Address to listen on. One that is not loopback needs `auth`.",
        examples=["127.0.0.1", "0.0.0.0"],  # noqa: S104 - an example of what a user may write
    )
    models: list[Name] | None = Field(
        None,
        min_length=1,
        description="Names of the models this server serves. Default: all.",
        examples=[["chat"]],
    )
    apis: list[Api] = Field(
        default=["openai"],
        min_length=1,
        description="APIs this server speaks. With admin it loads and unloads models for whoever asks, and needs keys "
        "where it can be reached from elsewhere.",
        examples=[["openai"], ["openai", "anthropic", "ollama"]],
    )
    auth: Auth | None = Field(
        None, description="Who may use this server.", examples=[{"api_keys": ["${MLX_RUN_API_KEY}"]}]
    )
    tls: Tls | None = Field(
        None,
        description="Serve HTTPS with this certificate. Default: HTTP.",
        examples=[{"cert": "./tls/fullchain.pem", "key": "./tls/privkey.pem"}],
    )
    cors: Cors | None = Field(
        None,
        description="Web pages that may call this server from a browser. Default: none.",
        examples=[{"allow_origins": ["http://localhost:3000"]}],
    )
