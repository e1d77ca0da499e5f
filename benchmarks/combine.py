"""Weighted sums of adapters against the true sum: ours, and PEFT's.

    python -m benchmarks.combine

writes `benchmarks/combine.json`: the norm of the difference to the true change, summed in float64,
as a share of that change's norm; and CPU seconds, the sides in turns (ours with all contracts
measured).
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftfx

HERE = Path(__file__).parent
SIZE, LAYERS, RANK, WEIGHTS, ROUNDS = 512, 6, 8, (0.6, 0.4), 5
TYPES = ("linear", "svd", "cat")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS)))


def with_peft() -> Any:
    """Two LoRAs of random factors."""
    import peft

    layers = [str(i) for i in range(LAYERS)]
    made: Any = peft.get_peft_model(
        model(), peft.LoraConfig(r=RANK, target_modules=layers), adapter_name="a"
    )
    made.add_adapter("b", peft.LoraConfig(r=RANK, target_modules=layers))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return made


def off(got: list[Tensor], want: list[Tensor]) -> float:
    """The norm of all differences as a share of that of what is wanted."""
    apart = sum(float((g.double() - w).square().sum()) for g, w in zip(got, want, strict=True))
    return (apart / sum(float(w.square().sum()) for w in want)) ** 0.5


def changes(made: Any, name: str) -> list[Tensor]:
    """PEFT's change of each layer by an adapter, in float64."""
    layers = [made.base_model.model[i] for i in range(LAYERS)]
    return [
        layer.lora_B[name].weight.detach().double() @ layer.lora_A[name].weight.detach().double()
        * layer.scaling[name] for layer in layers
    ]  # fmt: skip


def ours(program: peftfx.Program, text: str) -> list[Tensor]:
    combined = peftfx.run(program, text)
    branches: list[Any] = [combined.branch(a) for a in combined.attachments]
    return [b.delta().detach() for b in branches]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = with_peft()
    pairs = zip(changes(made, "a"), changes(made, "b"), strict=True)
    want = [WEIGHTS[0] * a + WEIGHTS[1] * b for a, b in pairs]
    with tempfile.TemporaryDirectory() as place:
        made.save_pretrained(place)
        program = peftfx.capture(model().eval(), (torch.randn(2, SIZE),))
        for name in "ab":
            program = peftfx.load_peft(program, Path(place) / name, name)
    theirs: dict[str, float] = {}
    for kind in TYPES:
        made.add_weighted_adapter(["a", "b"], list(WEIGHTS), kind, combination_type=kind)
        theirs[kind] = off(changes(made, kind), want)
    text = f"weights=[{WEIGHTS[0]},{WEIGHTS[1]}]"
    seconds: dict[str, list[float]] = {"ours": [], "peft cat": []}
    got = ours(program, f"combine{{{text}}}")
    for number in range(ROUNDS):
        started = time.process_time()
        got = ours(program, f"combine{{{text}}}")
        seconds["ours"].append(time.process_time() - started)
        started = time.process_time()
        made.add_weighted_adapter(["a", "b"], list(WEIGHTS), f"t{number}", combination_type="cat")
        seconds["peft cat"].append(time.process_time() - started)
    svd = ours(program, f"combine{{{text},rank={RANK}}}")
    result = {
        "weights": WEIGHTS, "layers": LAYERS, "size": SIZE, "rank": RANK,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "off the true sum": {
            "ours": off(got, want), f"ours at rank {RANK}": off(svd, want),
            **{f"peft {k}": v for k, v in theirs.items()},
        },
        "CPU seconds, median": {n: round(statistics.median(s), 4) for n, s in seconds.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    (HERE / "combine.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
