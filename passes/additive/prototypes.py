"""What `pha` tells tasks by: encodings of samples, near the prototypes of their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import BottleneckBranch
from ...rewriter.branches.branch import Axes as BranchAxes
from ...rewriter.branches.branch import Serial
from ...rewriter.branches.samples import Samples
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.stream.hidden import Axes
from ...rewriter.errors import PassError
from ...rewriter.parts.parts import Bottleneck
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.program.sites import SublayerSite
from ...rewriter.program.state import State
from ...rewriter.scores.observe import observe
from .generated_adapters import Generator


class Retriever(nn.Module):
    """`forward(hidden) -> [batch, dim]`: two linears of the mean over real tokens."""

    def __init__(self, width: int, hidden: int, dim: int, axes: Axes) -> None:
        super().__init__()
        self.axes = axes
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, dim)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.axes.mean(hidden, valid, "all")
        for axis in reversed(self.axes.tokens):
            x = x.select(axis, 0)
        x = x.to(self.inner.weight.dtype)
        return self.outer(F.relu(self.inner(x)))

    def start(self, drawn: torch.Generator) -> None:
        """Draws both linears."""
        start_linear(self.inner, drawn), start_linear(self.outer, drawn)


class PHABranch(Serial):
    """Beside a sublayer: each sample's own bottleneck, of generated weights `[tasks, size]`."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[BranchAxes] = {"seen": ("...", "width")}

    def __init__(self, width: int, bottleneck: int, samples: Samples) -> None:
        super().__init__()
        self.samples = samples
        self.shapes = {
            "up": (width, bottleneck), "down": (bottleneck, width), "up_bias": (width,),
            "down_bias": (bottleneck,),
        }  # fmt: skip
        self.sizes = [torch.Size(s).numel() for s in self.shapes.values()]

    def parts(self, weights: Tensor) -> dict[str, Tensor]:
        """The tensors of each of `weights [count, size]`, `[count, ...]`."""
        flat = zip(self.shapes.items(), weights.split(self.sizes, -1), strict=True)
        return {name: part.unflatten(-1, shape) for (name, shape), part in flat}

    def update(self, h: Tensor, seen: Tensor, weights: Tensor, task: Tensor) -> Tensor:
        """`seen`: z, of the shape of h; `task [batch]`, int64."""
        rows = self.samples.first(self.features_last(seen), task.shape[0])
        flat = rows.flatten(1, -2) if rows.dim() > 2 else rows[:, None]
        own = self.parts(weights[task].to(h.dtype))
        inner = F.relu(flat @ own["down"].mT + own["down_bias"][:, None])
        y = inner @ own["up"].mT + own["up_bias"][:, None]
        return self.samples.back(y.view(*rows.shape[:-1], -1))

    def settled(self, **decided: Tensor) -> BottleneckBranch:
        weights = decided["weights"].detach()
        own: dict[str, Any] = {n: t[0] for n, t in self.parts(weights[decided["task"][:1]]).items()}
        return BottleneckBranch(Bottleneck("", **own, reads="input"), weights)

    def start(self, generator: Generator, drawn: torch.Generator) -> None:
        """Draws all that generates such branches."""
        nn.init.normal_(generator.get_parameter("layers"), generator=drawn)
        for linear in (generator.inner, generator.outer):
            start_linear(linear, drawn)
        fans = (self.shapes["up"][-1], self.shapes["down"][-1], 1, 1)
        head = generator.heads
        with torch.no_grad():
            for rows, fan in zip(head.weight.split(self.sizes), fans, strict=True):
                bound = 1e-3 * (3 / (head.in_features * fan)) ** 0.5
                rows.uniform_(-bound, bound, generator=drawn)
            head.bias.zero_()

    def describe(self) -> str:
        return f"bottleneck={self.shapes['down'][0]}"


def supervised_contrast(queries: Tensor, task: Tensor, temperature: float) -> Tensor:
    """`-mean_j log(exp(q_i q_j / t) / sum_{k != i} exp(q_i q_k / t))` over samples j of i's task,
    the mean over samples i that share their task with another; unit vectors `[batch, dim]`."""
    itself = torch.eye(len(task), dtype=torch.bool, device=task.device)
    near = (queries @ queries.T / temperature).masked_fill(itself, float("-inf"))
    same = (task[:, None] == task[None]) & ~itself
    logs = near.log_softmax(-1).masked_fill(~same, 0.0)
    count = same.sum(-1)
    each = -logs.sum(-1) / count.clamp(min=1)
    return each.sum() / (count > 0).sum().clamp(min=1)


