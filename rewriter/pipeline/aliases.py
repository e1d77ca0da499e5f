"""What other libraries call options of passes, and where their word means something else, ours.

A pass has a table `aliases`: a foreign word -> what its value is here. That is options of the pass;
or, where it has none of this meaning, a sentence that says what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import OptionError
from .options import DEFAULT

AND = "and"
"""A condition beside `where`, as if it were an option."""

Alias = Callable[[Any], Mapping[str, Any] | str]
"""Options of a pass for a foreign value, or what to write instead."""


class Entries(dict[str, Any]):
    """Values of an option by site, for which another word, or the usual value, is the default."""


def _same(option: str) -> Alias:
    return lambda value: {option: value}


def renamed(**words: str) -> dict[str, Alias]:
    """Foreign words for options of the same meaning."""
    return {word: _same(option) for word, option in words.items()}


def started_by(option: str = "", usual: str = "") -> Alias:
    """A word that is true for the usual start of an adapter, or names another one.

    Args:
        option: of the pass, that names starts; none if it has one alone.
        usual: its value for true.
    """

    def start(value: Any) -> Mapping[str, Any] | str:
        if value is False:
            return "the adapter would change the model before it trains; leave it out"
        if value in (None, True):
            return {option: usual} if option else {}
        return {option: value} if option else "there is one start here; leave it out"

    return start


def instead(advice: str, *fine: Any) -> Alias:
    """Nothing, if the value is one of `fine` or says nothing (None, false, empty); else advice."""

    return lambda value: {} if says_nothing(value) or value in fine else advice


def says_nothing(value: Any) -> bool:
    """Whether an option's value is none, false or empty."""
    return value is None or value is False or value in ((), [], {}, set(), "", "none")


def _modules(value: Any) -> str:
    """The selector of modules that PEFT names: a regular expression for the whole name, a list of
    names or their dotted ends, or `all-linear`."""
    if isinstance(value, str):
        if value.lower() == "all-linear":
            return "linear and not head"
        return f"re:'^(?:{value})$'"
    names = sorted(map(str, value)) if isinstance(value, set) else [str(name) for name in value]
    plain = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    return "|".join(
        f"name:{name}" if plain else rf"re:'(^|\.){re.escape(name)}$'" for name in names
    )


def _ending(pattern: str) -> str:
    """The selector of modules whose whole name, or dotted end, a pattern of PEFT's matches."""
    if re.fullmatch(r"[\w.-]+", pattern):
        return f"name:{pattern}"
    return rf"re:'^(.*\.)?({pattern})$'"


def by_pattern(option: str) -> Alias:
    """PEFT's word for values of an option by patterns of names; there, too, the first counts."""

    def entries(value: Any) -> Mapping[str, Any] | str:
        if not isinstance(value, Mapping):
            return {} if says_nothing(value) else "it must be a map from names to values"
        found: Mapping[Any, Any] = value
        return {option: Entries({_ending(str(k)): v for k, v in found.items()})} if found else {}

    return entries


def _targets(value: Any) -> Mapping[str, Any] | str:
    if value is None:
        return {}
    if not value:
        return "it selects nothing. Say where=, for example where=q|v"
    return {"where": _modules(value)}


def _excluded(value: Any) -> Mapping[str, Any] | str:
    return {AND: f"not ({_modules(value)})"} if value else {}


def _layers(value: Any) -> Mapping[str, Any] | str:
    if value is None:
        return {}
    layers = [value] if isinstance(value, int) else list(value)
    if not layers or not all(isinstance(n, int) for n in layers):
        return "it must be a number or a list of numbers"
    return {AND: f"layer in [{','.join(map(str, layers))}]"}


PLACES: dict[str, Alias] = {
    "target_modules": _targets,
    "exclude_modules": _excluded,
    "layers_to_transform": _layers,
    "layers_pattern": instead("layers are found by dataflow; leave it out"),
    "fan_in_fan_out": lambda value: {},  # the graph says how a weight lies
    "target_parameters": instead("stacks of experts are where=experts"),
    "modules_to_save": instead("that is a pass of its own: add train{where=head} to the recipe"),
    "lora_bias": instead("factors have no bias; add bitfit{where=...} to the recipe"),
    "rank_pattern": instead("add a pass for each rank, with where= and name="),
    "alpha_pattern": instead("add a pass for each alpha, with where= and name="),
    "trainable_token_indices": instead(
        "that is a pass of its own: add train_tokens{ids=[...]} to the recipe"
    ),
    "bias": instead("that is a pass of its own: add bitfit{add=false,where=...} to the recipe"),
}
"""Words of PEFT for where an adapter goes, and for what is a pass of its own here."""


def translated(
    name: str, aliases: Mapping[str, Alias], given: Mapping[str, Any], usual: str
) -> dict[str, Any]:
    """Options in the words of a pass.

    Args:
        name, aliases: of the pass.
        given: options, by their own names or by foreign ones.
        usual: the pass's own `where`, which conditions are on if nothing else is.

    Raises:
        OptionError: a foreign word means something that the pass has no option for, or an option
            is given by two words.
    """
    options: dict[str, Any] = {}
    words: dict[str, str] = {}
    conditions: list[str] = []
    for word, value in given.items():
        found = aliases[word](value) if word in aliases else {word: value}
        if isinstance(found, str):
            raise OptionError(f"{name}: {word}={value!r} has no option here: {found}.")
        for option, own in found.items():
            if option == AND:
                conditions.append(own)
                continue
            held = options.get(option)
            if isinstance(own, Entries) and held is not None and not isinstance(held, Mapping):
                own = {**own, DEFAULT: held}
            elif isinstance(held, Entries) and not isinstance(own, Mapping):
                own = {**held, DEFAULT: own}
            elif option in options:
                raise OptionError(
                    f"{name}: {words[option]} and {word} say the same; leave one out."
                )
            options[option], words[option] = own, word
    if conditions:
        where = options.get("where", usual)
        options["where"] = " and ".join(f"({part})" for part in (where, *conditions))
    return options
