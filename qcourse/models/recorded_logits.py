"""Run a reference once and keep its answers, to compare many models with it.

The logits of 16,000 tokens of a vocabulary of 49,152 take 3.2 GB. The head's inputs have 576 values
per token instead, so a Llama's are kept and its head is applied again: 37 MB, for a fifth of the
model's work.

Source: llama.cpp's perplexity tool stores a reference's logits in a file (--kl-divergence-base).
`window_measures.py` calls the reference.
"""

from torch import Tensor, nn

from qcourse.models.evaluation_windows import Model, call_logits, device_of
from qcourse.models.llama import Llama


def record_logits(model: Model) -> Model:
    """Return a function that runs the model once per ids and keeps its logits (a reference).

    It keeps a Llama's inputs of the head, from which it computes the same logits again.

    >>> import torch
    >>> answer = record_logits(lambda ids: torch.rand(*ids.shape, 50))
    >>> torch.equal(answer(torch.arange(20)[None]), answer(torch.arange(20)[None]))
    True
    """
    recorded: dict[tuple[int, ...], Tensor] = {}

    def answer(ids: Tensor) -> Tensor:
        key = (*ids.shape, *ids.flatten().tolist())
        if key not in recorded:
            device = device_of(model) or ids.device
            recorded[key] = _to_keep(model, ids.to(device))
        kept = recorded[key]
        return call_logits(model.lm_head, kept) if isinstance(model, Llama) else kept

    return answer


def _to_keep(model: Model, ids: Tensor) -> Tensor:
    """Return a Llama's input of the head (batch, tokens, hidden), or another model's logits."""
    if not isinstance(model, Llama):
        return call_logits(model, ids)
    inputs: list[Tensor] = []

    def keep(head: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append(args[0])

    # First of all hooks: the head's own hooks run when its input is read back.
    hook = model.lm_head.register_forward_pre_hook(keep, prepend=True)
    try:
        model(ids)
    finally:
        hook.remove()
    return inputs[0]
