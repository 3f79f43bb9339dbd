"""POST /v1/embeddings: the mean of a text's last hidden states, scaled to length 1.

A language model that was not trained for it gives usable but not excellent embeddings this way. D model width.
"""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from moesaic.serving.http.answers import Embeddings, ErrorBody
from moesaic.serving.http.bridge import unless_gone
from moesaic.serving.http.errors import timed_out
from moesaic.serving.http.schemas import EmbeddingRequest
from moesaic.serving.http.service import Service

router = APIRouter()


@router.post("/v1/embeddings", response_model=None, responses={200: {"model": Embeddings}, "4XX": {"model": ErrorBody}})
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """One vector per text."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    prompts = await service.prompts.run(service.prompts.many, body.input, "input")
    work = asyncio.create_task(_vectors(service, prompts))
    vectors = await unless_gone(request.receive, work)
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector_D) if as_text else vector_D.tolist()}
        for i, vector_D in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": usage})


async def _vectors(service: Service, prompts: list[list[int]]) -> list[Tensor]:
    """One engine call per text, so that running answers go on between them."""
    found = []
    try:
        async with asyncio.timeout(service.timeout):
            for ids in prompts:
                found.append(await asyncio.wrap_future(service.engine.call(partial(embed, service.engine.model, ids))))
    except TimeoutError as error:
        raise timed_out(service.timeout) from error
    service.engine.meter.embedded(len(prompts), sum(map(len, prompts)))
    return found


def embed(model: Any, ids: list[int]) -> Tensor:
    """The vector [D] of one text, float32, length 1."""
    ids_1N = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    base = getattr(model, "base_model", model)
    with torch.inference_mode():
        hidden_ND = base(input_ids=ids_1N, use_cache=False).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden_ND.float().mean(0), dim=0).cpu()


def _base64(vector_D: Tensor) -> str:
    return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()
