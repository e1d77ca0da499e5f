"""What methods for several tasks are for: `python -m benchmarks.several_tasks DATA`.

DATA, the texts and the model are those of `benchmarks/learning.py`. Three domains are known, the
fourth is new (`--new`). A head is fitted to the untouched encodings of the known domains (logistic
regression) and stays as it is, so that rows differ in what is inside the model alone: bottlenecks
of 16 at the six feed-forward blocks, or prompts of 10 tokens.

First every row learns the known domains, 40 steps of 16 texts for each: one domain at a time, all
of them, or by what was learnt of each. It is judged on held-out texts of these, and of the new one.
Then each row goes on with 16, 64 and 256 examples of the new domain (12, 16 and 24 steps), the same
ones for all. Rates are those that `benchmarks/learning.py` chose for the kind of module; nothing is
chosen here. One training each: intervals are those of a paired bootstrap over held-out texts, and
say nothing of other draws of examples.

Rows are written to `benchmarks/several_tasks.json` as they come and not computed twice; what they
go on from lies in `--work`. At the end `docs/several-tasks.md` is written from them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import peftfx
from peftfx.demo.encoder import Tokenizer, load_tokenizer

from .learning import BATCH, DOMAINS, HEAD, LONGEST, Classifier, Run, Text, loss, split_of, texts
from .several_tasks_page import means, page

STEPS = 40
"""Of each known domain."""
FEW = {16: 12, 64: 16, 256: 24}
"""Examples of the new domain -> steps."""
ADAPTER = "serial_adapter{{placement=pfeiffer,bottleneck=16,norms=false,name={},seed={}}}"
PROMPT = "prompt_tuning{{length=10,name={},seed=0}}"
RATE, PROMPT_RATE, HEAD_RATE = 1e-3, 1e-2, 1e-2
SHARED = {
    "adapter": (ADAPTER.format("all", 0), RATE),
    "HyperFormer": ("hyperformer{tasks=4,heads=own,bottleneck=16,norms=false,where=ffn}", 3e-3),
    "PHA": ("pha{tasks=3,bottleneck=16}", RATE),
    "AdaMix": ("adamix{bottleneck=16,where=ffn and sublayer}", 3e-3),
}
"""What learns all known domains at once: recipe, rate."""
Groups = list[Sequence[Text]]
Programs = list[list[peftfx.Program]]


@dataclass(frozen=True)
class Lab:
    """What all rows have in common; domains 0 to 2 are known, 3 is new."""

    base: peftfx.Program
    tokenizer: Tokenizer
    train: list[list[Text]]
    held_out: list[list[Text]]
    encoded: list[np.ndarray]
    work: Path

    def learnt(self, program: peftfx.Program, groups: Groups, rate: float) -> peftfx.Program:
        run = _Run(program, self.tokenizer)
        options: Any = {"lr": rate, "steps": len(groups), "seed": 0, "progress": False}
        return peftfx.fit(program, [run.batch(g) for g in groups], loss, **options).program

    def made(self, name: str, recipe: str, groups: Groups, rate: float) -> Path:
        """A saved adapter that learnt, unless it lies there."""
        folder = self.work / name
        if not folder.exists():
            peftfx.save(self.learnt(peftfx.run(self.base, recipe), groups, rate), folder)
        return folder

    def load(self, folder: Path) -> peftfx.Program:
        return peftfx.load(self.base, folder)

    def right(self, program: peftfx.Program, domain: int) -> np.ndarray:
        """For each held-out text of a domain whether the sign is right, shorter texts first."""
        chosen = sorted(self.held_out[domain], key=lambda t: len(t.words))
        return _Run(program, self.tokenizer).right(chosen)


class _Run(Run):
    """With the domain of each sample, where a program takes one a sample."""

    def inputs(self, chosen: Sequence[Text]) -> dict[str, Tensor]:
        inputs = super().inputs(chosen)
        if "task" in inputs and inputs["task"].dim():
            inputs["task"] = torch.tensor([t.domain for t in chosen])
        return inputs


def grouped(chosen: Sequence[Text], steps: int) -> Groups:
    """Batches of texts of like lengths, in random order."""
    drawn, found = random.Random(0), Groups()
    while len(found) < steps:
        order, epoch = list(chosen), Groups()
        drawn.shuffle(order)
        for start in range(0, len(order), 4 * BATCH):
            near = sorted(order[start : start + 4 * BATCH], key=lambda t: len(t.words))
            epoch += [near[at : at + BATCH] for at in range(0, len(near), BATCH)]
        drawn.shuffle(epoch)
        found += epoch
    return found[:steps]


def each_of(lab: Lab, kind: str) -> list[Path]:
    """Modules that learnt one known domain each: `one` and `prompt` from the same start, `apart`
    from their own."""
    recipe, rate = (PROMPT, PROMPT_RATE) if kind == "prompt" else (ADAPTER, RATE)
    names = [f"{kind}-{d}" for d in range(3)]
    return [lab.made(n, recipe.format(n, d if kind == "apart" else 0),
                     grouped(lab.train[d], STEPS), rate) for d, n in enumerate(names)]  # fmt: skip


def mixed(lab: Lab, steps: int) -> Groups:
    return grouped([t for known in lab.train[:3] for t in known], steps)


def of_all(lab: Lab, name: str) -> peftfx.Program:
    """A module that learnt all known domains."""
    recipe, rate = SHARED[name]
    groups = mixed(lab, 3 * STEPS)
    if name == "HyperFormer":  # a batch is of one task
        each = [grouped(known, STEPS) for known in lab.train[:3]]
        groups = [group for three in zip(*each, strict=True) for group in three]
    return lab.load(lab.made(f"{name}-all", recipe, groups, rate))


def merged(lab: Lab, text: str, kind: str = "one", data: Any = None) -> peftfx.Program:
    """One adapter of those of the known domains."""
    program = peftfx.run(lab.base, text, sources=each_of(lab, kind), data=data)
    decided = program.history[-1].plan.decisions
    print(text, {k: decided[k] for k in ("chosen", "scores", "moved") if k in decided}, flush=True)
    return program


def by_clusters(lab: Lab, count: int = 64) -> peftfx.Program:
    """The soup of the two known domains that texts of the new one are most like."""
    names = [f"one-{d}" for d in range(3)]
    text = f"adapter_soup{{select=clusters,count=2,names=[{','.join(names)}]}}"
    known = dict(zip(names, lab.encoded[:3], strict=True))
    return merged(lab, text, data=(lab.encoded[3][:count], known))


def by_activations(lab: Lab) -> peftfx.Program:
    run = _Run(lab.base, lab.tokenizer)
    data = [run.inputs(group) for group in mixed(lab, 6)]
    return merged(lab, "mera{cost=activations}", "apart", data)


def fusion(lab: Lab) -> peftfx.Program:
    return peftfx.run(lab.base, "adapter_fusion", sources=each_of(lab, "one"))


def hyperformer(lab: Lab) -> peftfx.Program:
    """The new task starts as the mean of the known ones."""
    program = of_all(lab, "HyperFormer")
    held = program.named_trainable_parameters().items()
    (table,) = (p for n, p in held if n.endswith("tasks.weight"))
    with torch.no_grad():
        table[3] = table[:3].mean(0)
    return program


def pha(lab: Lab, count: int = 16) -> peftfx.Program:
    """The known task whose prototype is nearest to examples of the new one."""
    program = of_all(lab, "PHA")
    run = _Run(lab.base, lab.tokenizer)
    baked = peftfx.run(program, "bake", data=[run.inputs(lab.train[3][:count])])
    print(baked.history[-1], flush=True)
    return baked


def alike(program: peftfx.Program) -> Programs:
    return [[program]] * 4


def own(lab: Lab, kind: str) -> Programs:
    """Each domain's own; on the new one, all of them."""
    programs = [lab.load(p) for p in each_of(lab, kind)]
    return [*([p] for p in programs), programs]


