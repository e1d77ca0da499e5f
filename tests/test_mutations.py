"""Some of the seeded mutations of `benchmarks/mutations.py`: each is caught, and nothing is without
it, in two dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.mutations import MUTATIONS, caught, failed

from .mutants import DTYPES, Case, Mutation, applied

CHOSEN = (
    ("lora.py:LoRABranch.delta", "* 0.8"),
    ("lora.py:LoRABranch.factors", "* 0.8"),
    ("lora.py:LoRABranch.branch", "-self.scale"),
    ("lora.py:LoRA.made", "None"),
    ("dora.py:squared_norms", "dim=0"),
    ("ia3.py:IA3Output.scale", "2 - self.l"),
    ("shapes.py:linear", "float16"),
    ("prompts.py:KeyValue._join", "[x, "),
    ("rowwise.py:RowwiseLowRank._narrowed", "ids.flip(0)"),
    ("rules.py:_fold_delta", "weight"),
    ("format.py:Dense.rows_scaled", "flip(0)"),
    ("replay.py:load_values", "pass"),
    ("sealed.py:unsealed", "* 2"),
)


def chosen(where: str, new: str) -> Mutation:
    (mutation,) = [m for m in MUTATIONS if m.where.endswith(where) and new in m.new]
    return mutation


def test_every_mutation_fits_the_source() -> None:
    assert len(MUTATIONS) >= 40 and len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        with applied(mutation):
            pass


passed: dict[tuple[Callable[[Case], None], Case], str] = {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("where", "new"), CHOSEN)
def test_a_mutation_is_caught(where: str, new: str, dtype: str) -> None:
    mutation, case = chosen(where, new), Case(DTYPES[dtype], seed=2)
    key = mutation.probe, case
    if key not in passed:
        passed[key] = failed(mutation, case)
    assert not passed[key], "the probe fails without the mutation"
    reason = caught(mutation, case)
    assert reason and not reason.startswith("raw"), reason
