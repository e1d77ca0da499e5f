"""Places of tokens that a model names: a prompt moves constant ones, and others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftfx
from peftfx.rewriter.errors import PassError

from ..models import randomise
from .common import hooked, tensors

WIDTH, LENGTH = 16, 3
Pool = Callable[..., Any]


class Mixer(nn.Module):
    """Token embeddings, positions, one attention; `pool` makes the output of `[b, t, WIDTH]`."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, WIDTH), nn.Embedding(40, WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pool = pool

    def states(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + torch.tanh(self.up(x))


class Plain(Mixer):
    def forward(self, ids: Tensor) -> Any:
        return self.pool(self.states(ids))


class Told(Mixer):
    def forward(self, ids: Tensor, last: Tensor) -> Any:
        return self.pool(self.states(ids), last)


def example(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {"ids": torch.randint(1, 50, (2, 8), generator=generator)}
    return inputs | {n: torch.tensor([0, 0]) for n in names}


def prompted(model: Mixer) -> Any:
    inputs = example("last") if isinstance(model, Told) else example()
    base = peftfx.capture(model.eval(), kwargs=inputs)
    return randomise(peftfx.run(base, f"prompt_tuning{{length={LENGTH}}}"), 0.5), inputs


def states(model: Mixer, program: Any, ids: Tensor) -> Tensor:
    """Hidden states of the user's tokens behind the prompt, by the model itself."""
    (own,) = tensors(program).values()

    def put(_: Any, e: Tensor) -> Tensor:
        return torch.cat([own["prompt"].expand(e.shape[0], -1, -1), e[:, LENGTH:]], 1)

    with hooked(model, {"embed": put}):
        return model.states(torch.cat([ids[:, :1].expand(-1, LENGTH), ids], 1))[:, LENGTH:]


FIRST: dict[str, Pool] = {
    "select": lambda x: x[:, 0],
    "permuted": lambda x: x.permute(1, 0, 2)[0],
    "transposed": lambda x: x.transpose(1, 2)[..., 0],
    "heads": lambda x: x.view(*x.shape[:2], 2, 8)[:, 0],
    "two": lambda x: x[:, :2].mean(1),
    "third_and_fourth": lambda x: x[:, 2:4],
    "last": lambda x: x[:, -1],
    "last_by_size": lambda x: x[:, x.shape[1] - 1],
    "all_but_last": lambda x: x[:, :-1].sum(1) + x[:, 0],
}


@pytest.mark.parametrize("name", FIRST)
def test_a_constant_place_moves_with_the_tokens(name: str) -> None:
    torch.manual_seed(0)
    model = Plain(FIRST[name])
    program, inputs = prompted(model)
    want = states(model, program, inputs["ids"])
    if name == "all_but_last":
        (own,) = tensors(program).values()
        with hooked(model, {"embed": lambda _, e: torch.cat(
            [own["prompt"].expand(e.shape[0], -1, -1), e[:, LENGTH:]], 1)}):  # fmt: skip
            ids = inputs["ids"]
            whole = model.states(torch.cat([ids[:, :1].expand(-1, LENGTH), ids], 1))
        torch.testing.assert_close(program(**inputs), whole[:, :-1].sum(1) + whole[:, LENGTH])
        return
    torch.testing.assert_close(program(**inputs), model.pool(want))


def write(x: Tensor, places: Any, what: Tensor | float, fresh: bool = False) -> Tensor:
    y = torch.ones_like(x) if fresh else x.clone()
    y[:, places] = what
    return y * x + y[:, 0][:, None]


KEPT: dict[str, Pool] = {
    "written_into": lambda x: write(x, 0, 2.0),
    "written_into_a_slice": lambda x: write(x, slice(1, 3), 2.0),
    "written_into_a_mask": lambda x: write(x, 0, 3.0, fresh=True),
    "written_into_another": lambda x: write(x, 1, x[:, 0], fresh=True),
    "written_into_the_last": lambda x: write(x, -1, 2.0, fresh=True),
    "tokens": lambda x: x,
    "flipped_twice": lambda x: torch.tanh(x.flip(1)).flip(1) + x,
    "shifted": lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)) * 0 + x,
    "top_of_width": lambda x: x.sort(-1).values,
    "every_place": lambda x: x[:, torch.arange(x.shape[1])],
    "in_steps_of_one": lambda x: F.avg_pool1d(x.mT, 1, 1).mT,
}


@pytest.mark.parametrize("name", KEPT)
def test_tokens_in_place_are_kept(name: str) -> None:
    torch.manual_seed(0)
    model = Plain(KEPT[name])
    program, inputs = prompted(model)
    want = model.pool(states(model, program, inputs["ids"]))
    torch.testing.assert_close(program(**inputs), want)


def test_an_entry_in_front_of_the_tokens_stays() -> None:
    torch.manual_seed(0)
    model = Plain(lambda x: x)
    model.pool = lambda x: torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1)[:, 0] + x.sum(1)
    program, inputs = prompted(model)
    (own,) = tensors(program).values()
    ids = inputs["ids"]
    with hooked(model, {"embed": lambda _, e: torch.cat(
        [own["prompt"].expand(e.shape[0], -1, -1), e[:, LENGTH:]], 1)}):  # fmt: skip
        whole = model.states(torch.cat([ids[:, :1].expand(-1, LENGTH), ids], 1))
    torch.testing.assert_close(program(**inputs), model.cls[0] + whole.sum(1))
    model.pool = lambda x: torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1)[:, 1]
    program, inputs = prompted(model)
    torch.testing.assert_close(program(**inputs), states(model, program, inputs["ids"])[:, 0])


