"""What each method learns of the sentiment of short texts: `python -m benchmarks.learning DATA`.

DATA is the folder of the unpacked source distribution of vaderSentiment 2.5 (MIT licence):

    pip download --no-deps --no-binary :all: vaderSentiment==2.5
    tar xzf vaderSentiment-2.5.tar.gz

It holds 23,703 rated texts of four domains (Hutto and Gilbert 2014). MiniLM (22 M parameters, mean
of the last hidden states) with a linear head tells the sign of the rating. Every row trains the
head and one method, for the same steps on the same batches, each batch of one domain; the rate is
chosen on validation texts, held-out texts are scored once. The first row trains the head alone, on
the untouched model. Accuracy on held-out texts by domain, and its difference from the first row
with a paired bootstrap interval over texts.

Rows are written to `benchmarks/learning.json` as they come and not computed twice; at the end
`docs/learning.md` is written from them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import random
import tarfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn

import peftfx
from peftfx.demo.encoder import Tokenizer, load_model, load_tokenizer
from peftfx.demo.evaluation import paired_bootstrap

ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
HEAD = "train{where=head}"
LONGEST = 48
"""Tokens of a text; longer ones are cut."""
BATCH = 16
TRAIN, VALIDATION, HELD_OUT = 512, 128, 400
"""Texts of each domain."""

PAGE = Path(__file__).parent.parent / "docs" / "learning.md"
ABOUT = """\
# What methods learn

Sentiment of short English texts in four domains (tweets, movie reviews, product reviews, newspaper
editorials; Hutto and Gilbert 2014): MiniLM (22 M parameters) with a linear head on the mean of its
last hidden states tells the sign of the mean rating. Accuracy in % on {held_out} held-out texts a
domain, after {task}, of all
domains by turns. Every row trains the head and one method; its learning rate is the better of two
on {validation} other texts a domain. The last column is the difference from the head alone on the
untouched model, in points, with its paired bootstrap interval (95 %, over texts): where it holds 0,
so few steps show no difference.

{table}

Three rows stay below the head alone. CoDA starts from a model whose blocks skip two thirds of the
tokens (`python -m benchmarks.coda_learning` shows what that costs); HyperFormer++ starts from
random adapters that all layers share, and each of its four tasks gets a quarter of the steps. Why
AdaLoRA does is not known yet: its schedule of ranks is pressed into these steps. Prompts in front
of the input, and P-tuning v2, learn more slowly than the rest.

{absent}

