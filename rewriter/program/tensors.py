"""What is known of stored tensors beside their values: names, who trains them, where they are from.

Who reads one is told by the graph alone, see `readers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Tensors:
    """The table of a program's stored tensors; never changed, only derived from.

    Attributes:
        aliases: tied parameter names -> the first name of their tensor.
        untied: aliases that have a tensor of their own now.
        owned: adapter -> names of base parameters that it trains; those that the user trains
            himself belong to `history.ITSELF`.
        added: names of parameters that the original model does not have (biases).
        removed: tensors of branches that have left the graph, by name, kept so that going back is
            exact.
    """

    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    untied: tuple[str, ...] = ()
    owned: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
    added: tuple[str, ...] = ()
    removed: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def stored(self, name: str) -> str:
        """The name that the tensor called `name` is stored under."""
        return name if name in self.untied else self.aliases.get(name, name)

    def names(self, name: str) -> list[str]:
        """All names of the tensor stored under a name, that one first."""
        others = (a for a, c in self.aliases.items() if c == name and a not in self.untied)
        return [name, *others]

    @property
    def trained(self) -> frozenset[str]:
        """The base parameters that somebody trains."""
        return frozenset(n for names in self.owned.values() for n in names)

    def owner(self, name: str) -> str | None:
        """The first who trains a base parameter; None if nobody does."""
        return next((owner for owner, names in self.owned.items() if name in names), None)

    def with_trained(self, owner: str, names: Iterable[str]) -> Self:
        """The table once an adapter (or `ITSELF`) trains more base parameters."""
        mine = tuple(dict.fromkeys((*self.owned.get(owner, ()), *names)))
        return replace(self, owned={**self.owned, owner: mine})

    def with_added(self, name: str) -> Self:
        """The table with a parameter that the original model does not have."""
        return replace(self, added=(*self.added, name))

    def with_untied(self, name: str, others: Iterable[str]) -> Self:
        """The table once `name` has a tensor of its own, which `others` are names of, too."""
        aliases = {**self.aliases, **dict.fromkeys(others, name)}
        return replace(self, aliases=aliases, untied=(*self.untied, name))

    def with_removed(self, values: Mapping[str, Tensor]) -> Self:
        """The table with the last values of what leaves the graph."""
        return replace(self, removed={**self.removed, **values})