KNOWN: dict[str, Callable[[Lab], Programs]] = {
    "no adapter": lambda lab: alike(lab.base),
    "an adapter a domain": lambda lab: own(lab, "one"),
    "one adapter for all": lambda lab: alike(of_all(lab, "adapter")),
    "AdapterFusion": lambda lab: alike(lab.learnt(fusion(lab), mixed(lab, 2 * STEPS), RATE)),
    "AdapterSoup, all three": lambda lab: alike(merged(lab, "adapter_soup")),
    "AdapterSoup, two by clusters": lambda lab: alike(by_clusters(lab)),
    "mean, three starts": lambda lab: alike(merged(lab, "adapter_soup", "apart")),
    "MerA, three starts": lambda lab: alike(merged(lab, "mera", "apart")),
    "MerA by activations, three starts": lambda lab: alike(by_activations(lab)),
    "HyperFormer": lambda lab: alike(hyperformer(lab)),
    "PHA": lambda lab: [[of_all(lab, "PHA")]] * 3 + [[pha(lab)]],
    "AdaMix": lambda lab: alike(of_all(lab, "AdaMix")),
    "a prompt a domain": lambda lab: own(lab, "prompt"),
    "SPoT, mean of the prompts": lambda lab: alike(spot(lab, each_of(lab, "prompt"), "spot")),
}
"""Name -> for each domain the programs whose mean accuracy counts."""


def spot(lab: Lab, sources: list[Path], text: str) -> peftfx.Program:
    data = [_Run(lab.base, lab.tokenizer).inputs(lab.train[3][:16])]
    program = peftfx.run(lab.base, text, sources=sources, data=data)
    print(text, program.history[-1].plan.decisions["weights"], flush=True)
    return program


def early(lab: Lab, count: int) -> Path:
    """A prompt that learnt some examples of the new domain."""
    groups = grouped(lab.train[3][:count], FEW[count])
    return lab.made(f"new-{count}", PROMPT.format("new", 0), groups, PROMPT_RATE)


def near(lab: Lab, count: int, kind: str) -> peftfx.Program:
    """A prompt that starts as that of the nearest known domain."""
    sources = [early(lab, count), *each_of(lab, "prompt")]
    return spot(lab, sources, f"spot{{target=0,similarity={kind}}}")


