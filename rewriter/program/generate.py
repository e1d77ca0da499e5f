"""Greedy decoding without a cache: the plain loop, equal to what an eager model would produce. From
the second token on the head is computed where it is needed, at the last one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..graph.module import modes_kept
from ..graph.output_class import ALONE, Outputs
from .last_token import at_last_token
from .state import State


def _logits(output: Any) -> Tensor:
    output = output.get(ALONE, output) if isinstance(output, Outputs) else output
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise InputError(
            "generate needs a model that returns logits [batch, sequence, vocabulary]; "
            f"this one returns {type(output).__name__}."
        )
    return logits


def _feed(
    program: State, ids: Tensor, mask: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    feed: dict[str, Tensor] = dict(given)
    for spec in program.spec.inputs:
        if spec.name in given:
            continue
        if spec.name == "input_ids":
            feed[spec.name] = ids
        elif spec.name == "attention_mask":
            feed[spec.name] = mask.to(spec.dtype)
        elif spec.name == "position_ids":
            feed[spec.name] = (mask.long().cumsum(-1) - 1).clamp_min(0).to(spec.dtype)
        elif not spec.optional:
            raise InputError(
                f"generate cannot make the input {spec.name!r} of each step. "
                "Give it, if it is the same at each step, or capture with input_ids and "
                "attention_mask only."
            )
    return feed


@torch.no_grad()
def generate(
    program: State,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | tuple[int, ...] | None,
    pad_token_id: int | None,
    others: Mapping[str, Tensor],
) -> Tensor:
    """See `Program.generate`."""
    if input_ids.dim() != 2:
        raise InputError(f"input_ids must be [batch, sequence], not {tuple(input_ids.shape)}.")
    if attention_mask is not None and "attention_mask" not in program.spec.names:
        if not bool(attention_mask.all()):
            raise InputError(
                "attention_mask masks tokens, but the program was captured without that input. "
                "Capture again with kwargs={'input_ids': ..., 'attention_mask': ...}."
            )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids = input_ids
    given = program.generation.get("eos_token_id") if eos_token_id is None else eos_token_id
    ends = tuple(given) if isinstance(given, tuple | list) else () if given is None else (given,)
    pad = program.generation.get("pad_token_id") if pad_token_id is None else pad_token_id
    pad = ends[0] if pad is None and ends else pad
    running = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    module: nn.Module | None = None
    with modes_kept(program.module):
        program.eval()
        for _ in range(max_new_tokens):
            feed = program.spec.bind((), _feed(program, ids, mask, others))
            output = (module or program.module)(**feed)
            logits = _logits(output)
            if module is None:
                leaves = pytree.tree_leaves(output)
                module = at_last_token(program.module, [t is logits for t in leaves].index(True))
            token = logits[:, -1].float().argmax(-1)
            if ends:
                token = torch.where(running, token, torch.full_like(token, int(pad or 0)))
                for end in ends:
                    running = running & (token != end)
            ids = torch.cat([ids, token[:, None].to(ids.dtype)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if ends and not bool(running.any()):
                break
    return ids
