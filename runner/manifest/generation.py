"""What a manifest may say of how tokens are chosen, where a request does not say it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from runner.manifest.section import Section as _Section
from runner.manifest.values import one_as_list

_INT32 = 2**31 - 1
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_Stops = Annotated[list[_Stop], Field(max_length=16)]
StopTexts = Annotated[_Stops, BeforeValidator(one_as_list, json_schema_input_type=_Stop | _Stops)]


class Generation(_Section):
    """Defaults for what a request leaves out, by the request's own names and with its ranges."""

    temperature: float | None = Field(
        None, ge=0, le=2, description="Randomness: 0 always takes the likeliest token.", examples=[0.7]
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Choose among the likeliest tokens that together have this share.", examples=[0.9]
    )
    top_k: int | None = Field(
        None, ge=0, description="Choose among this many likeliest tokens; 0 is off.", examples=[40]
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Drop tokens below this share of the likeliest one's probability; 0 is off.",
        examples=[0.05],
    )
    max_tokens: int | None = Field(None, ge=1, le=_INT32, description="The most tokens to generate.", examples=[1024])
    seed: int | None = Field(
        None, ge=0, le=2**63 - 1, description="Seed of the sampler, for answers that repeat.", examples=[7]
    )
    stop: StopTexts | None = Field(
        None,
        description="Text, or up to 16 texts, that end the answer.",
        examples=["###", ["\nUser:", "###"]],
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="Above 1 avoids recent tokens; 1 is off.", examples=[1.1]
    )
    repetition_context_size: int | None = Field(
        None, ge=0, le=_INT32, description="Recent tokens that repetition_penalty looks at.", examples=[20]
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0 avoids tokens that were generated before; 0 is off.", examples=[0.5]
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Above 0 avoids tokens, the more the more often they were generated; 0 is off.",
        examples=[0.5],
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the chat template.", examples=[{"enable_thinking": False}]
    )
