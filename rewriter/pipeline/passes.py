"""Passes: frozen dataclasses that plan what to do and then do it through the editor.

A pass is registered by being defined. Its text name is its file's stem; its options are its
dataclass fields, so that text, YAML and Python say the same thing.
"""

from __future__ import annotations

import re
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from ..edits.edit import Editor
from ..errors import OptionError, nearest
from ..parts.parts import Part
from ..program.history import Contract, Plan
from ..program.state import State
from .aliases import Alias, Entries, translated
from .by_site import maps_of
from .options import DEFAULT, adapt, fits, hints_of, type_name, write_value

REGISTRY: dict[str, type[Pass]] = {}
"""Text name -> pass class; filled by subclassing."""

_LAST = ("where", "name", "seed")
"""Options that all methods have, written behind their own."""

Made = TypeVar("Made")

NAME = re.compile(r"[A-Za-z_][\w-]{0,63}")


@dataclass(frozen=True)
class Saved:
    """One branch of a saved adapter.

    Attributes:
        target: the weight that it stands at.
        slot: of the branch.
        tensors: by the names that they have in it.
        plan: what its pass decided.
        member: of a preset, the name of the member that it is of.
    """

    target: str
    slot: str
    tensors: Mapping[str, Tensor]
    plan: Plan
    member: str = ""


class Worded(ABCMeta):
    """Makes passes of options in their own words or in other libraries'."""

    def __call__(cls: type[Made], *args: Any, **options: Any) -> Made:
        kind: Any = cls
        if args:
            own = ", ".join(f.name for f in fields(kind))
            raise OptionError(f"{cls.__name__} takes its options by name. Choose of: {own}.")
        return type.__call__(kind, **in_own_words(kind, options))


