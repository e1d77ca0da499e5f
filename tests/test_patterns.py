"""Regular expressions in selectors: those that people write, and those that search for ever."""

from __future__ import annotations

import re
from typing import Any

import pytest

from peftfx.rewriter.errors import SelectorError
from peftfx.rewriter.program.selector import choose


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a+)+$", "repeat holds another"), ("(a|ab)*$", "repeat holds another"),
        ("(?:a?){40}", "repeat holds another"), ("((a{2,9}b)c)+", "repeat holds another"),
        ("(?=(x*)*y)", "repeat holds another"), (".*" * 4 + "x", "too many ways"),
        ("a?" * 60, "too many ways"), ("(a|b.|c)" * 22, "too many ways"),
        (r"(.)\1", "refers back"), ("a" * 201, "longer than 200"), ("a{2,1}", "repeat"),
        ("(" * 3, "unterminated"),
    ],
)  # fmt: skip
def test_patterns_that_search_for_ever(pattern: str, said: str) -> None:
    with pytest.raises(SelectorError, match=f"bad pattern.*{said}"):
        choose(f"re:'{pattern}'", [])


def test_patterns_that_people_write(captured: Any) -> None:
    sites = captured["encoder"][1].sites
    for pattern, count in (
        (r"layers\.\d+\.(query|value)$", 4), (r"^(?!.*layers).*pool", 1),
        (r"layers\.(0|1)\.(query|key)(\.weight)?$", 4), (r".*layers.*fc[12].*", 4),
    ):  # fmt: skip
        found = choose(f"re:'{pattern}'", list(sites))
        assert len(found) == count, (pattern, found)
        assert all(re.search(pattern, s.module) or re.search(pattern, s.id) for s in found)
