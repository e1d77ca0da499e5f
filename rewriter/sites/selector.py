"""The selector grammar: what a user writes to say where a pass acts.

    selector   := term (("or" | "|") term)*
    term       := factor (("and" | "&") factor)*
    factor     := "not" factor | "(" selector ")" | atom
    atom       := "layer" (">=" | "<=" | ">" | "<" | "==" | "!=") number
                | "layer" "in" "[" number ("," number)* "]"
                | "name:" word | "re:'" regular expression "'" | word

A bare word is a role or kind if it is in the closed list `WORDS`, otherwise a dotted suffix of
the module's (or weight's) name. Every atom must match something by itself, except a role or
kind under `not`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import SelectorError, nearest

if TYPE_CHECKING:
    from .sites import Site

WORDS = frozenset([
    "linear", "attention", "feedforward", "sublayer", "embedding", "norm", "conv", "experts",
    "mixer", "q", "k", "v", "o", "attn", "ffn", "ffn.up", "ffn.gate", "ffn.down", "router",
    "router.shared", "head", "other", "cross", "self", "mixer.in", "mixer.inner", "mixer.out",
    "conv.depthwise", "conv.patch", "embedding.token", "embedding.position", "embedding.type",
    "embedding.relative",
])  # fmt: skip
"""Roles and kinds: the words that never name a module."""

_TOKEN = re.compile(
    r"\s*(?:(?P<re>re:'(?:[^'\\]|\\.)*')|(?P<name>name:[\w.*-]+)"
    r"|(?P<layer>layer\s*(?:(?:>=|<=|==|!=|>|<)\s*\d+|in\s*\[[\d,\s]*\]))"
    r"|(?P<op>\||&|\(|\))|(?P<word>[\w.*-]+))"
)

Test = Callable[["Site"], bool]


def _tokens(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise SelectorError(
                f"selector {text!r} is malformed at {text[position:]!r}. Example: "
                '"(q|v) and layer>=6", "not ffn", "layer in [0,3]", "name:query".'
            )
        position = match.end()
        kind = match.lastgroup or ""
        token = match[kind]
        if kind == "word" and token in ("and", "or", "not"):
            kind, token = "op", {"and": "&", "or": "|", "not": "not"}[token]
        found.append((kind, token))
    return found


def _layer_test(text: str) -> Test:
    inside = re.fullmatch(r"layer\s*in\s*\[([\d,\s]*)\]", text)
    if inside:
        wanted = {int(n) for n in inside[1].split(",") if n.strip()}
        return lambda s: s.layer in wanted
    match = re.fullmatch(r"layer\s*(>=|<=|==|!=|>|<)\s*(\d+)", text)
    sign, number = (match[1], int(match[2])) if match else ("==", -1)
    tests: dict[str, Callable[[int], bool]] = {
        ">=": lambda n: n >= number,
        "<=": lambda n: n <= number,
        ">": lambda n: n > number,
        "<": lambda n: n < number,
        "==": lambda n: n == number,
        "!=": lambda n: n != number,
    }
    return lambda s: s.layer is not None and tests[sign](s.layer)


def _names(site: Site) -> tuple[str, ...]:
    return (site.module, site.id, getattr(site, "weight", site.id))


def _suffix(word: str) -> Test:
    # `*` is anything within a part of a name. Each piece between two of them matches where it first
    # can and stays there (atomic groups), so that many of them take no more time than one.
    first, *others = (re.escape(piece) for piece in re.split(r"\*+", word))
    inner = "".join(f"(?>[^.]*?{piece})" for piece in others[:-1])
    last = f"[^.]*{others[-1]}" if others else ""
    pattern = re.compile(rf"(?:.*\.)?{first}{inner}{last}")
    return lambda s: any(pattern.fullmatch(n) for n in _names(s))


def _atom(kind: str, token: str, text: str) -> Test:
    if kind == "layer":
        return _layer_test(token)
    if kind == "re":
        try:
            pattern = re.compile(token[4:-1])
        except re.error as error:
            raise SelectorError(f"selector {text!r}: bad pattern {token}: {error}.") from error
        return lambda s: any(pattern.search(n) for n in _names(s))
    if kind == "name":
        return _suffix(token[5:])
    if token in WORDS:
        return lambda s: token in s.tags
    return _suffix(token)


class _Parser:
    """Recursive descent over the tokens; remembers every atom for the nothing-matched error."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.position = 0
        self.atoms: list[tuple[str, Test]] = []
        self.negations = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position] if self.position < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.position += 1
        return token

    def parse(self) -> Test:
        if not self.tokens:
            raise SelectorError("the selector is empty. Example: where=q|v.")
        test = self.either()
        if self.peek()[0] != "end":
            raise SelectorError(f"selector {self.text!r}: unexpected {self.peek()[1]!r}.")
        return test

    def either(self) -> Test:
        tests = [self.both()]
        while self.peek() == ("op", "|"):
            self.take()
            tests.append(self.both())
        return tests[0] if len(tests) == 1 else lambda s: any(t(s) for t in tests)

    def both(self) -> Test:
        tests = [self.factor()]
        while self.peek() == ("op", "&"):
            self.take()
            tests.append(self.factor())
        return tests[0] if len(tests) == 1 else lambda s: all(t(s) for t in tests)

    def factor(self) -> Test:
        kind, token = self.take()
        if (kind, token) == ("op", "not"):
            self.negations += 1
            inner = self.factor()
            self.negations -= 1
            return lambda s: not inner(s)
        if (kind, token) == ("op", "("):
            test = self.either()
            if self.take() != ("op", ")"):
                raise SelectorError(f"selector {self.text!r}: a ')' is missing.")
            return test
        if kind in ("op", "end"):
            raise SelectorError(f"selector {self.text!r}: a word is missing before {token!r}.")
        test = _atom(kind, token, self.text)
        if not (self.negations % 2 and token in WORDS):  # "not head" is fine without a head
            self.atoms.append((token, test))
        return test