CPU seconds of a step are in `benchmarks/learning.json`. Made by `python -m benchmarks.learning
DATA`, which says where the texts come from, on {machine}.
"""

METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "head alone": ("", (3e-3, 1e-2)),
    "LoRA": ("lora{rank=8,where=linear and not head}", (1e-3, 3e-3)),
    "LoRA+": ("lora{rank=8,lr_ratio=16,where=linear and not head}", (1e-4, 3e-4)),
    "LoRA-FA": ("lora_fa{rank=8,where=linear and not head}", (1e-3, 3e-3)),
    "DyLoRA": ("dylora{rank=8,where=linear and not head}", (1e-3, 3e-3)),
    "SoRA": ("sora{rank=8,where=linear and not head}", (1e-3, 3e-3)),
    "AdaLoRA": ("adalora{rank=8,target=4,where=linear and not head}", (1e-3, 3e-3)),
    "VeRA": ("vera{where=linear and not head}", (3e-3, 1e-2)),
    "VB-LoRA": ("vb_lora{where=linear and not head}", (1e-3, 3e-3)),
    "LoKr": ("lokr{where=linear and not head}", (3e-3, 1e-2)),
    "LoHa": ("loha{where=linear and not head}", (3e-3, 1e-2)),
    "OFT": ("oft{where=linear and not head}", (1e-3, 3e-3)),
    "BOFT": ("boft{where=linear and not head}", (1e-3, 3e-3)),
    "KAdaptation": ("kadaptation", (1e-3, 3e-3)),
    "SAID, 1000 dimensions": ("said{dimension=1000,where=linear and not head|norm}", (3e-3, 1e-2)),
    "Compacter": ("compacter", (1e-3, 3e-3)),
    "DoRA": ("dora{rank=8,where=linear and not head}", (1e-3, 3e-3)),
    "BitFit": ("bitfit", (3e-3, 1e-2)),
    "norm tuning": ("norm_tuning", (1e-3, 3e-3)),
    "freeze, upper two layers": ("freeze{layers=2}", (1e-4, 3e-4)),
    "diff pruning, before its mask": ("diff_pruning", (1e-4, 3e-4)),
    "FAR, primed": ("far", (1e-4, 3e-4)),
    "SAM, scored with the head alone": ("sam", (1e-3, 3e-3)),
    "SPT, scored with the head alone": ("spt", (1e-3, 3e-3)),
    "(IA)3": ("ia3", (1e-2, 3e-2)),
    "serial adapter": ("serial_adapter{bottleneck=32}", (1e-3, 3e-3)),
    "serial adapter, Pfeiffer": ("serial_adapter{placement=pfeiffer,bottleneck=32}", (1e-3, 3e-3)),
    "parallel adapter": ("parallel_adapter{bottleneck=32}", (1e-3, 3e-3)),
    "KronA": ("krona", (3e-3, 1e-2)),
    "AdaMix": ("adamix{bottleneck=32}", (1e-3, 3e-3)),
    "prompt tuning": ("prompt_tuning{length=10}", (1e-2, 3e-2)),
    "P-tuning": ("p_tuning{length=10}", (1e-3, 3e-3)),
    "P-tuning v2": ("p_tuning_v2{length=10}", (1e-2, 3e-2)),
    "prefix-tuning": ("prefix_tuning{length=10}", (1e-2, 3e-2)),
    "APT": ("apt{length=10}", (1e-2, 3e-2)),
    "SMoP": ("smop", (1e-2, 3e-2)),
    "HyperFormer": ("hyperformer{tasks=4,heads=own}", (1e-3, 3e-3)),
    "HyperFormer++": ("hyperformer{tasks=4}", (1e-4, 3e-4)),
    "AdaMix, LoRA": ("adamix{form=lora}", (1e-3, 3e-3)),
    "CoDA": ("coda", (1e-3, 3e-3)),
    "PHA": ("pha{tasks=4}", (1e-3, 3e-3)),
    "UniPELT": ("unipelt", (1e-3, 3e-3)),
    "MAM": ("mam{length=10,bottleneck=32}", (1e-3, 3e-3)),
    "S4": ("s4", (1e-3, 3e-3)),
    "LLM-Adapters, parallel": ("llm_adapters{form=parallel,bottleneck=32}", (1e-3, 3e-3)),
    "AutoPEFT, all kinds": ("autopeft", (1e-3, 3e-3)),
}

DRAWN = ("P-tuning v2", "SMoP", "AdaMix", "AdaMix, LoRA")
"""What is different in training mode."""

SCORED = "scored"
"""In the name of a row whose places are chosen by gradients: those of the model with a head that
learnt the same steps, since a head of zeros gives none; it goes on from there."""


@dataclass(frozen=True)
class Text:
    """A text of a domain (an index), and whether its mean rating is above 0."""

    domain: int
    words: str
    positive: bool


def texts(folder: Path) -> list[list[Text]]:
    """All rated texts by domain; those of a mean rating of exactly 0 have no sign."""
    domains: list[list[Text]] = []
    with tarfile.open(folder / ARCHIVE) as archive:
        for index, name in enumerate(DOMAINS.values()):
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            if file is None:
                raise SystemExit(f"{folder / ARCHIVE} has no texts of {name}.")
            lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace").read().splitlines()
            rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
            domains.append([Text(index, w, float(r) > 0) for _, r, w in rows if float(r) != 0])
    return domains


@dataclass(frozen=True)
class Split:
    """Texts to learn from, to choose a rate on, and to be judged on."""

    train: list[Text]
    validation: list[Text]
    held_out: list[Text]


def split_of(domains: Sequence[Sequence[Text]], seed: int = 0) -> Split:
    """The same numbers of each domain."""
    split = Split([], [], [])
    for index, all_texts in enumerate(domains):
        order = list(all_texts)
        random.Random(seed + index).shuffle(order)
        sizes = itertools.accumulate((TRAIN, VALIDATION, HELD_OUT), initial=0)
        for part, (start, stop) in zip(
            (split.train, split.validation, split.held_out), itertools.pairwise(sizes), strict=True
        ):
            part += order[start:stop]
    return split


class Classifier(nn.Module):
    """MiniLM, the mean over real tokens, and a head `[hidden] -> [2]` that starts at zero.

    Its dropout is off: in training mode, methods draw (routes, ranks, noise) and nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = load_model()
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.head = nn.Linear(384, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        weight = attention_mask.unsqueeze(-1).to(torch.float32)
        hidden = outputs.last_hidden_state
        return self.head((hidden * weight).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Run:
    """A program, how texts become its inputs, and how it learns and is judged."""

    program: peftfx.Program
    tokenizer: Tokenizer

    def inputs(self, chosen: Sequence[Text]) -> dict[str, Tensor]:
        """Of texts of one domain."""
        ids, mask = self.tokenizer([t.words for t in chosen], LONGEST).tensors()
        inputs = {"input_ids": ids, "attention_mask": mask}
        for task in (i for i in self.program.spec.inputs if i.name == "task"):
            inputs["task"] = torch.full((len(chosen),) * len(task.shape), chosen[0].domain)
        return inputs

    def batch(self, chosen: Sequence[Text]) -> dict[str, Tensor]:
        """The same with the signs."""
        return {**self.inputs(chosen), "positive": torch.tensor([int(t.positive) for t in chosen])}

    def right(self, chosen: Sequence[Text]) -> np.ndarray:
        """For each text whether the sign is right, in order."""
        self.program.eval()
        rows: list[np.ndarray] = []
        with torch.inference_mode():
            for _, group in itertools.groupby(chosen, key=lambda t: t.domain):
                own = list(group)
                right = np.empty(len(own))
                order = sorted(range(len(own)), key=lambda i: len(own[i].words))  # less padding
                for at in (order[i : i + 32] for i in range(0, len(own), 32)):
                    texts = [own[i] for i in at]
                    found = logits_of(self.program(**self.inputs(texts))).argmax(1).tolist()
                    right[at] = [a == t.positive for a, t in zip(found, texts, strict=True)]
                rows.append(right)
        return np.concatenate(rows)


def batches(train: Sequence[Text], steps: int) -> list[Sequence[Text]]:
    """Batches of one domain each, the domains by turns; the same for every method."""
    queues = [[t for t in train if t.domain == d] for d in range(len(DOMAINS))]
    shuffle = random.Random(0)
    for queue in queues:
        shuffle.shuffle(queue)
    return [
        (queues[s % len(queues)] * 2)[(at := s // len(queues) * BATCH % TRAIN) : at + BATCH]
        for s in range(steps)
    ]


def logits_of(outputs: Any) -> Tensor:
    """The model's own output, where a method shows another one, too."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the signs."""
    return nn.functional.cross_entropy(logits_of(outputs), batch["positive"])


def adapted(base: peftfx.Program, name: str, learning: list[dict[str, Tensor]]) -> peftfx.Program:
    """The program of a row, before it learns."""
    recipe = METHODS[name][0]
    if SCORED not in name:
        return peftfx.run(base, ";".join(filter(None, (recipe, HEAD))))
    headed = peftfx.run(base, HEAD)
    rate, steps = METHODS["head alone"][1][-1], len(learning)
    options: Any = {"lr": rate, "steps": steps, "seed": 0, "progress": False}
    headed = peftfx.fit(headed, learning, loss, **options).program
    data = [({n: t for n, t in b.items() if n != "positive"}, partial(loss, batch=b))
            for b in learning[:8]]  # fmt: skip
    return peftfx.run(headed, recipe, data=data)


def row(base: peftfx.Program, name: str, split: Split, steps: int) -> dict[str, Any]:
    """Trains a method at each of its rates and judges the one that validation prefers."""
    recipe, rates = METHODS[name]
    tokenizer, chosen = load_tokenizer(), batches(split.train, steps)
    best: tuple[float, float, Run, float, int] | None = None
    validation: dict[str, float] = {}
    for rate in rates:
        own = Run(base, tokenizer)
        program = adapted(base, name, [own.batch(c) for c in chosen])
        count = sum(p.numel() for p in program.trainable_parameters())
        learning = Run(program, tokenizer)
        done = peftfx.fit(
            program, [learning.batch(c) for c in chosen], loss, lr=rate, steps=steps, seed=0,
            progress=False,
        )  # fmt: skip
        run = Run(done.program, tokenizer)
        accuracy = float(run.right(split.validation).mean())
        validation[f"{rate:g}"] = round(accuracy, 4)
        if best is None or accuracy > best[0]:
            best = (accuracy, rate, run, done.step_seconds, count)
    if best is None:
        raise SystemExit(f"{name} has no rates.")
    _, rate, run, seconds, count = best
    right = run.right(split.held_out)
    return {
        "recipe": recipe,
        "trained": count,
        "mode": "training",
        "rate": rate,
        "validation": validation,
        "step [CPU s]": round(seconds, 3),
        "accuracy": {"all": round(float(right.mean()), 4)}
        | {
            d: round(float(right[i * HELD_OUT : (i + 1) * HELD_OUT].mean()), 4)
            for i, d in enumerate(DOMAINS)
        },
        "right": "".join(str(int(r)) for r in right),
    }


def table(rows: dict[str, Any]) -> str:
    """The rows in Markdown, with intervals against the first."""
    first = _bits(rows["head alone"])
    lines = [
        f"| method | trained | all | {' | '.join(DOMAINS)} | over the head alone |",
        f"|---|{'---|' * (3 + len(DOMAINS))}",
    ]
    for name, values in rows.items():
        cells = [f"{values['trained']:,}"]
        cells += [f"{100 * values['accuracy'][d]:.1f}" for d in ("all", *DOMAINS)]
        gain = paired_bootstrap(_bits(values), first)
        text = f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        lines.append(
            f"| {name} | {' | '.join(cells)} | {'' if values is rows['head alone'] else text} |"
        )
    return "\n".join(lines)


def _bits(values: dict[str, Any]) -> np.ndarray:
    return np.asarray([float(b) for b in values["right"]])


def page(figures: Mapping[str, Any]) -> str:
    """Writes it, and returns it; it says which rows have not been computed."""
    rows = figures["rows"]
    absent = [n for n in METHODS if n not in rows]
    old = [n for n in DRAWN if n in rows and "mode" not in rows[n]]
    told = f"Rows not computed yet: {'; '.join(absent)}." if absent else ""
    if old:
        told += (
            f" {'; '.join(old)} learnt in evaluation mode: mixtures as their mean, without routes, "
            "others without noise or dropout. The script trains in training mode now."
        )
    text = ABOUT.format(
        **figures, table=table(rows), held_out=HELD_OUT, validation=VALIDATION,
        absent="\n".join(textwrap.wrap(told, 100)),
    )  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--again", action="store_true", help="compute rows that are there, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file = Path(__file__).with_suffix(".json")
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    about = f"{options.steps} steps of {BATCH} texts, {TRAIN} texts a domain to learn from"
    if figures.get("task") != about:
        figures = {"task": about, "rows": {}}
    figures["machine"] = (
        f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, 1 thread"
    )
    split = split_of(texts(options.data))
    ids = torch.arange(32).view(2, 16)
    model = Classifier().eval().requires_grad_(False)
    base = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for name in options.methods:
        if options.again or name not in figures["rows"]:
            begun = time.process_time()
            figures["rows"][name] = row(base, name, split, options.steps)
            told = figures["rows"][name]["accuracy"]
            print(name, told, f"{time.process_time() - begun:.0f} s", flush=True)
            figures["rows"] = {n: figures["rows"][n] for n in METHODS if n in figures["rows"]}
            file.write_text(json.dumps(figures, indent=1) + "\n")
    print(page(figures))


if __name__ == "__main__":
    main()
