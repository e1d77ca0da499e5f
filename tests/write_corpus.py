"""Writes what this version writes into a folder of `tests/corpus/written`, for later versions to read.

    python -m tests.write_corpus tests/corpus/written/0.1.0-format2

Run it before a file format changes. It uses public names only, so that it also runs in a checkout of an
earlier version.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import peftfx

RECIPES = {
    "lora": "lora{rank=2,where=q|v}",
    "two": "lora{rank=2,where=q|v};ia3",
    "dora": "dora{rank=2}",
    "adalora": "adalora{rank=2,target=1}",
    "serial_adapter": "serial_adapter{bottleneck=4}",
    "prefix_tuning": "prefix_tuning{length=3}",
    "prompt_tuning": "prompt_tuning{length=3}",
    "bitfit": "bitfit{where=linear}",
    "peqa": "peqa{group=16}",
    "diff_pruning": "diff_pruning{alpha=1}",
    "unipelt": "unipelt{rank=2,length=3,bottleneck=4}",
    "folded": "lora{rank=2};ia3;fold{names=[lora]}",
}


def inputs() -> dict[str, Tensor]:
    """Two rows of seven tokens, the second with padding on the left."""
    ids = torch.arange(14).reshape(2, 7) * 5 % 31
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def first(outputs: object) -> Tensor:
    """The first tensor of what a program returns."""
    if isinstance(outputs, Tensor):
        return outputs
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return first(next(iter(values)))  # type: ignore[call-overload]


def trained(program: peftfx.Program) -> peftfx.Program:
    """The program with other values for all that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(program.named_trainable_parameters().items()):
            del name
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return program


def write(folder: Path, model: nn.Module) -> None:
    """One artifact a recipe, with the outputs that it gave; and a program file."""
    base = peftfx.capture(model, kwargs=inputs())
    outputs: dict[str, Tensor] = {}
    for name, text in RECIPES.items():
        steps = text.split(";fold")
        program = trained(peftfx.run(base, steps[0]))
        if len(steps) > 1:
            program = peftfx.run(program, f"fold{steps[1]}")
        peftfx.save(program, folder / name)
        outputs[name] = first(program(**inputs())).detach().contiguous()
        if name == "two":
            peftfx.save_program(program, folder / "program")
    safetensors.torch.save_file(outputs, folder / "outputs.safetensors")
    about = {"torch": torch.__version__, "python": platform.python_version()}
    (folder / "versions.json").write_text(json.dumps(about | {"peftfx": peftfx.__version__}) + "\n")


if __name__ == "__main__":
    from tests.models import Decoder

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    decoder = Decoder().eval()
    decoder.load_state_dict(safetensors.torch.load_file(folder.parent / "decoder.safetensors"))
    write(folder, decoder)
