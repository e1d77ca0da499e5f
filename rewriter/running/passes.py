"""Passes: frozen dataclasses that plan what to do and then do it through the editor.

A pass is registered by being defined. Its text name is its file's stem; its options are its
dataclass fields, so that text, YAML and Python say the same thing.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from keyword import iskeyword
from typing import Any, ClassVar, get_type_hints

from torch import Tensor, nn

from ..edits.edit import Editor
from ..errors import OptionError, PassError, SelectorError, nearest
from ..program import Program
from ..sites.selector import Selection, meaning, select
from ..sites.sites import LinearSite, Site, listed
from .controller import Controller
from .options import adapt, fits, type_name, write_value
from .placing import example_word, left_out
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
            if not fits(got, hints[option.name]):
                wanted = type_name(hints[option.name])
                raise OptionError(
                    f"{self.text}: option {option.name} must be {wanted}, not {got!r} "
                    f"({type(got).__name__})."
                )
        self.check()

    def check(self) -> None:  # noqa: B027 - optional
        """Raises OptionError for values out of range; overridden by methods."""

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
        seed: of the random initialisation; by default 0, or made of the name where one is given,
            so that two adapters of a method start apart.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    contract: ClassVar[Contract] = Contract("identity")
    controller: ClassVar[type[Controller]] = Controller
    folds: ClassVar[str] = ""

    where: str = ""
    name: str = ""
    seed: int | None = None

    @property
    def adapter(self) -> str:
        return self.name or self.text

    @property
    def random_seed(self) -> int:
        if self.seed is not None:
            return self.seed
        return 0 if self.adapter == self.text else zlib.crc32(self.adapter.encode())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not NAME.fullmatch(self.adapter):
            raise OptionError(
                f"{self.text}: name={self.name!r} is not a name: letters, digits, _ and -, "
                "starting with a letter, at most 64 characters."
            )
        if self.name and (iskeyword(self.name) or hasattr(nn.Module(), self.name)):
            raise OptionError(
                f"{self.text}: name={self.name!r} is a word of Python or of torch's modules, which "
                f"cannot name one. Choose another, such as {self.adapter}_1."
            )
        in_range = self.seed is None or 0 <= self.seed < 2**63
        self.require(in_range, "seed", "none, or a number from 0 to 2^63 - 1")

    @property
    def placed(self) -> bool:
        """Whether the user said where; without, the method's own placement is taken."""
        usual = type(self).where
        return self.where != usual and (not usual or meaning(self.where) != meaning(usual))

    def sites(self, program: Program) -> list[Site]:
        """The sites to edit.

        The method's own placement takes each of its alternatives that the model has.

        Raises:
            SelectorError: what the user selected, or the whole placement, matches nothing that
                the method takes.
        """
        return list(self._selection(program)[0].taken)

    def obstacle(self, site: Any) -> str:
        """Why the options do not fit a site that the method takes; empty if they do."""
        del site
        return ""

    def _selection(self, program: Program) -> tuple[Selection, list[str]]:
        """What is selected, and the alternatives of the placement that the model does not have."""
        every = program.sites.items
        if not self.where.strip():
            raise SelectorError(
                f"{self.text}: where is empty, and selects nothing. Say where, for example "
                f"{self.text}{{where={example_word(program, self.kinds)}}}."
            )
        if self.placed:
            selection = select(self.where, every, self.kinds)
            if not selection.taken:
                raise SelectorError(self._unsupported(program, selection))
            return selection, []
        taken: set[Site] = set()
        left: set[Site] = set()
        absent: list[str] = []
        for part in type(self).where.split("|"):
            try:
                selection = select(part, every, self.kinds)
            except SelectorError:
                absent.append(part)
                continue
            taken.update(selection.taken)
            left.update(selection.left)
        if not taken:
            raise SelectorError(self._nowhere(program))
        in_order = (tuple(s for s in every if s in those) for those in (taken, left - taken))
        return Selection(*in_order), absent

    def _nowhere(self, program: Program) -> str:
        roles = Counter(s.role for s in program.sites.of(*self.kinds))
        kinds = " or ".join(self.kinds)
        if not roles:
            have = Counter(s.kind for s in program.sites)
            other = ", ".join(f"{n} {kind}" for kind, n in sorted(have.items()))
            return (
                f"{self.text} does not apply to this model: it works on {kinds} sites, and the "
                f"model has none. It has: {other or 'no sites'}. Choose another method"
                f"{_methods_for(have)}."
            )
        counted = ", ".join(f"{role} ({n})" for role, n in sorted(roles.items()))
        example = example_word(program, self.kinds)
        return (
            f"{self.text}: the usual places ({self.where}) are not in this model. Its {kinds} "
            f"sites have the roles {counted}. Say where, for example "
            f"{self.text}{{where={example}}}; print program.sites to see them all."
        )

    def _unsupported(self, program: Program, selection: Selection) -> str:
        example = example_word(program, self.kinds)
        elsewhere = f"Say where, for example {self.text}{{where={example}}}, or choose" if example \
            else "Choose"  # fmt: skip
        return (
            f"{self.text}: where={self.where!r} matches {listed(selection.left)}, but "
            f"{self._works_on()}. {elsewhere} another method"
            f"{_methods_for(s.kind for s in selection.left)}."
        )

    def _works_on(self) -> str:
        return f"{self.text} works on {' and '.join(self.kinds)} sites only"

    def _why_left(self, kind: str) -> str:
        if kind in self.kinds:
            return f"where={self.where!r} does not name {kind} sites"
        return f"{kind}: {self._works_on()}"

    def plan(self, program: Program, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        selection, absent = self._selection(program)
        sites = self.sites(program)
        free = [s for s in sites if not (isinstance(s, LinearSite) and s.fixed)]
        misfits = {s.id: reason for s in free if (reason := self.obstacle(s))}
        if free and len(misfits) == len(free):
            where, reason = next(iter(misfits.items()))
            raise OptionError(f"{self.text}: no selected site fits. {where}: {reason}.")
        decisions: dict[str, Any] = {"sites": [s.id for s in sites if s.id not in misfits]}
        if absent:
            decisions["absent"] = absent
        if skipped := misfits | left_out(program, selection.left, self._why_left):
            decisions["skipped"] = skipped
        return Plan(decisions)

    def apply(self, edit: Editor, plan: Plan) -> None:
        sites = [edit.program.sites[i] for i in plan.decisions["sites"]]
        for site in sites:
            if site.kind not in self.kinds:  # planned by an earlier version
                edit.skip(site, self._why_left(site.kind))
        self.insert_all(edit, [s for s in sites if s.kind in self.kinds], plan)
        edit.skipped.extend(plan.decisions.get("skipped", {}).items())
        for part in plan.decisions.get("absent", ()):
            edit.skipped.append((part, "the model has no such place"))

    def insert_all(self, edit: Editor, sites: Sequence[Any], plan: Plan) -> None:
        """Edits all sites; for methods that do not edit one by one."""
        del plan
        for site in sites:
            if isinstance(site, LinearSite) and site.fixed:
                edit.skip(site, site.obstacle)
                continue
            done = len(edit.edited), len(edit.skipped)
            self.insert(edit, site)
            if done == (len(edit.edited), len(edit.skipped)):
                raise PassError(
                    f"{self.text}: insert did nothing at {site.id}. It must hand a branch to the "
                    "editor (edit.add, edit.after, edit.express, ...), or say why it leaves the "
                    "site alone (edit.skip)."
                )

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


def _methods_for(kinds: Iterable[str]) -> str:
    """`; conv sites: bitfit, diff_pruning`: the methods that work on each of some kinds."""
    parts: list[str] = []
    for kind in sorted(set(kinds)):
        names = [
            n for n, p in sorted(REGISTRY.items()) if issubclass(p, Method) and kind in p.kinds
        ]
        if names:
            parts.append(f"{kind} sites: {', '.join(names)}")
    return f" ({'; '.join(parts)})" if parts else ""


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
        values[option] = adapt(item, hints[option])
    return found(**values)
