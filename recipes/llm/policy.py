"""What a policy loss needs of a causal LM: the states and scores that predict each token of a completion."""

from typing import Any

import torch
from torch import Tensor, nn

UNUSUAL = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings by which a configuration says that logits are more than the head's product with the hidden state."""


def nonlinear_head(model: Any) -> str | None:
    """Return the setting that makes logits more than a linear function of hidden states, or None."""
    values = {name: getattr(model.config, name, None) for name in UNUSUAL}
    return next((name for name, value in values.items() if value not in (None, 1, 1.0, False)), None)


def completion_states(model: Any, batch: dict[str, Tensor], pieces: bool = False) -> dict[str, Any]:
    """Return ``hidden [n, T, H]`` and ``head``, or ``logits [n, T, V]``, at the positions that predict the actions.

    The head is handed over unapplied where logits are its plain product with the hidden states, so that a loss may
    chunk them. A model whose weights lie in pieces gives logits and hidden states, one with a soft cap or a scale
    gives logits alone.

    Args:
        model: causal LM.
        batch: ``input_ids [n, L]`` padded on the right, ``prompt_length [n]``, ``actions [n, T]``.
        pieces: the weights are spread over processes: only the whole model's forward sees them.
    """
    ids = batch["input_ids"][:, :-1]
    width = batch["actions"].shape[1]
    places = batch["prompt_length"].unsqueeze(1) - 1 + torch.arange(width, device=ids.device)
    head = model.get_output_embeddings()
    # Padding on the right is never seen by what stands before it, so no attention mask is needed.
    linear = not nonlinear_head(model)
    if pieces or not linear or not isinstance(head, nn.Linear):
        out = model(input_ids=ids, use_cache=False, output_hidden_states=linear)
        states = {"logits": _at(out.logits, places)}
        return {**states, "hidden": _at(out.hidden_states[-1], places)} if linear else states
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return {"hidden": _at(hidden, places), "head": head}


def _at(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places.clamp(max=states.shape[1] - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1]))
