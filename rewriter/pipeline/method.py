"""Fine-tuning methods: passes that select sites and insert a branch at each."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, ClassVar

from torch import nn

from ..edits.edit import Editor
from ..errors import OptionError, PassError, SelectorError
from ..program.history import Contract, Plan
from ..program.selector import Selection, meaning, named_alone, select, words
from ..program.sites import LinearSite, Site, listed
from ..program.state import State
from .by_site import values_at
from .controller import Controller
from .passes import NAME, REGISTRY, Pass
from .placing import example_word, left_out


@dataclass(frozen=True, kw_only=True)
class Method(Pass, abstract=True):
    """A fine-tuning method: selects sites and inserts a branch at each.

    Class attributes:
        kinds: the kinds of sites that it works on.
        named: further kinds, taken only where the selector names one, or a `name:` in it is of
            one alone, or it matches nothing else.
        controller: what it needs while it trains.
        folds: what becomes of it after training, in a few words (`exactly`, `no: not linear`).
        nested: its ranks are nested, so that `bake` may be asked for one.

    Attributes:
        where: selector of the sites (see `rewriter/program/selector.py`).
        name: the adapter's name; default the method's text name.
        seed: of the random initialisation; by default 0, or made of the name where one is given,
            so that two adapters of a method start apart.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    named: ClassVar[tuple[str, ...]] = ()
    contract: ClassVar[Contract] = Contract("identity")
    controller: ClassVar[type[Controller]] = Controller
    folds: ClassVar[str] = ""
    nested: ClassVar[bool] = False

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

    def sites(self, program: State) -> list[Site]:
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

    def _selection(self, program: State) -> tuple[Selection, list[str]]:
        """What is selected, and the alternatives of the placement that the model does not have."""
        every = program.sites.items
        if not self.where.strip():
            raise SelectorError(
                f"{self.text}: where is empty, and selects nothing. Say where, for example "
                f"{self.text}{{where={example_word(program, self.kinds)}}}."
            )
        if self.placed:
            said = words(self.where) | named_alone(self.where, every, self.kinds)
            kinds = (*self.kinds, *(k for k in self.named if k in said))
            selection = select(self.where, every, kinds)
            if not selection.taken and self.named:
                selection = select(self.where, every, (*self.kinds, *self.named))
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

    def _nowhere(self, program: State) -> str:
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
            f"{self.text}{{where={example}}}; program.sites, or peftfx sites MODEL, lists them."
        )

    def _unsupported(self, program: State, selection: Selection) -> str:
        example = example_word(program, self.kinds)
        elsewhere = f"Say where, for example {self.text}{{where={example}}}, or choose" if example \
            else "Choose"  # fmt: skip
        return (
            f"{self.text}: where={self.where!r} matches {listed(selection.left)}, but "
            f"{self._works_on()}. {elsewhere} another method"
            f"{_methods_for(s.kind for s in selection.left)}."
        )

    def _works_on(self) -> str:
        kinds = (*self.kinds, *self.named)
        return f"{self.text} works on {' and '.join(kinds)} sites only"

    def _why_left(self, kind: str) -> str:
        if kind in (*self.kinds, *self.named):
            return f"where={self.where!r} does not name {kind} sites"
        return f"{kind}: {self._works_on()}"

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        selection, absent = self._selection(program)
        sites = self.sites(program)
        free = [s for s in sites if not self._fixed(s)]
        values = values_at(self, free, program.sites.items)
        stated = Plan({"options": values})
        misfits = {s.id: why for s in free if (why := self.at_site(stated, s.id).obstacle(s))}
        if free and len(misfits) == len(free):
            where, reason = next(iter(misfits.items()))
            raise OptionError(f"{self.text}: no selected site fits. {where}: {reason}.")
        decisions: dict[str, Any] = {"sites": [s.id for s in sites if s.id not in misfits]}
        if values:
            decisions["options"] = {i: v for i, v in values.items() if i not in misfits}
        if absent:
            decisions["absent"] = absent
        if named := sorted({s.kind for s in sites} & set(self.named)):
            decisions["kinds"] = named
        if skipped := misfits | left_out(program, selection.left, self._why_left):
            decisions["skipped"] = skipped
        return Plan(decisions)

    def apply(self, edit: Editor, plan: Plan) -> None:
        sites = [edit.program.sites[i] for i in plan.decisions["sites"]]
        kinds = (*self.kinds, *plan.decisions.get("kinds", ()))
        for site in sites:
            if site.kind not in kinds:  # planned by an earlier version
                edit.skip(site, f"{site.kind}: a plan of a version that left such sites alone")
        self.insert_all(edit, [s for s in sites if s.kind in kinds], plan)
        edit.skipped.extend(plan.decisions.get("skipped", {}).items())
        for part in plan.decisions.get("absent", ()):
            edit.skipped.append((part, "the model has no such place"))

    def insert_all(self, edit: Editor, sites: Sequence[Any], plan: Plan) -> None:
        """Edits all sites; for methods that do not edit one by one."""
        for site in self.free(edit, sites):
            done = len(edit.edited), len(edit.skipped)
            self.at_site(plan, site.id).insert(edit, site)
            if done == (len(edit.edited), len(edit.skipped)):
                raise PassError(
                    f"{self.text}: insert did nothing at {site.id}. It must hand a branch to the "
                    "editor (edit.add, edit.after, edit.express, ...), or say why it leaves the "
                    "site alone (edit.skip)."
                )

    def free(self, edit: Editor, sites: Sequence[Any]) -> list[Any]:
        """The sites where a branch can stand; the others are skipped, with the reason."""
        taken: list[Any] = []
        for site in sites:
            reason = site.obstacle if self._fixed(site) else ""
            if not reason and site.kind in self.named:
                reason = edit.obstacle(site)
            if reason:
                edit.skip(site, reason)
            else:
                taken.append(site)
        return taken

    def _fixed(self, site: Site) -> bool:
        """Whether no branch can stand at a site, whatever the options are."""
        if isinstance(site, LinearSite):
            return bool(site.fixed)
        return site.kind in self.named and bool(site.obstacle)

    def insert(self, edit: Editor, site: Any) -> None:
        """Edits one site."""
        raise NotImplementedError

    @property
    def shown(self) -> tuple[str, ...]:
        """Outputs that it adds for training, which go once it is settled."""
        return ()

    def chosen(self, program: State, data: Any, inputs: Mapping[str, int]) -> Mapping[str, int]:
        """Inputs that data choose, beside those that shall be constants already. None by default.

        Args:
            program, data, inputs: as of `settle`.
        """
        del program, data, inputs
        return {}

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        """What training has decided: for each branch that shall be replaced, by its path, the
        arguments of `Branch.settled`, strict JSON or tensors. Nothing by default.

        Args:
            program: the trained program.
            data: batches to calibrate on, or None.
            inputs: inputs that shall be constants from now on; of nested ranks also `rank`, how
                many shall be left.
        """
        del program, data, inputs
        return {}


def _methods_for(kinds: Iterable[str]) -> str:
    """`; conv sites: bitfit, diff_pruning`: the methods that work on each of some kinds."""
    parts: list[str] = []
    for kind in sorted(set(kinds)):
        names = [
            n
            for n, p in sorted(REGISTRY.items())
            if issubclass(p, Method) and kind in (*p.kinds, *p.named)
        ]
        if names:
            parts.append(f"{kind} sites: {', '.join(names)}")
    return f" ({'; '.join(parts)})" if parts else ""