def choose(
    text: str, sites: Sequence[Site], fallback: Sequence[Site] | None = None
) -> list[Site] | None:
    """The sites that match, in order.

    With `fallback`, returns None instead of an error where an atom matches nothing in `sites`
    but every atom matches something in `fallback`.

    Raises:
        SelectorError: malformed, or it or a part of it matches nothing.
    """
    parser = _Parser(text)
    test = parser.parse()
    for token, atom in parser.atoms:
        if not any(atom(s) for s in sites):
            if fallback is not None and any(atom(s) for s in fallback):
                return None
            raise _nothing(text, token, sites)
    found = [s for s in sites if test(s)]
    if not found:
        if fallback is not None and any(test(s) for s in fallback):
            return None
        raise SelectorError(
            f"where={text!r} matches none of {len(sites)} sites, although each part does. "
            "Print program.sites to see them."
        )
    return found


def _nothing(text: str, token: str, sites: Sequence[Site]) -> SelectorError:
    choices: dict[str, int] = {}
    for site in sites:
        for word in {*(site.tags & WORDS), site.module.rpartition(".")[2], site.module}:
            choices[word] = choices.get(word, 0) + 1
    layers = sorted({s.layer for s in sites if s.layer is not None})
    if token.startswith("layer"):
        near = f"layers {layers[0]} to {layers[-1]}" if layers else "no site has a layer"
    else:
        word = token.removeprefix("name:").removeprefix("re:'").removesuffix("'")
        near = nearest(word, choices)
    part = "" if token == text.strip() else f" (in where={text!r})"
    kinds = ", ".join(sorted({s.kind for s in sites})) or "no"
    return SelectorError(
        f"{token!r}{part} matches none of {len(sites)} {kinds} sites. Nearest: {near}. "
        f"Roles here: {', '.join(sorted({s.role for s in sites})) or 'none'}."
    )
