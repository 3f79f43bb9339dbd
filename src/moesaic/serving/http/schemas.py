"""What a request may say. Unknown fields are refused by name: a misspelt option must not be silently without effect.

The field names and ranges are OpenAI's; `routing`, `top_k`, `ignore_eos` and `timeout` are ours (with the official client:
`extra_body={"routing": {"k": 1}}`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Ids = Annotated[list[Token], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=256)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=256)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Experts = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid", strict=True)


class Routing(BaseModel):
    """Which experts this request may use; each field is one value for all layers, or {layer or block name: value}."""

    model_config = _STRICT

    k: Experts | dict[str, Experts] | None = Field(None, description="Experts per token.")
    mask: list[bool] | dict[str, list[bool]] | None = Field(None, description="One flag per expert; false is never chosen.")
    without: Ids | dict[str, Ids] | None = Field(None, description="Experts that are never chosen.")
    bias: list[Finite] | dict[str, list[Finite]] | None = Field(
        None, description="One number per expert, added to what the selection compares."
    )
    force: Ids | dict[str, Ids] | None = Field(None, description="Every token takes exactly these experts.")
    rank: Experts | dict[str, Experts] | None = Field(None, description="Every token takes its rank-th best expert alone.")
    threshold: Share | dict[str, Share] | None = Field(
        None, description="Experts with a smaller share of a token's weight are left out."
    )
    logits: list[Finite] | dict[str, list[Finite]] | None = Field(
        None, description="One number per expert, added to the router's logits: weights follow too."
    )
    steer: Annotated[dict[Name, dict[str, Any]], Field(max_length=8)] | None = Field(
        None, description='Steering methods, {name: options}, such as {"scmoe": {"beta": 0.5}}.'
    )


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = Field(None, description="A last chunk counts the tokens.")


class Common(BaseModel):
    """Fields of both completion endpoints."""

    model_config = _STRICT

    model: Name
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Answers; answer i draws with seed + i.")
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="0 is greedy. Default 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = Field(None, description="0 and -1 take all tokens.")
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(None, description="The same seed, the same text.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=1024)] | None = Field(None, description="By token id.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="Go on past the end of the text.")
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds for the whole request, waiting included; at most the server's own limit."
    )
    routing: Routing | None = None
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: str = Field("{}", description="JSON text.")


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = _STRICT

    type: Literal["function"]
    function: FunctionSpec


class ResponseFormat(BaseModel):
    model_config = _STRICT

    type: Literal["text"]


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = Field(None, description="Given to the model's chat template.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="`none` hides the tools; a call cannot be forced.")
    parallel_tool_calls: bool | None = Field(None, description="Ignored.")
    response_format: ResponseFormat | None = None


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | Ids | Texts | IdLists
    echo: bool | None = Field(None, description="The prompt comes first in the text (not together with logprobs).")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings: the mean of the last hidden states over the text's tokens, scaled to length 1."""

    model_config = _STRICT

    model: Name
    input: str | Ids | Texts | IdLists
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, description="Ignored.")
