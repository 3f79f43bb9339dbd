"""Next-token cross-entropy without the [tokens, vocabulary] tensor: the head, its loss and both gradients by chunks of rows.

The logits of a chunk are made, turned into probabilities, and spent on the gradients of hidden states and head at once,
while they are still in cache; only those gradients outlive the forward pass. `reference` is the naive twin.

Shape legend: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1024
"""Rows per chunk: 16 MB of bf16 logits at a vocabulary of 8192; shorter ones slow the matrix products down."""


def reference(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean cross-entropy in nats the plain way; the products run in the dtype of `hidden_TD`."""
    logits_TV = nn.functional.linear(hidden_TD, weight_VD.to(hidden_TD.dtype))
    return nn.functional.cross_entropy(logits_TV.float(), target_T)


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """`reference`, by chunks: the same loss and gradients within the rounding of the dtype of `hidden_TD`."""
    wants = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_T, chunk, wants)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunk: int, wants: bool) -> Tensor:
        tokens, dtype = hidden_TD.shape[0], hidden_TD.dtype
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
            grad_TD = torch.empty_like(hidden_TD) if wants else hidden_TD
            grad_VD = torch.zeros_like(weight, dtype=torch.float32) if wants else weight
            for start in range(0, tokens, chunk):
                h_CD, t_C1 = hidden_TD[start : start + chunk], target_T[start : start + chunk].unsqueeze(1)
                logits_CV = h_CD @ weight.t()
                probs_CV = torch.softmax(logits_CV, -1, dtype=torch.float32)
                total += _nats(probs_CV, logits_CV, t_C1).sum()
                if wants:
                    # d loss / d logits, before the division by T, which is cheaper on the two small gradients.
                    probs_CV.scatter_add_(1, t_C1, probs_CV.new_full((1, 1), -1.0).expand_as(t_C1))
                    delta_CV = probs_CV.to(dtype)
                    torch.mm(delta_CV, weight, out=grad_TD[start : start + chunk])
                    grad_VD += delta_CV.t() @ h_CD
        if wants:
            ctx.save_for_backward(grad_TD, grad_VD)
            ctx.scale, ctx.weight_dtype = 1 / tokens, weight_VD.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD = ctx.saved_tensors
        scale = grad * ctx.scale
        return grad_TD * scale.to(grad_TD.dtype), (grad_VD * scale).to(ctx.weight_dtype), None, None, None


def _nats(probs_CV: Tensor, logits_CV: Tensor, t_C1: Tensor) -> Tensor:
    """-log p of each target; through the logits where p is too small for a float."""
    p_C1 = probs_CV.gather(1, t_C1)
    nats_C1 = -p_C1.log()
    lost = (p_C1 < 1e-30).squeeze(1)
    if lost.any():
        logits = logits_CV[lost].float()
        nats_C1[lost] = logits.logsumexp(-1, keepdim=True) - logits.gather(1, t_C1[lost])
    return nats_C1


def plain_head(model: Any) -> tuple[nn.Module, nn.Linear] | None:
    """Decoder and head of a causal language model whose logits are exactly `head(decoder(...))`, else None.

    Judged by what the model does, not by its class: soft-capping, scaling or a second head changes the logits of the
    probe, and such a model keeps its own path. The probe leaves the random state as it was.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if type(head) is not nn.Linear or head.bias is not None or decoder is None or decoder is model:
        return None
    device = head.weight.device
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.no_grad():
            ids = torch.arange(1, 9, device=device).remainder(head.out_features).unsqueeze(0)
            expected = model(input_ids=ids, use_cache=False).logits
            found = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except (TypeError, AttributeError):
        return None
    finally:
        model.train(training)
    same = found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-5)
    return (decoder, head) if same else None
