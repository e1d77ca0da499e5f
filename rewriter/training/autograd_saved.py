"""What autograd saves for the backward pass: counted in a real forward, or in one on fake tensors.

Fake tensors have shapes but no storage, so nothing is allocated; operators choose the same kernels
and save the same tensors as on real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from ..errors import PassError
from ..graph.aten import placeholders, source_line
from ..graph.module import device_of
from ..program.state import State
from ..tracing.propagate import quiet


class _Held:
    """A saved tensor, for as long as the graph of autograd holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Counts what autograd saves while it is entered, once for each storage.

    What counts is still held when the context is left, so outputs have to live until then.

    Args:
        known: tensors that exist anyway (parameters, buffers, inputs) and do not count.

    Attributes:
        label: what to count the next saved tensors under.
        by_label: bytes, after the context.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {storage(t) for t in known}
        self._held: list[tuple[weakref.ref[_Held], Hashable]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda h: h.tensor)
        self.label: Hashable = None
        self.by_label: dict[Hashable, int] = {}

    @property
    def total(self) -> int:
        """Bytes of all labels together."""
        return sum(self.by_label.values())

    def _pack(self, tensor: Tensor) -> _Held:
        packed = _Held(tensor)
        self._held.append((weakref.ref(packed), self.label))
        return packed

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for reference, label in self._held:
            packed = reference()
            if packed is None or storage(packed.tensor) in self._known:
                continue
            self._known.add(storage(packed.tensor))
            size = packed.tensor.untyped_storage().nbytes()
            self.by_label[label] = self.by_label.get(label, 0) + size
        self._held.clear()


def storage(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage()._cdata


class _Labelled(Interpreter):
    """Runs a graph, telling before each node where it belongs."""

    def __init__(self, gm: GraphModule, labels: Mapping[Node, Hashable], saved: SavedBytes) -> None:
        super().__init__(gm)
        self.labels, self.saved = labels, saved

    def run_node(self, n: Node) -> Any:
        self.saved.label = self.labels[n]
        try:
            return super().run_node(n)
        except Exception as error:
            line = source_line(n) or n.format_node()
            raise PassError(
                f"memory cannot be told without values at {n.name} ({line}): {error}"
            ) from error


class _Runner(nn.Module):
    """The graph as a module, so that its tensors can be replaced for one run."""

    def __init__(self, gm: GraphModule, labels: Mapping[Node, Hashable], saved: SavedBytes) -> None:
        super().__init__()
        self.gm, self.labels, self.saved = gm, labels, saved

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        taken: dict[Node, Any] = {n: inputs[name] for name, n in placeholders(self.gm).items()}
        run = _Labelled(self.gm, self.labels, self.saved)
        with self.saved:
            return run.run(initial_env=taken, enable_io_processing=False)


def stored(gm: GraphModule) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones once."""
    return {**dict(gm.named_parameters()), **dict(gm.named_buffers())}


def saved_bytes(
    program: State, labels: Mapping[Node, Hashable], sizes: Mapping[str, int]
) -> dict[Any, int]:
    """Bytes that one forward of a program saves, by the labels of its nodes.

    Raises:
        PassError: a size inside depends on values.
    """
    gm, mode = program.module, FakeTensorMode(allow_non_fake_inputs=True)
    device = torch.device("cpu") if device_of(gm).type == "meta" else device_of(gm)

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor, static_shapes=True)
        stand_in = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
        return nn.Parameter(stand_in, tensor.requires_grad) if tensor.requires_grad else stand_in

    with quiet(), mode, torch.enable_grad():
        state = {f"gm.{name}": fake(tensor) for name, tensor in stored(gm).items()}
        inputs = {n: t.to(device) for n, t in program.spec.example(None, **sizes).items()}
        saved = SavedBytes([*state.values(), *inputs.values()])
        runner = _Runner(gm, labels, saved)
        outputs = torch.func.functional_call(runner, state, (inputs,))
        del outputs
    return saved.by_label