def flattened_first(x: Tensor) -> Tensor:
    return x.reshape(-1, WIDTH)[torch.arange(x.shape[0]) * x.shape[1]]


REFUSED: dict[str, Pool] = {
    "list": lambda x: x[:, [0]],
    "index_select": lambda x: x.index_select(1, torch.tensor([0])),
    "gather": lambda x: x.gather(1, torch.zeros(x.shape[0], 1, WIDTH, dtype=torch.long)),
    "flattened": flattened_first,
    "without_first": lambda x: x[:, 1:].mean(1),
    "middle": lambda x: x[:, x.shape[1] // 2],
    "half": lambda x: x[:, : x.shape[1] // 2].mean(1),
    "steps": lambda x: x[:, ::2].mean(1),
    "flip": lambda x: x.flip(1),
    "flip_and_sum": lambda x: (x + x.flip(1)).flip(1),
    "flip_and_first": lambda x: x.flip(1)[:, 0],
    "sort": lambda x: x.sort(1).values,
    "reorder": lambda x: x.gather(1, x.argsort(1)),
    "roll": lambda x: x.roll(1, 1),
    "argmax": lambda x: x.argmax(1),
    "pool": lambda x: F.avg_pool1d(x.mT, 2, 2, 1).sum(-1),
    "groups": lambda x: F.adaptive_avg_pool1d(x.mT, 2),
    "split": lambda x: x.split([1, x.shape[1] - 1], 1)[0],
    "strided": lambda x: x.contiguous().as_strided(
        (x.shape[0], 2, WIDTH), (x.shape[1] * WIDTH, WIDTH, 1)
    ),
    "windows": lambda x: x.unfold(1, 2, 2).mean(1),
    "written_behind": lambda x: write(x, slice(1, None), 2.0).mean(1),
    "written_by_list": lambda x: write(x, torch.tensor([0]), 2.0, fresh=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fixed_places_and_other_orders_are_refused(name: str) -> None:
    with pytest.raises(PassError, match=r"test_prompt_places\.py:\d+.*no prompt can be put"):
        prompted(Plain(REFUSED[name]))


def at(x: Tensor, places: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0]), places]


TOLD: dict[str, Pool] = {
    "index": at,
    "clamped": lambda x, last: at(x, (last - 1).clamp(min=0)),
    "gather": lambda x, last: x.gather(1, last[:, None, None].expand(-1, 1, WIDTH)),
    "index_select": lambda x, last: x.index_select(1, last),
    "flattened": lambda x, last: x.reshape(-1, WIDTH)[
        torch.arange(x.shape[0]) * x.shape[1] + last
    ],
    "span": lambda x, last: F.cross_entropy(x[..., 0], last),
    "span_probabilities": lambda x, last: F.nll_loss(x[..., 0].log_softmax(1), last),
    "lengths": lambda x, last: (
        x * (torch.arange(x.shape[1])[None] < last[:, None])[..., None]
    ).sum(1),
    "one_hot": lambda x, last: torch.einsum(
        "btd,bt->bd", x, torch.zeros(x.shape[:2]).scatter(1, last[:, None], 1.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_places_from_an_input_are_refused(name: str) -> None:
    with pytest.raises(PassError, match=r"last.*no prompt can be put"):
        prompted(Told(TOLD[name]))


class Masked(Mixer):
    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        x = self.states(ids)
        scores = (self.q(x) @ self.k(x).mT).masked_fill(mask[:, None] == 0, -1e9)
        return self.pool(scores.softmax(-1) @ x, mask)


def test_an_order_from_a_mask_is_refused() -> None:
    inputs = {**example(), "mask": torch.ones(2, 8, dtype=torch.long)}

    def by(x: Tensor, mask: Tensor) -> Tensor:
        return x[:, mask[0].argsort(dim=0, stable=True)]

    for pool in (by, lambda x, mask: x.gather(1, mask.argsort(1)[..., None].expand(-1, -1, WIDTH))):
        base = peftfx.capture(Masked(pool).eval(), kwargs=inputs)
        with pytest.raises(PassError, match=r"another order .*no prompt can be put"):
            peftfx.run(base, f"prompt_tuning{{length={LENGTH}}}")
    base = peftfx.capture(Masked(lambda x, mask: x * mask[..., None]).eval(), kwargs=inputs)
    assert peftfx.run(base, f"prompt_tuning{{length={LENGTH}}}").history[-1].edited


def test_an_input_that_names_no_place_is_kept() -> None:
    torch.manual_seed(0)
    table = torch.randn(9, WIDTH)
    model = Told(lambda x, last: x + table[last][:, None])
    program, inputs = prompted(model)
    want = model.pool(states(model, program, inputs["ids"]), inputs["last"])
    torch.testing.assert_close(program(**inputs), want)