FURTHER: dict[str, tuple[Callable[[Lab, int], peftfx.Program], float]] = {
    "the head alone": (lambda lab, _: peftfx.run(lab.base, HEAD), HEAD_RATE),
    "a new adapter": (lambda lab, _: peftfx.run(lab.base, ADAPTER.format("new", 9)), RATE),
    "one adapter for all": (lambda lab, _: of_all(lab, "adapter"), RATE),
    "AdapterFusion": (lambda lab, _: fusion(lab), RATE),
    "AdapterSoup": (lambda lab, _: merged(lab, "adapter_soup"), RATE),
    "MerA": (lambda lab, _: merged(lab, "mera", "apart"), RATE),
    "HyperFormer": (lambda lab, _: hyperformer(lab), RATE),
    "PHA": (pha, RATE),
    "AdaMix": (lambda lab, _: of_all(lab, "AdaMix"), RATE),
    "a new prompt": (lambda lab, n: lab.load(early(lab, n)), 0.0),
    "SPoT, the nearest prompt": (lambda lab, n: near(lab, n, "mean"), PROMPT_RATE),
    "TPT, nearest by neurons": (lambda lab, n: near(lab, n, "neurons"), PROMPT_RATE),
}
"""Name -> what goes on with n examples of the new domain, and its rate (0: it has learnt)."""


def known_row(lab: Lab, name: str) -> list[str]:
    """By domain and text the thirds of right signs: those of one program, or the mean of three."""
    made = enumerate(KNOWN[name](lab))
    return [thirds(np.mean([lab.right(p, d) for p in each], 0)) for d, each in made]


def further_row(lab: Lab, name: str, count: int) -> list[str]:
    start, rate = FURTHER[name]
    program = start(lab, count)
    if rate:
        program = lab.learnt(program, grouped(lab.train[3][:count], FEW[count]), rate)
    return [thirds(lab.right(program, 3))]


def thirds(right: np.ndarray) -> str:
    """A digit a text: 3 where it is right, or of how many of three programs."""
    return "".join(str(round(3 * share)) for share in right)


def encodings(model: Classifier, tokenizer: Tokenizer, words: list[str]) -> np.ndarray:
    """What the head reads, `[texts, 384]`."""
    rows: list[np.ndarray] = []
    reading = model.head.register_forward_pre_hook(lambda _, given: rows.append(given[0].numpy()))
    for start in range(0, len(words), 32):
        model(*tokenizer(words[start : start + 32], LONGEST).tensors())
    reading.remove()
    return np.concatenate(rows)


def prepared(folder: Path, new: str, work: Path) -> Lab:
    """The texts, the model with a head of the known domains, and its program."""
    names = [n for n in DOMAINS if n != new] + [new]
    split, place = split_of(texts(folder)), list(DOMAINS)

    def own(chosen: Sequence[Text]) -> list[list[Text]]:
        found = [[t for t in chosen if t.domain == place.index(n)] for n in names]
        return [[replace(t, domain=d) for t in each] for d, each in enumerate(found)]

    train, tokenizer = own(split.train), load_tokenizer()
    model = Classifier().eval().requires_grad_(False)
    encoded = [encodings(model, tokenizer, [t.words for t in each]) for each in train]
    fitted = LogisticRegression(max_iter=1000).fit(
        np.concatenate(encoded[:3]), [t.positive for each in train[:3] for t in each]
    )
    half = torch.from_numpy(fitted.coef_[0] / 2).float()
    model.head.weight.copy_(torch.stack([-half, half]))
    model.head.bias.copy_(torch.tensor([-0.5, 0.5]) * float(fitted.intercept_[0]))
    ids = torch.arange(32).view(2, 16)
    base = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    work.mkdir(parents=True, exist_ok=True)
    return Lab(base, tokenizer, train, own(split.held_out), encoded, work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--new", choices=DOMAINS, default="editorials", help="the new domain")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "several_tasks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file = Path(__file__).with_suffix(".json")
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    steps = "; ".join(f"{n} for {count} examples" for count, n in FEW.items())
    task = f"{STEPS} steps of {BATCH} texts a known domain, {options.new} new: {steps}"
    if figures.get("task") != task:
        figures = {"task": task, "known": {}, "few": {str(n): {} for n in FEW}}
    figures["machine"] = (
        f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, 1 thread"
    )
    lab = prepared(options.data, options.new, options.work / options.new)

    def keep(rows: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
        if name not in rows:
            begun = time.process_time()
            rows[name] = make()
            print(name, means(rows[name]), f"{time.process_time() - begun:.0f} s", flush=True)
            file.write_text(json.dumps(figures) + "\n")

    for name in KNOWN:
        keep(figures["known"], name, lambda name=name: known_row(lab, name))
    for name in FURTHER:
        for n in FEW:
            make = lambda name=name, n=n: further_row(lab, name, n)  # noqa: E731
            keep(figures["few"][str(n)], name, make)
    names = [n for n in DOMAINS if n != options.new] + [options.new]
    print(page(figures, names, list(KNOWN), list(FURTHER)))


if __name__ == "__main__":
    main()
