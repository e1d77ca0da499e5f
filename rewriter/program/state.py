"""A captured model: a trainable graph, its sites, and the history of what was done to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..files.identity import merkle_root, tensor_digest
from ..graph.module import CapturedModule, fork_module, same_view, state_tensors
from ..graph.outside import outside_modes
from ..graph.sharded import equal, reshard
from ..graph.walks import fact, settled, stored
from ..inputs.spec import InputSpec
from .fingerprint import Fingerprints, is_at, printed
from .history import ITSELF, Attachment, Index, Record
from .site_table import Sites
from .tensors import Tensors

AnyProgram = TypeVar("AnyProgram", bound="State")
"""The class of a program is kept by what derives another from it."""

BRANCHES = "peftfx"
"""Name below which the module holds everything that passes insert."""


@dataclass(eq=False)
class State:
    """A captured model. `peftfx.run` returns new programs; it never changes one.

    Attributes:
        module: a plain `fx.GraphModule`, trainable, usable wherever an `nn.Module` is; call it
            with the model's keyword inputs.
        spec: the inputs it accepts, with the range of every dynamic size.
        sites: the places that passes rewrite.
        history: what was done, in order.
        tensors: what is known of its stored tensors beside their values.
        attachments: the branches now in the graph.
    """

    module: CapturedModule
    spec: InputSpec
    sites: Sites
    symbols: Mapping[str, str]
    extras: Mapping[str, Tensor]
    state_names: tuple[str, ...]
    sample: Mapping[str, Tensor]
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The model's own end and padding tokens for `generate`."""
    history: tuple[Record, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    shared: tuple[str, ...] = ()
    """Paths of modules evaluated once a forward, which branches of several sites read."""
    outputs_added: tuple[str, ...] = ()
    """Names of the outputs that passes have put behind the model's own, in order."""
    tensors: Tensors = field(default_factory=Tensors)
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Numbers on branches as passes made them, see `verify/intact.py`."""
    origin: Self | None = None
    dtype: torch.dtype | None = None
    """What `capture(dtype=...)` was asked for."""
    cached: str = ""
    """What the capture cache did: `recalled`, `stored`, or why not; empty without one."""
    prints: Fingerprints | None = None
    """What its frozen tensors and those of its base were like; taken when it is made."""

    _index: Index = field(default_factory=Index, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prints is None:
            self.prints = self.fingerprints()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; takes its positional and keyword inputs, returns its output type.

        Raises:
            InputError: inputs that were not captured or are out of range.
        """
        bound = self.spec.bind(args, kwargs)
        return self.module(**bound)

    def __repr__(self) -> str:
        name = type(self.module).__name__
        done = "; ".join(r.text for r in self.history) or "as captured"
        return f"{type(self).__name__}({name}({self.spec}), {len(self.sites)} sites, {done})"

    # Parameters and modes.

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied parameter names -> the first name of their tensor."""
        return self.tensors.aliases

    @property
    def untied(self) -> tuple[str, ...]:
        """Aliases that have a tensor of their own now."""
        return self.tensors.untied

    @property
    def owned(self) -> Mapping[str, tuple[str, ...]]:
        """Adapter -> names of base parameters that it trains; the user's belong to `ITSELF`."""
        return self.tensors.owned

    @property
    def added(self) -> tuple[str, ...]:
        """Names of parameters that the original model does not have (biases)."""
        return self.tensors.added

    @property
    def removed(self) -> Mapping[str, Tensor]:
        """Tensors of branches that have left the graph, kept so that going back is exact."""
        return self.tensors.removed

    def named_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter for everything that gradients reach."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What to hand to an optimizer."""
        return list(self.named_trainable_parameters().values())

    def train(self, mode: bool = True) -> Self:
        """Training mode (dropout, batch statistics) for the whole program; returns itself."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Evaluation mode; returns itself."""
        return self.train(False)

    @property
    def training(self) -> bool:
        """Whether the program is in training mode."""
        return self.module.training

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in this program, in the order of insertion."""
        return tuple(r.adapter for r in self.history if r.adapter is not None)

    @property
    def owners(self) -> tuple[str, ...]:
        """Who holds what is trained: the program itself, if it trains anything, and adapters."""
        return ((ITSELF,) if self.owned.get(ITSELF) else ()) + self.adapters

    @property
    def base(self) -> Self:
        """The program as captured."""
        return self.origin or self

    @property
    def identity(self) -> str:
        """sha256 over the names, dtypes, shapes and bytes of the captured base tensors."""
        return merkle_root({n: tensor_digest(t) for n, t in self.base.base_tensors().items()})

    def spec_of_base(self) -> InputSpec:
        """The input spec of the captured program (prompts narrow a program's own)."""
        return self.base.spec

    def base_tensors(self) -> dict[str, Tensor]:
        """Every stored tensor outside of the branches, by canonical name."""
        tensors: dict[str, Tensor] = dict(self.extras)
        for name, tensor in self._stored():
            if not self.inserts(name) and self.aliases.get(name, name) == name:
                tensors[name] = tensor.detach()
        return dict(sorted(tensors.items()))

    def inserts(self, name: str) -> bool:
        """Whether a stored tensor, or a module below one, belongs to a branch or shared module."""
        return self._index.of(self.attachments, self.shared).holds(name)

    def inserted(self) -> list[tuple[str, nn.Module]]:
        """The modules of branches and shared modules by path, with all that they hold."""
        paths = self._index.of(self.attachments, self.shared)

        def found() -> list[tuple[str, nn.Module]]:
            return [(p, m) for p, m in self.module.named_modules() if paths.holds(f"{p}.")]

        return fact(self.module, "inserted", found)

    def attached(self, site: str) -> list[Attachment]:
        """The branches at a site, in order of insertion."""
        return self._index.of(self.attachments, self.shared).at(site)

    def site_of(self, path: str) -> str:
        """The id of the site of the branch at a path; empty if there is none."""
        return self._index.of(self.attachments, self.shared).site(path)

    def combined(self, path: str) -> Attachment | None:
        """The attachment that the branch at a path is a member of, if any."""
        return self._index.of(self.attachments, self.shared).combined(path)

    @property
    def folders(self) -> set[str]:
        """Names of the adapters that branches and shared modules are stored below."""
        return self._index.of(self.attachments, self.shared).folders

    def updated(self) -> dict[str, Tensor]:
        """Tensors of the base that forwards have written since the capture (batch statistics)."""
        before = dict(self.base._stored())
        names = state_tensors(self.module) & before.keys() if self.origin is not None else ()
        stored = dict(self._stored()) if names else {}
        return {n: stored[n].detach() for n in sorted(names) if not equal(stored[n], before[n])}

    def settled(self) -> dict[str, Tensor]:
        """The tensors outside of branches that nothing may change: they do not train, and no
        batch updates them."""
        module = self.module
        moving = {n for n, p in module.named_parameters() if p.requires_grad}
        moving |= state_tensors(module) | self.tensors.trained
        return {n: t for n, t in self.base_tensors().items() if n not in moving}

    def fingerprints(self, values: bool = True) -> Fingerprints:
        """Fingerprints: those that are known already, and of what is new.

        Args:
            values: with checksums; without where tensors are mapped from files. What is on the
                meta device has no fingerprint.
        """
        known, base = self.prints or Fingerprints(), self.base
        of_base = self.settled() if base is self else base.base_tensors()
        prints = printed(of_base, known.base, values)
        if base is self:
            return Fingerprints(prints)
        mine = {n: t for n, t in self.settled().items() if not is_at(t, prints.get(n))}
        return Fingerprints(prints, printed(mine, known.own, values))

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        reshard(self.module)
        yield from stored(self.module)

    def reshaped(self) -> list[str]:
        """Names of the captured program's tensors that have another shape now."""
        before = dict(self.base._stored()) if self.origin is not None else {}
        return [n for n, t in self._stored() if n in before and before[n].shape != t.shape]

    # Structure.

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device, with the devices that the graph names.

        Raises:
            CaptureError: `device` is a dtype, which only a new capture can change, or there is
                no such device here.
        """
        if isinstance(device, torch.dtype):
            raise CaptureError(
                f"a captured program keeps its dtype. Capture again: "
                f"peftfx.capture(model, ..., dtype={device})."
            )
        try:
            device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # torch asserts that it has the backend
            said = str(error).splitlines()[0]
            raise CaptureError(
                f"the program cannot be moved to {str(device)!r}: {said}. Choose a device that "
                "this machine has."
            ) from error
        return self._moved(device, {})

    @outside_modes
    def _moved(self, device: torch.device, done: dict[Any, Tensor]) -> Self:
        # `done`: moved tensors by what they were, since what programs share before, they share
        # after; and those that stay.
        def move(tensor: Tensor) -> Tensor:
            if tensor.is_meta or tensor.requires_grad or not tensor.numel():
                return tensor.to(device)
            view = same_view(tensor)
            if view not in done:
                done[view] = tensor.to(device)
            return done[view]

        moved = self.fork()
        moved.module._apply(move)
        tables = (self.extras, self.sample, self.removed)
        extras, sample, removed = ({n: move(t) for n, t in table.items()} for table in tables)
        origin = self.origin._moved(device, done) if self.origin is not None else None
        tensors = replace(moved.tensors, removed=removed)
        return replace(moved, extras=extras, sample=sample, tensors=tensors, origin=origin)

    @outside_modes
    def fork(self, printed: bool = True) -> Self:
        """An independent copy: own Parameter objects, frozen storage shared, trained copied.

        Args:
            printed: with fingerprints of its own; without for what is edited before it is used.
        """
        with settled(self.module):
            reshard(self.module)
            forked = replace(self, module=fork_module(self.module), origin=self.base)
        if printed:
            forked.prints = forked.fingerprints()
        return forked

    def attached_by(self, adapter: str) -> list[Attachment]:
        """The branches of an adapter."""
        return [a for a in self.attachments if a.adapter == adapter]

    def branch(self, attachment: Attachment) -> nn.Module:
        """The module of one attached branch."""
        return self.module.get_submodule(attachment.path)

    def shared_path(self, attachment: Attachment, read: str) -> str:
        """The path of the shared module whose value a branch reads under a name."""
        name = attachment.reads[read]
        return next(str(n.target) for n in self.module.graph.nodes if n.name == name)

    def held(self, name: str) -> bool:
        """Whether all of an adapter's branches are frozen, because another adapter uses them."""
        prefix = f"{BRANCHES}.{name}."
        own = [p for n, p in self.module.named_parameters() if n.startswith(prefix)]
        return bool(own) and not any(p.requires_grad for p in own)

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Everything an adapter learnt: its branches' tensors and the base tensors it trains."""
        prefix = f"{BRANCHES}.{name}."  # `ITSELF` has no branches
        reshard(self.module)
        branches = getattr(getattr(self.module, BRANCHES, None), name, None)
        tensors: dict[str, Tensor] = {}
        if isinstance(branches, nn.Module):
            persistent = set(branches.state_dict(keep_vars=True))
            stored = (*branches.named_parameters(), *branches.named_buffers())
            tensors = {f"{prefix}{n}": t.detach() for n, t in stored if n in persistent}
        tensors |= {n: t for n, t in self.removed.items() if n.startswith(prefix)}
        for owned in self.owned.get(name, ()):
            tensors[owned] = self.module.get_parameter(owned).detach()
        return tensors