def prototype_contrast(
    queries: Tensor, prototypes: Tensor, task: Tensor, temperature: float, others: bool
) -> Tensor:
    """`-log(exp(q p_t / t) / sum_s exp(q p_s / t))`, s over all tasks, or (`others`) all but t."""
    near = queries @ prototypes.T / temperature
    own = near.gather(1, task[:, None])
    rivals = near.scatter(1, task[:, None], float("-inf")) if others else near
    return (rivals.logsumexp(1) - own[:, 0]).mean()


class PHAController(Controller):
    """The two contrastive losses of a batch."""

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        method: Any = self.method
        if not method.contrast or method.query not in self.program.outputs_added:
            return None
        task = batch.get(method.task) if isinstance(batch, Mapping) else None
        if not isinstance(task, Tensor):
            raise PassError(
                f"{self.adapter}: the batch has no {method.task!r}, and its losses compare samples "
                f"by their tasks. Give one number a sample, or choose contrast=0."
            )
        place = self.program.outputs_added.index(method.query) - len(self.program.outputs_added)
        query = outputs[method.query] if isinstance(outputs, Mapping) else outputs[place]
        query = F.normalize(query.float(), dim=-1)
        table = F.normalize(prototypes_of(self.program, self.adapter).float(), dim=-1)
        heat = method.temperature
        among = supervised_contrast(query, task, heat)
        return method.contrast * (
            among + prototype_contrast(query, table, task, heat, method.compat)
        )


class Prototypes(nn.Module):
    """`forward() -> [tasks, dim]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


def prototypes_of(program: State, adapter: str) -> Tensor:
    """The trained table, `[tasks, dim]`."""
    path = next(p for p in program.shared if p.endswith(f".{adapter}.prototypes"))
    return program.module.get_parameter(f"{path}.weight")


def encodings(edit: Editor, method: Any, site: SublayerSite, behind: bool) -> Value:
    """Those of a batch's samples, in front of what a sublayer adds, or behind it.

    Raises:
        PassError: samples and tokens cannot be told apart there.
    """
    seen = edit.behind(site) if behind else edit.input(site)
    hidden = seen and edit.hidden(site, seen)
    if hidden is None:
        raise PassError(
            f"{method.text}: {edit.skipped[-1][1]}, so no sample of {site.id} can be encoded. "
            "Choose hyperformer, which encodes none."
        )
    encode = Retriever(hidden.width, method.hidden, method.dim, hidden.axes)
    encode.start(edit.generator)
    encode = encode.to(edit.like(site))
    return edit.share("retriever", encode, hidden=hidden.value, valid=hidden.valid)


def nearest_task(program: State, method: Any, data: Any) -> int:
    """The task whose prototype is nearest the encodings of some batches."""
    table = F.normalize(prototypes_of(program, method.adapter).detach().float(), dim=-1)
    path = next(p for p in program.shared if p.endswith(f".{method.adapter}.retriever"))

    def near(query: Tensor) -> Tensor:
        angles = F.normalize(query.float(), dim=-1) @ table.T
        return (angles / method.temperature).log_softmax(-1).mean(0)

    batches = [_with_task(batch, method.task) for batch in data]
    return int(observe(program, batches, {"q": path}, near)["q"].argmax())


def later(program: State, sites: Sequence[SublayerSite]) -> list[SublayerSite]:
    """Those whose adapters are generated: a decoder's, or of the later half of the layers."""
    crossing = {s.stream for s in program.sites if getattr(s, "cross", False)}
    if decoder := [s for s in sites if s.stream in crossing]:
        return decoder
    layers: dict[str, dict[int | None, None]] = {}
    for site in sites:
        layers.setdefault(site.stream, {})[site.layer] = None
    own = {(n, layer) for n, each in layers.items() for layer in list(each)[len(each) // 2 :]}
    return [s for s in sites if (s.stream, s.layer) in own]


def _with_task(batch: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A batch with some task, of which encodings do not depend."""
    samples = len(next(iter(batch.values())))
    return {name: torch.zeros(samples, dtype=torch.long), **batch}


def start_linear(linear: nn.Linear, drawn: torch.Generator) -> None:
    """As torch starts a linear."""
    bound = linear.in_features**-0.5
    for parameter in (linear.weight, linear.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=drawn)


def by_stream(sites: Sequence[SublayerSite]) -> list[list[SublayerSite]]:
    """Sites of one stream and width, for which one generator serves."""
    groups: dict[tuple[str, int], list[SublayerSite]] = {}
    for site in sites:
        groups.setdefault((site.stream, site.width), []).append(site)
    return list(groups.values())


def require_generated(method: str, counts: Sequence[int], first: SublayerSite) -> None:
    """Raises PassError where no sublayer has generated adapters."""
    if not any(counts):
        raise PassError(
            f"{method}: no sublayer from {first.id} on can have generated adapters. Choose "
            "serial_adapter, or other places with where=."
        )
