"""A captured model: a trainable graph, its sites, and the history of what was done to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .capture.spec import InputSpec
from .edits.trained import ITSELF
from .errors import CaptureError, PassError, nearest
from .fingerprint import Fingerprints, take
from .generate import generate
from .history import Attachment, Index, Record
from .module import CapturedModule, fork_module, outside_inference, same_view, state_tensors
from .sharded import equal, reshard
from .sites.sites import Sites
from .storage.identity import merkle_root, tensor_digest
from .text import diff_text, program_text

if TYPE_CHECKING:
    from .running.memory import Memory
    from .running.verify import Certificate

BRANCHES = "peftfx"
"""Name below which the module holds everything that passes insert."""


@dataclass(eq=False)
class Program:
    """A captured model. `peftfx.run` returns new programs; it never changes one.

    Attributes:
        module: a plain `fx.GraphModule`, trainable, usable wherever an `nn.Module` is; call it
            with the model's keyword inputs.
        spec: the inputs it accepts, with the range of every dynamic size.
        sites: the places that passes rewrite.
        history: what was done, in order.
        aliases: tied parameter names -> the first name of their tensor.
        attachments: the branches now in the graph.
        owned: adapter -> names of base parameters that it trains; those that the user trains
            himself belong to `ITSELF`, see `edits/trained.py`.
    """

    module: CapturedModule
    spec: InputSpec
    sites: Sites
    aliases: Mapping[str, str]
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
    owned: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
    added: tuple[str, ...] = ()
    """Names of parameters that the original model does not have (biases)."""
    untied: tuple[str, ...] = ()
    """Aliases that have a tensor of their own now."""
    removed: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Tensors of folded branches, kept so that unfolding is exact."""
    origin: Program | None = None
    dtype: torch.dtype | None = None
    """What `capture(dtype=...)` was asked for."""
    cached: str = ""
    """What the capture cache did: `recalled`, `stored`, or why not; empty without one."""
    prints: Fingerprints | None = None
    """What its frozen tensors and those of its base were like; taken when it is made."""

    _index: Index = field(default_factory=Index, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prints is None:
            self.prints = take(self)

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
        return f"Program({name}({self.spec}), {len(self.sites)} sites, {done})"

    # Parameters and modes.

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

    # Looking at it.

    def text(self) -> str:
        """The graph as stable, readable text: one line a node."""
        return program_text(self)

    def diff(self, other: Program | None = None) -> str:
        """What changed from `other` (default: the captured program) as a unified diff of text,
        with the counts of added nodes, sites and trainable parameters."""
        return diff_text(other or self.origin or self, self)

    def __str__(self) -> str:
        return self.text()

    def verify(self) -> list[Certificate]:
        """Checks the graph and measures every contract of the history again.

        Raises:
            VerifyError: the graph is malformed or a measured contract does not hold.
        """
        from .running.verify import verify_program

        return verify_program(self)

    def memory(
        self, batch: int | None = None, seq: int | None = None, *, optimizer: str = "adamw",
        **sizes: int,
    ) -> Memory:  # fmt: skip
        """What training keeps, in the program's mode, without running or allocating anything.

        Args:
            batch, seq: rows, and tokens of every sequence; what the program's spec calls `batch`
                and `sequence`.
            optimizer: name of a torch optimizer, see `running/memory.STATES`.
            sizes: other dynamic sizes, or single ones, by the names in `program.spec`.

        Raises:
            InputError: a size is missing, unknown or out of range.
            OptionError: an unknown optimizer.
            PassError: a size inside the model depends on values.
        """
        from .running.memory import memory

        return memory(self, {"batch": batch, "sequence": seq}, sizes, optimizer)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in this program, in the order of insertion."""
        return tuple(r.adapter for r in self.history if r.adapter is not None)

    @property
    def owners(self) -> tuple[str, ...]:
        """Who holds what is trained: the program itself, if it trains anything, and adapters."""
        return ((ITSELF,) if self.owned.get(ITSELF) else ()) + self.adapters

    @property
    def base(self) -> Program:
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
        found: dict[str, Tensor] = dict(self.extras)
        for name, tensor in self._stored():
            if not self.inserts(name) and self.aliases.get(name, name) == name:
                found[name] = tensor.detach()
        return dict(sorted(found.items()))

    @property
    def inserted(self) -> tuple[str, ...]:
        """What the names of all tensors of branches and shared modules start with."""
        return tuple(f"{path}." for path in (*(a.path for a in self.attachments), *self.shared))

    def inserts(self, name: str) -> bool:
        """Whether a stored tensor, or a module below one, belongs to a branch or shared module."""
        return self._index.of(self.attachments, self.shared).holds(name)

    def attached(self, site: str) -> list[Attachment]:
        """The branches at a site, in order of insertion."""
        return self._index.of(self.attachments, self.shared).at(site)

    @property
    def folders(self) -> set[str]:
        """Names of the adapters that branches and shared modules are stored below."""
        return self._index.of(self.attachments, self.shared).folders

    def updated(self) -> dict[str, Tensor]:
        """Tensors of the base that forwards have written since the capture (batch statistics)."""
        before = dict(self.base._stored())
        names = state_tensors(self.module) & before.keys() if self.origin is not None else ()
        held = dict(self._stored()) if names else {}
        return {n: held[n].detach() for n in sorted(names) if not equal(held[n], before[n])}

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        reshard(self.module)
        yield from self.module.named_parameters()
        yield from self.module.named_buffers()

    # Getting results out.

    def export_state_dict(self, strict: bool = True) -> dict[str, Tensor]:
        """The tensors under their original names, in their original dtypes; loads into the
        original, unmodified model.

        A quantised weight is written as the dense matrix that it stands for.

        Args:
            strict: refuse if the program holds tensors that the original model has no name
                for (branches not folded, added biases), or that do not fit it any more (cut
                channels); False returns them too.

        Raises:
            ExportError: such tensors exist; the message lists them.
        """
        from .exported import export_state_dict

        return export_state_dict(self, strict)

    def reshaped(self) -> list[str]:
        """Names of the captured program's tensors that have another shape now."""
        before = dict(self.base._stored()) if self.origin is not None else {}
        return [n for n, t in self._stored() if n in before and before[n].shape != t.shape]

    def without(self, name: str) -> Program:
        """The program without one adapter; every other adapter keeps its current values.

        Raises:
            PassError: there is no such adapter.
        """
        self._known(name)
        keep = tuple(a for a in self.adapters if a != name)
        return self.only(keep)

    def only(self, names: tuple[str, ...]) -> Program:
        """The program with just the named adapters, rebuilt exactly from the captured base."""
        from .running.replay import replay

        for name in names:
            self._known(name)
        return replay(self, names)

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise PassError(
                f"there is no adapter {name!r}. Adapters: {', '.join(self.adapters) or 'none'}; "
                f"nearest: {nearest(name, self.adapters)}."
            )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        eos_token_id: int | tuple[int, ...] | None = None,
        pad_token_id: int | None = None,
        **given: Tensor,
    ) -> Tensor:
        """Greedy continuation without a cache.

        Args:
            input_ids: `[batch, sequence]` integer prompt (pad on the left).
            attention_mask: `[batch, sequence]`, 1 for real tokens; needed if it was captured.
            max_new_tokens: how many tokens to add at most.
            eos_token_id: stops a row (default: the model's own, if it has one).
            pad_token_id: fills rows that have stopped (default: the model's, else the first end).
            given: other inputs, the same at each step, such as a bank's adapter ids.

        Returns:
            Prompt and continuation, `[batch, sequence + new]`.

        Raises:
            InputError: the program does not return logits per token.
        """
        ends = eos_token_id, pad_token_id
        return generate(self, input_ids, attention_mask, max_new_tokens, *ends, given)

    # Structure.

    def to(self, device: torch.device | str) -> Program:
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

    @outside_inference
    def _moved(self, device: torch.device, done: dict[Any, Tensor]) -> Program:
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
        return replace(moved, extras=extras, sample=sample, removed=removed, origin=origin)

    @outside_inference
    def fork(self) -> Program:
        """An independent copy: own Parameter objects, frozen storage shared, trained copied."""
        reshard(self.module)
        forked = replace(self, module=fork_module(self.module), origin=self.base)
        forked.prints = take(forked)
        return forked

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
        held = getattr(getattr(self.module, BRANCHES, None), name, None)
        found: dict[str, Tensor] = {}
        if isinstance(held, nn.Module):
            persistent = set(held.state_dict(keep_vars=True))
            stored = (*held.named_parameters(), *held.named_buffers())
            found = {f"{prefix}{n}": t.detach() for n, t in stored if n in persistent}
        found |= {n: t for n, t in self.removed.items() if n.startswith(prefix)}
        for owned in self.owned.get(name, ()):
            found[owned] = self.module.get_parameter(owned).detach()
        return found
