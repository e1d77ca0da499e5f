"""Passes: frozen dataclasses that plan what to do and then do it through the editor.

A pass is registered by being defined. Its text name is its file's stem; its options are its
dataclass fields, so that text, YAML and Python say the same thing.
"""

from __future__ import annotations

import re
import types
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from ..edits.edit import Editor
from ..errors import OptionError, SelectorError, nearest
from ..program import Program
from ..sites.selector import WORDS
from ..sites.sites import LinearSite, Site
from .controller import Controller
from .verify import Contract

REGISTRY: dict[str, type[Pass]] = {}
"""Text name -> pass class; filled by subclassing."""

NAME = re.compile(r"[A-Za-z_][\w-]{0,63}")


@dataclass(frozen=True)
class Plan:
    """What a pass decided: strict JSON, and tensors for what JSON cannot hold.

    Replaying a plan needs neither the data nor the sources that led to it.
    """

    decisions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of a program.

    Class attributes:
        text: the name in pipeline text, taken from the file's stem.
        contract: what it promises about the outputs.
        portable: part of a saved artifact (a lowering is not: it depends on the machine).
        reshapes: it changes shapes of what earlier passes inserted, so that replaying can only
            load their values behind it.
        sharded: works on weights that are sharded over ranks, on all ranks together.
    """

    portable: ClassVar[bool] = True
    reshapes: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
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
        hints = get_type_hints(type(self))
        for option in fields(self):
            got = getattr(self, option.name)
            if not _fits(got, hints[option.name]):
                wanted = _type_name(hints[option.name])
                raise OptionError(
                    f"{self.text}: option {option.name} must be {wanted}, not {got!r} "
                    f"({type(got).__name__})."
                )
        self.check()

    def check(self) -> None:  # noqa: B027 - optional
        """Raises OptionError for values out of range; overridden by methods."""

    def require(self, holds: bool, option: str, rule: str) -> None:
        """Raises OptionError unless `holds`."""
        if not holds:
            got = getattr(self, option)
            raise OptionError(f"{self.text}: {option}={got!r}, but it must be {rule}.")

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that this pass inserts, or None."""
        return None

    def promise(self) -> Contract:
        """The contract with these options."""
        return self.contract

    def plan(self, program: Program, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        """Decides what to do, reading `program` (and data or other artifacts), changing nothing."""
        del program, data, sources
        return Plan()

    def examine(self, before: Program, after: Program) -> Mapping[str, float]:
        """Measures what this pass promises beside its contract; figures for the certificate.

        Raises:
            VerifyError: it does not hold.
        """
        del before, after
        return {}

    @abstractmethod
    def apply(self, edit: Editor, plan: Plan) -> None:
        """Edits the fork that `edit` holds."""

    def __str__(self) -> str:
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }
        common = [f.name for f in fields(Method)]
        given = dict(
            sorted(given.items(), key=lambda i: common.index(i[0]) if i[0] in common else -1)
        )
        if not given:
            return self.text
        return f"{self.text}{{{','.join(f'{k}={write_value(v)}' for k, v in given.items())}}}"


