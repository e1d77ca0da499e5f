"""Losses over the choices of a question: what a wrong one costs, and which one is likeliest."""

from __future__ import annotations

import torch
from torch import Tensor


def log_likelihoods(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log probability of each label, and which labels count, both `[rows, tokens]`.

    Args:
        logits: `[rows, tokens, vocabulary]`.
        labels: `[rows, tokens]`; -100 does not count.
    """
    real = labels != -100
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1)
    own = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return own, real


def unlikelihood(
    logits: Tensor, labels: Tensor, answer: Tensor, choices: int, floor: float = 0.0
) -> Tensor:
    """`- sum log(1 - p + floor) / (number of tokens)` over all tokens of wrong choices.

    Args:
        logits, labels: of all choices, question by question, see `log_likelihoods`.
        answer: `[questions]`, which choice is right.
        choices: of each question.
        floor: keeps the logarithm finite.
    """
    log_p, real = log_likelihoods(logits, labels)
    wrong = torch.arange(choices, device=answer.device) != answer[:, None]
    real = real & wrong.reshape(-1, 1)
    cost = -torch.log(1 - log_p.exp() + floor)
    return torch.where(real, cost, 0.0).sum() / real.sum().clamp(min=1)


def length_normalised(logits: Tensor, labels: Tensor, answer: Tensor, choices: int) -> Tensor:
    """Cross-entropy of the right choice among all by `b = mean log p` of their tokens; the
    arguments are those of `unlikelihood`."""
    log_p, real = log_likelihoods(logits, labels)
    mean = torch.where(real, log_p, 0.0).sum(-1) / real.sum(-1).clamp(min=1)
    return torch.nn.functional.cross_entropy(mean.view(-1, choices), answer)
