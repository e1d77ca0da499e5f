"""The selector grammar: what a user writes to say where a pass acts.

    selector   := term (("or" | "|") term)*
    term       := factor (("and" | "&") factor)*
    factor     := "not" factor | "(" selector ")" | atom
    atom       := "layer" (">=" | "<=" | ">" | "<" | "==" | "!=") number
                | "layer" "in" "[" number ("," number)* "]"
                | "name:" word | "re:'" regular expression "'" | word

A bare word is a role or kind if it is in the closed list `WORDS`, otherwise a role that a site
has, or a dotted suffix of the module's (or weight's) name. Every atom must match something by
itself, except a role or kind under `not`.

A selector is resolved against all sites. What a pass then takes depends on the kinds that it works
on; `select` tells what it takes from what it leaves out, since a site that a pass cannot edit is
not a site that the model does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import SelectorError, nearest
from .patterns import search_pattern
from .sites import Site

WORDS = frozenset([
    "linear", "attention", "feedforward", "sublayer", "embedding", "norm", "conv", "experts",
    "mixer", "q", "k", "v", "o", "attn", "attn.gate", "ffn", "ffn.up", "ffn.gate", "ffn.down",
    "router", "router.shared", "head", "other", "cross", "self", "mixer.in", "mixer.inner",
    "mixer.out", "conv.depthwise", "conv.patch", "embedding.token", "embedding.position",
    "embedding.type", "embedding.relative", "embedding.side",
])  # fmt: skip
"""Roles and kinds: the words that never name a module."""

WEIGHTS = ("linear", "experts", "conv", "embedding")
"""Kinds of sites that are a stored weight themselves; blocks (attention, ...) consist of those."""

_TOKEN = re.compile(
    r"\s*(?:(?P<re>re:'(?:[^'\\]|\\.)*')|(?P<name>name:[\w.*-]+)"
    r"|(?P<layer>layer\s*(?:(?:>=|<=|==|!=|>|<)\s*\d+|in\s*\[[\d,\s]*\]))"
    r"|(?P<op>\||&|\(|\))|(?P<word>[\w.*-]+))"
)

Test = Callable[[Site], bool]


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
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
        tokens.append((kind, token))
    return tokens


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
            pattern = search_pattern(token[4:-1])
        except ValueError as error:
            raise SelectorError(f"selector {text!r}: bad pattern {token}: {error}.") from error
        return lambda s: any(pattern.search(n) for n in _names(s))
    if kind == "name":
        return _suffix(token[5:])
    if token in WORDS:
        return lambda s: token in s.tags
    suffix = _suffix(token)
    return lambda s: token in s.tags or suffix(s)


DEPTH_LIMIT = 50
"""Of nested brackets and negations."""


class _Parser:
    """Recursive descent over the tokens; remembers every atom for the nothing-matched error."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.position = 0
        self.atoms: list[tuple[str, Test]] = []
        self.negations = 0
        self.depth = 0
        self.test = self.parse()

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
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise SelectorError(
                f"selector {self.text[:60]!r}...: 'not' and brackets are deeper than {DEPTH_LIMIT}."
            )
        test = self.innermost()
        self.depth -= 1
        return test

    def innermost(self) -> Test:
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


@dataclass(frozen=True)
class Selection:
    """What a selector means to a pass that works on some kinds of sites.

    Attributes:
        taken: the matching sites of those kinds, in order.
        left: the matching sites that the pass cannot take. Blocks that the taken sites are part
            of are not among them, nor the parts of taken blocks.
    """

    taken: tuple[Site, ...]
    left: tuple[Site, ...]