@dataclass(frozen=True, kw_only=True)
class Method(Pass, abstract=True):
    """A fine-tuning method: selects sites and inserts a branch at each.

    Class attributes:
        kinds: the kinds of sites that it works on.
        controller: what it needs while it trains.
        folds: what becomes of it after training, in a few words (`exactly`, `no: not linear`).

    Attributes:
        where: selector of the sites (see `rewriter/sites/selector.py`).
        name: the adapter's name; default the method's text name.
        seed: of the random initialisation.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    contract: ClassVar[Contract] = Contract("identity")
    controller: ClassVar[type[Controller]] = Controller
    folds: ClassVar[str] = ""

    where: str = ""
    name: str = ""
    seed: int = 0

    @property
    def adapter(self) -> str:
        return self.name or self.text

    def __post_init__(self) -> None:
        super().__post_init__()
        if not NAME.fullmatch(self.adapter):
            raise OptionError(
                f"{self.text}: name={self.name!r} is not a name: letters, digits, _ and -, "
                "starting with a letter, at most 64 characters."
            )

    @property
    def placed(self) -> bool:
        """Whether the user said where; without, the method's own placement is taken."""
        return self.where != type(self).where

    def sites(self, program: Program) -> list[Site]:
        """The sites to edit.

        The method's own placement takes each of its alternatives that the model has.

        Raises:
            SelectorError: what the user selected, or the whole placement, matches nothing.
        """
        found, _ = self._found(program)
        return found

    def _found(self, program: Program) -> tuple[list[Site], list[str]]:
        """The sites, and the alternatives of the placement that the model does not have."""
        if self.placed:
            return program.sites.select(self.where, self.kinds), []
        found: list[Site] = []
        absent: list[str] = []
        for part in self.where.split("|"):
            try:
                found += program.sites.select(part, self.kinds)
            except SelectorError:
                absent.append(part)
        if not found:
            raise SelectorError(self._nowhere(program))
        return [s for s in program.sites if s in found], absent

    def _nowhere(self, program: Program) -> str:
        roles = Counter(s.role for s in program.sites.of(*self.kinds))
        kinds = " or ".join(self.kinds)
        if not roles:
            have = Counter(s.kind for s in program.sites)
            other = ", ".join(f"{n} {kind}" for kind, n in sorted(have.items()))
            return (
                f"{self.text} does not apply to this model: it works on {kinds} sites, and the "
                f"model has none. It has: {other or 'no sites'}. Choose another method."
            )
        role = roles.most_common(1)[0][0]
        site = next(s for s in program.sites.of(*self.kinds) if s.role == role)
        example = max(sorted(site.tags & WORDS), key=len)
        listed = ", ".join(f"{role} ({n})" for role, n in sorted(roles.items()))
        return (
            f"{self.text}: the usual places ({self.where}) are not in this model. Its {kinds} "
            f"sites have the roles {listed}. Say where, for example "
            f"{self.text}{{where={example}}}; print program.sites to see them all."
        )

    def plan(self, program: Program, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        decisions: dict[str, Any] = {"sites": [s.id for s in self.sites(program)]}
        if absent := self._found(program)[1]:
            decisions["absent"] = absent
        return Plan(decisions)

    def apply(self, edit: Editor, plan: Plan) -> None:
        self.insert_all(edit, [edit.program.sites[i] for i in plan.decisions["sites"]], plan)
        for part in plan.decisions.get("absent", ()):
            edit.skipped.append((part, "the model has no such place"))

    def insert_all(self, edit: Editor, sites: Sequence[Any], plan: Plan) -> None:
        """Edits all sites; for methods that do not edit one by one."""
        del plan
        for site in sites:
            if isinstance(site, LinearSite) and site.fixed:
                edit.skip(site, site.obstacle)
            else:
                self.insert(edit, site)

    def insert(self, edit: Editor, site: Any) -> None:
        """Edits one site."""
        raise NotImplementedError

    def settle(
        self, program: Program, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        """What training has decided: for each branch that shall be replaced, by its path, the
        arguments of `Branch.settled`, strict JSON or tensors. Nothing by default.

        Args:
            program: the trained program.
            data: batches to calibrate on, or None.
            inputs: inputs that shall be constants from now on.
        """
        del program, data, inputs
        return {}


def lookup(name: str) -> type[Pass]:
    """The pass class of a text name.

    Raises:
        OptionError: there is none; names the nearest.
    """
    found = REGISTRY.get(name)
    if found is None:
        raise OptionError(
            f"there is no pass {name!r}. Nearest: {nearest(name, REGISTRY)}. "
            f"Passes: {', '.join(sorted(REGISTRY))}."
        )
    return found


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """Builds a pass from its text name and option values.

    Raises:
        OptionError: unknown pass, unknown option, or a wrong value.
    """
    found = lookup(name)
    known = [f.name for f in fields(found)]
    hints = get_type_hints(found)
    values: dict[str, Any] = {}
    for option, item in options.items():
        if option not in known:
            raise OptionError(
                f"{name} has no option {option!r}. Nearest: {nearest(option, known)}. "
                f"Options: {', '.join(known)}."
            )
        values[option] = _adapt(item, hints[option])
    return found(**values)


def _adapt(item: Any, hint: Any) -> Any:
    """Lists become tuples, whole numbers floats, and one word a tuple of one, where declared."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(item, list):
            return tuple(item)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if get_origin(kind) is tuple and isinstance(item, str):
            return (item,)
    if float in kinds and int not in kinds and type(item) is int:
        return float(item)
    return item


def _fits(got: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(got, h) for h in get_args(hint))
    if origin is dict:
        kinds = get_args(hint)
        return isinstance(got, dict) and all(
            _fits(k, kinds[0]) and _fits(v, kinds[1])
            for k, v in got.items()  # pyright: ignore[reportUnknownVariableType]
        )
    if origin is tuple:
        inner = get_args(hint)[0]
        return isinstance(got, tuple) and all(_fits(g, inner) for g in got)  # pyright: ignore[reportUnknownVariableType]
    if origin is not None and origin.__name__ == "Literal":
        return got in get_args(hint)
    if hint is float:
        return type(got) in (int, float)
    if hint is int:
        return type(got) is int
    return isinstance(got, hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is not None and getattr(get_origin(hint), "__name__", "") == "Literal":
        return "one of " + ", ".join(str(a) for a in get_args(hint))
    return str(getattr(hint, "__name__", hint)).replace("typing.", "")


def write_value(item: Any) -> str:
    """An option value as pipeline text; `syntax.parse` reads it back."""
    if item is None:
        return "none"
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, tuple | list):
        return f"[{','.join(write_value(i) for i in item)}]"  # pyright: ignore[reportUnknownVariableType]
    if isinstance(item, Mapping):
        return "{" + ",".join(f"{k}={write_value(v)}" for k, v in item.items()) + "}"  # pyright: ignore[reportUnknownVariableType]
    text = str(item)
    balanced = re.sub(r"[^()]", "", text)
    while "()" in balanced:
        balanced = balanced.replace("()", "")
    plain = not balanced and re.fullmatch(r"[^\s,;{}\[\]'\"=\\][^,;{}\[\]'\"\\]*", text)
    number = re.fullmatch(r"[-+]?(\d|\.\d|inf|nan).*", text, re.IGNORECASE)
    if plain and not number and text not in ("true", "false", "none") and text == text.strip():
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
