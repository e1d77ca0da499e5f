"""AdapterSoup: the mean of the weights of adapters of several domains, chosen for a new one.

Chronopoulou et al., Findings EACL 2023, arXiv:2302.07027. Adapters of one method, trained from the
same start on a domain each, become one with `theta = 1/n sum_i theta_i`, of the size and speed of
one. Which n take part is told by encodings of texts (of any sentence encoder): some of the new
domain, `[m, dim]`, and some of each member's, `[n, dim]`, given as data:

    program = peftfx.run(program, "adapter_soup{select=clusters,count=2}",
                         data=(new, {"law": law, "news": news, "code": code}))

`select=similarity` takes the members with the largest mean cosine to the new texts;
`select=clusters` fits a Gaussian mixture to the members' texts, puts each new text into a cluster,
and takes the adapters of the clusters that were hit, most hits first, where a cluster's adapter is
the one of most of its texts. `select=all` needs no data. The mean of weights is not the mean of
outputs; of LoRA it is the mean of A and of B (`combine` takes that of the true changes), and of
adapters whose inner units lie in other orders it means nothing: see `mera`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...rewriter.errors import OptionError, PassError
from ...rewriter.program.history import Plan
from ...rewriter.program.state import State
from ...rewriter.storage.composed import Source
from .averaged import Averaged, mean

Encodings = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AdapterSoup(Averaged):
    """Averages the weights of adapters that are alike.

    Attributes:
        select: which members take part: `all`, or by encodings of texts, see above.
        count: how many at most.
        clusters: components of the mixture; none for one a member.
        covariance: of the components: `full`, `tied`, `diag` or `spherical`. The paper does not
            say; where encodings are wider than there are texts, `full` has no maximum.
        seed: of the mixture's start.
    """

    select: Literal["all", "similarity", "clusters"] = "all"
    count: int = 5
    clusters: int | None = None
    covariance: Literal["full", "tied", "diag", "spherical"] = "diag"
    seed: int = 0

    @property
    def random_seed(self) -> int:
        return self.seed

    def check(self) -> None:
        super().check()
        self.require(self.count >= 1, "count", "at least 1")
        self.require(self.clusters is None or self.clusters >= 1, "clusters", "at least 1")
        self.require(0 <= self.seed < 2**32, "seed", "a number from 0 to 2^32 - 1")

    def merged(self, program: State, members: Mapping[str, Source], data: Any) -> Plan:
        scores = (
            dict.fromkeys(members, 1.0) if self.select == "all" else self._scores(members, data)
        )
        best = sorted(scores, key=lambda n: -scores[n])  # ties: in the order of the members
        chosen = best if self.select == "all" else best[: self.count]
        held = [members[n].tensors for n in chosen]
        tensors = {n: mean([h[n] for h in held]) for n in held[0]}
        return Plan({"chosen": chosen, "scores": scores}, tensors)

    def _scores(self, members: Mapping[str, Source], data: Any) -> dict[str, float]:
        new, known = self._encodings(members, data)
        return by_similarity(new, known) if self.select == "similarity" else by_clusters(
            new, known, self.clusters or len(known), self.covariance, self.seed
        )  # fmt: skip

    def _encodings(
        self, members: Mapping[str, Source], data: Any
    ) -> tuple[Encodings, dict[str, Encodings]]:
        fits = isinstance(data, Sequence) and len(data) == 2 and isinstance(data[1], Mapping)
        odd = sorted(set(data[1]) ^ set(members)) if fits else []
        if not fits or odd:
            said = f" ({odd[0]!r} is in one of both only)" if odd else ""
            raise PassError(
                f"{self.text}: select={self.select} reads encodings of texts, of the new domain "
                f"and of each member{said}. Give both: run(program, ..., data=(new, "
                f"{{{', '.join(f'{n!r}: ...' for n in members)}}}))."
            )
        new, known = _array(data[0], "the new texts"), {
            n: _array(data[1][n], f"the texts of {n!r}") for n in members
        }  # fmt: skip
        for name, one in known.items():
            if one.shape[1] != new.shape[1]:
                raise PassError(
                    f"{self.text}: encodings of {name!r} have {one.shape[1]} numbers, those of the "
                    f"new texts {new.shape[1]}. Use one encoder for all."
                )
        return new, known


def by_similarity(new: Encodings, known: Mapping[str, Encodings]) -> dict[str, float]:
    """The mean cosine of each member's texts with the new ones."""
    mine = _units(new).mean(0)
    return {name: float(_units(texts).mean(0) @ mine) for name, texts in known.items()}


def by_clusters(
    new: Encodings, known: Mapping[str, Encodings], clusters: int, covariance: str, seed: int
) -> dict[str, float]:
    """The share of new texts in clusters of each member, without members that have none.

    Raises:
        PassError: there are fewer texts than clusters.
    """
    texts = np.concatenate(list(known.values()))
    if len(texts) < clusters:
        raise PassError(
            f"adapter_soup: {len(texts)} texts of the members for {clusters} clusters. Give more "
            "texts, or choose fewer clusters."
        )
    mixture = _mixture(clusters, covariance, seed).fit(texts)
    owners = np.repeat(np.arange(len(known)), [len(t) for t in known.values()])
    names, found = list(known), mixture.predict(texts)
    held = {
        c: Counter(owners[found == c].tolist()).most_common(1)[0][0] for c in set(found.tolist())
    }
    hits = Counter(held[c] for c in mixture.predict(new).tolist() if c in held)
    if not hits:
        raise PassError(
            "adapter_soup: all new texts lie in clusters that hold no text of a member. Choose "
            "fewer clusters, or select=similarity."
        )
    return {names[k]: n / len(new) for k, n in hits.items()}


def _mixture(clusters: int, covariance: str, seed: int) -> Any:
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise OptionError(
            f"adapter_soup: scikit-learn, which fits the mixture, cannot be imported ({error}). "
            "Install it (pip install scikit-learn), or choose select=similarity."
        ) from error
    return GaussianMixture(clusters, covariance_type=covariance, random_state=seed, n_init=3)  # pyright: ignore


def _units(encodings: Encodings) -> Encodings:
    sizes = np.linalg.norm(encodings, axis=1, keepdims=True)
    return encodings / np.where(sizes == 0, 1.0, sizes)


def _array(given: Any, what: str) -> Encodings:
    try:
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PassError(f"adapter_soup: {what} are no array of numbers: {error}.") from error
    if array.ndim != 2 or 0 in array.shape or not np.isfinite(array).all():
        raise PassError(
            f"adapter_soup: encodings of {what} are {list(array.shape)}, or not finite. Give one "
            "row of finite numbers a text: [texts, width]."
        )
    return array