def select(text: str, sites: Sequence[Site], kinds: Sequence[str]) -> Selection:
    """Resolves a selector against all sites, for a pass that works on `kinds`.

    The word `linear` stands for everything that multiplies by a matrix: stacks of experts that it
    does not name are left out, not passed over.

    Raises:
        SelectorError: malformed, or it or a part of it matches no site of any kind.
    """
    parser, matching = _matching(text, sites)
    taken = tuple(s for s in matching if s.kind in kinds)
    others = [s for s in matching if s.kind not in kinds]
    weights = WEIGHTS if set(kinds) & set(WEIGHTS) else ()
    left = {s.id for s in others if s.kind in weights}
    for _, atom in parser.atoms:
        named = {s.id for s in others if atom(s)}
        if not left & named and not any(atom(s) for s in taken):
            left |= named
    if "linear" in kinds:
        stacks = [s for s in sites if s.kind == "experts" and s not in matching]
        left |= {s.id for s in stacks if parser.test(replace(s, kind="linear"))}
    return Selection(taken, tuple(s for s in sites if s.id in left))


def words(text: str) -> frozenset[str]:
    """The words of a selector that are not negated, of dotted roles also the first parts.

    Raises:
        SelectorError: malformed.
    """
    atoms = [token for token, _ in _Parser(text).atoms if token in WORDS]
    return frozenset({*atoms, *(token.partition(".")[0] for token in atoms)})


def named_alone(text: str, sites: Sequence[Site], kinds: Sequence[str]) -> frozenset[str]:
    """The kinds of the sites of each `name:` in a selector that is of none of `kinds`.

    Raises:
        SelectorError: malformed.
    """
    found: set[str] = set()
    for token, atom in _Parser(text).atoms:
        own = {s.kind for s in sites if atom(s)} if token.startswith("name:") else set[str]()
        if not own & {*kinds}:
            found |= own
    return frozenset(found)


def choose(text: str, sites: Sequence[Site]) -> list[Site]:
    """The sites that match, in order: linears alone where each part matches some of them.

    Raises:
        SelectorError: malformed, or it or a part of it matches nothing.
    """
    parser, matching = _matching(text, sites)
    linear = [s for s in sites if s.kind == "linear"]
    alone = all(any(atom(s) for s in linear) for _, atom in parser.atoms)
    return [s for s in matching if alone and s.kind == "linear"] or matching


def _matching(text: str, sites: Sequence[Site]) -> tuple[_Parser, list[Site]]:
    parser = _Parser(text)
    for token, atom in parser.atoms:
        if not any(atom(s) for s in sites):
            raise _nothing(text, token, sites)
    matching = [s for s in sites if parser.test(s)]
    if not matching:
        raise SelectorError(
            f"where={text!r} matches none of {len(sites)} sites, although each part does. "
            "Say where with other words: program.sites, or peftfx sites MODEL, lists them."
        )
    return parser, matching


def meaning(text: str) -> frozenset[frozenset[tuple[str, ...]]]:
    """A selector's alternatives and their conditions as sets: equal for equal meaning, whatever
    the order, the spaces and the spelling of `or` and `and`.

    Raises:
        SelectorError: malformed.
    """
    tokens = ["".join(t.split()) if kind == "layer" else t for kind, t in _tokens(text)]
    return frozenset(
        frozenset(tuple(part) for part in _split(alternative, "&"))
        for alternative in _split(tokens, "|")
    )


def _split(tokens: Sequence[str], mark: str) -> list[list[str]]:
    """Splits at `mark` outside of parentheses."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if token == mark and not depth:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _nothing(text: str, token: str, sites: Sequence[Site]) -> SelectorError:
    choices: dict[str, int] = {}
    for site in sites:
        for word in {*site.tags, site.module.rpartition(".")[2], site.module}:
            choices[word] = choices.get(word, 0) + 1
    layers = sorted({s.layer for s in sites if s.layer is not None})
    if token.startswith("layer"):
        near = f"layers {layers[0]} to {layers[-1]}" if layers else "no site has a layer"
    else:
        word = token.removeprefix("name:").removeprefix("re:'").removesuffix("'")
        near = nearest(word, choices)
    part = "" if token == text.strip() else f" (in where={text!r})"
    return SelectorError(
        f"{token!r}{part} matches none of {len(sites)} sites. Nearest: {near}. "
        f"Roles here: {', '.join(sorted({s.role for s in sites})) or 'none'}. Say where with "
        "other words: program.sites, or peftfx sites MODEL, lists them."
    )