@dataclass(frozen=True, kw_only=True)
class Pass(metaclass=Worded):
    """A rewrite of a program.

    Class attributes:
        text: the name in pipeline text, taken from the file's stem.
        contract: what it promises about the outputs.
        portable: part of a saved artifact (a lowering is not: it depends on the machine).
        reshapes: it changes shapes of what earlier passes inserted, so that replaying can only
            load their values behind it.
        rewrites: it changes stored tensors of the base that no adapter trains.
        sharded: works on weights that are sharded over ranks, on all ranks together.
        sourced: it needs sources, so that its text alone runs nowhere.
        aliases: what other libraries call its options, see `aliases.py`.
        typed: options that text gave this pass, which its own text keeps, also where they are the
            defaults.
    """

    portable: ClassVar[bool] = True
    reshapes: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    sourced: ClassVar[bool] = False
    aliases: ClassVar[Mapping[str, Alias]] = {}
    typed: ClassVar[frozenset[str]] = frozenset()
    text: ClassVar[str] = ""
    contract: ClassVar[Contract] = Contract("exact")

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if abstract:
            return
        stem = cls.__module__.rpartition(".")[2]
        cls.text = stem
        known = REGISTRY.get(stem)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise OptionError(f"two passes are named {stem!r}: {known} and {cls}.")
        REGISTRY[stem] = cls

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for option in fields(self):
            got = getattr(self, option.name)
            if not fits(got, hints[option.name]):
                wanted = type_name(hints[option.name])
                raise OptionError(
                    f"{self.text}: option {option.name} must be {wanted}, not {got!r} "
                    f"({type(got).__name__})."
                )
        maps = maps_of(self)
        if not maps:
            self.check()
        if len(maps) == 1:  # of several, only sites say which values meet
            ((option, entries),) = maps.items()
            for value in entries.values():
                replace(self, **{option: value})

    def check(self) -> None:
        """Raises OptionError for values out of range; overridden by methods. Where options have
        values by site, it is asked of each site's."""

    def at_site(self, plan: Plan, site: str) -> Self:
        """This pass with the values that its options have at a site, by its id.

        Raises:
            OptionError: the plan does not say them.
        """
        maps = maps_of(self)
        if not maps:
            return self
        stated: Any = plan.decisions.get("options")
        values: Any = stated.get(site) if isinstance(stated, Mapping) else None
        if not isinstance(values, Mapping) or set(values) != set(maps):
            raise OptionError(
                f"{self.text}: the plan does not say {' and '.join(maps)} of {site or 'a branch'}. "
                "It was altered: save the adapter again, or leave that adapter out."
            )
        return replace(self, **values)

    def require(self, holds: bool, option: str, rule: str, remedy: str = "") -> None:
        """Raises OptionError unless `holds`.

        Args:
            rule: what the option must be.
            remedy: what to do, a sentence; by default, to give another value.
        """
        if not holds:
            got = getattr(self, option)
            remedy = remedy or f"Choose another: {self.text}{{{option}=...}}."
            raise OptionError(f"{self.text}: {option}={got!r}, but it must be {rule}. {remedy}")

    @property
    def random_seed(self) -> int:
        """Of what this pass draws."""
        return 0

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that this pass inserts, or None."""
        return None

    @property
    def departures(self) -> frozenset[str]:
        """What the branches, once trained, need not keep: `samples` (none influences another),
        `tokens` (none of a causal model sees a later one), `modes` (training without dropout is as
        evaluation), `gradients` (operands get those of what is computed)."""
        return frozenset()

    def promise(self) -> Contract:
        """The contract with these options."""
        return self.contract

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        """Decides what to do, reading `program` (and data or other artifacts), changing nothing."""
        del program, data, sources
        return Plan()

    def examine(self, before: State, after: State) -> Mapping[str, float]:
        """Measures what this pass promises beside its contract; figures for the certificate.

        Raises:
            VerifyError: it does not hold.
        """
        del before, after
        return {}

    def saved_part(self, saved: Saved) -> Part | None:
        """What a saved branch is in other libraries' files (`Branch.part`), told without a program;
        None where that takes one."""
        del saved
        return None

    @abstractmethod
    def apply(self, edit: Editor, plan: Plan) -> None:
        """Edits the fork that `edit` holds."""

    def __str__(self) -> str:
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in self.typed or f.default is MISSING or getattr(self, f.name) != f.default
        }
        given = dict(
            sorted(given.items(), key=lambda i: _LAST.index(i[0]) if i[0] in _LAST else -1)
        )
        if not given:
            return self.text
        return f"{self.text}{{{','.join(f'{k}={write_value(v)}' for k, v in given.items())}}}"


def lookup(name: str) -> type[Pass]:
    """The pass class of a text name.

    Raises:
        OptionError: there is none; names the nearest.
    """
    cls = REGISTRY.get(name)
    if cls is None:
        raise OptionError(
            f"there is no pass {name!r}. Nearest: {nearest(name, REGISTRY)}. "
            f"Passes: {', '.join(sorted(REGISTRY))}."
        )
    return cls


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """Builds a pass from its text name and option values, which its text will all show.

    Raises:
        OptionError: unknown pass, unknown option, or a wrong value.
    """
    cls = lookup(name)
    values = in_own_words(cls, options)
    hints = hints_of(cls)
    new = cls(**{option: adapt(item, hints[option]) for option, item in values.items()})
    object.__setattr__(new, "typed", frozenset(values))
    return new


def in_own_words(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a pass by the names of its fields.

    Raises:
        OptionError: a word that neither the pass nor another library has for an option of it.
    """
    known = [f.name for f in fields(cls)]
    if options.keys() <= set(known):
        return dict(options)
    given = translated(cls.text, cls.aliases, options, getattr(cls, "where", ""))
    for option in given:
        if option not in known:
            close = nearest(option, (*known, *cls.aliases))
            raise OptionError(
                f"{cls.text} has no option {option!r}. Nearest: {close}. "
                f"Options: {', '.join(known)}."
            )
    hints = hints_of(cls)
    usual = {f.name: f.default for f in fields(cls)}
    complete = {
        option: {**item, DEFAULT: usual[option]} if isinstance(item, Entries) else item
        for option, item in given.items()
    }
    return {option: adapt(item, hints[option]) for option, item in complete.items()}
