"""Writes adapters with peftfx for `write_adapterhub.py` to load into the library's own models.

    python -m tests.formats.write_with_peftfx DIR
    (in the library's environment)  python -m tests.formats.write_adapterhub DIR

Each directory DIR/MODEL-CASE holds the adapter, with all that trains random, and
`output.safetensors`: what the program gives with it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from safetensors.torch import save_file

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter

from ..models import randomise
from .adapterhub_models import base, inputs, output

FIXTURES = Path(__file__).parent / "adapterhub"

RECIPES: dict[str, str] = {
    "bert-serial": "serial_adapter{bottleneck=3,activation=silu,norms=false}",
    "bert-serial_ffn": "serial_adapter{bottleneck=4,norms=false,where=ffn and sublayer and layer in [1]}",
    "bert-lora": "lora{rank=2,where=q|v}",
    "bert-lora_ffn": "lora{rank=2,alpha=7,where=q|ffn}",
    "bert-ia3": "ia3{where=k|v}",
    "bert-prefix": "prefix_tuning{length=3}",
    "bert-unipelt": "unipelt{rank=2,alpha=3,length=3,bottleneck=4,padding=true}",
    "bert-gated": "unipelt{rank=2,length=3,bottleneck=4,padding=true,placement=houlsby}",
    "bert-fusion": "serial_adapter{bottleneck=4,norms=false,name=one};"
    "serial_adapter{bottleneck=4,activation=relu,norms=false,name=two};adapter_fusion{name=both}",
    "bert-compacter": "compacter{n=2,bottleneck=4,rank=2,norms=false}",
    "bert-phm": "compacter{n=4,bottleneck=4,rank=none,shared=false,activation=gelu_new,norms=false,"
    "where=ffn and sublayer}",
    "llama-compacter": "compacter{n=4,bottleneck=8,norms=false}",
    "t5-compacter": "compacter{n=2,bottleneck=4,norms=false}",
    "vit-compacter": "compacter{n=2,bottleneck=4,norms=false}",
    "llama-serial": "serial_adapter{bottleneck=4,norms=false}",
    "llama-lora": "lora{rank=2,where=q|k|v}",
    "llama-down": "lora{rank=2,where=ffn.down}",
    "llama-dora": "dora{rank=2,alpha=5,where=q|v}",
    "llama-prefix": "prefix_tuning{length=3}",
    "gpt2-lora": "lora{rank=2,where=q|v}",
    "gpt2-ia3": "ia3{where=k|v}",
    "t5-serial": "serial_adapter{bottleneck=4,norms=false}",
    "t5-lora": "lora{rank=2,where=q|v|ffn.up}",
    "bart-serial": "serial_adapter{bottleneck=4,norms=false}",
    "vit-serial": "serial_adapter{bottleneck=4,norms=false}",
    "vit-lora": "lora{rank=2,where=q|v|ffn}",
    "vit-prefix": "prefix_tuning{length=3}",
    "bart-prefix": "prefix_tuning{length=3,where=attention}",
}
AGAIN = (
    "bert-normed", "bert-normed_inside", "bert-scaled_par_bn", "bert-residual_after",
    "bert-unipelt", "bert-mam", "bert-compacter", "llama-compacter", "bert-phm_whole", "llama-seq_bn", "llama-par_bn",
    "gpt2-lora", "bert-fusion", "bart-prefix", "vit-lora", "vit-double_seq_bn",
    "t5-prefix_flat", "bert-double_seq_bn_inv", "bert-inv_alone", "gpt2-seq_bn_inv",
    "llama-par_bn_inv", "llama-unipelt", "bert-prompt", "bert-prompt_behind_first",
)  # fmt: skip
"""Fixtures that are read, changed, and written."""


@functools.cache
def program(name: str) -> peftfx.Program:
    """One of the tiny models, captured."""
    return peftfx.capture(base(name), kwargs=inputs(name))


def trained(case: str) -> peftfx.Program:
    """A program with what the recipe inserts, random."""
    return randomise(peftfx.run(program(case.partition("-")[0]), RECIPES[case]), 0.2)


def changed(case: str) -> peftfx.Program:
    """A program with a fixture's adapter, and noise on all that trains."""
    return randomise(load_adapter(program(case.partition("-")[0]), FIXTURES / case), 0.1)


def main() -> None:
    target = Path(sys.argv[1])
    for case in (*RECIPES, *(f"{c} again" for c in AGAIN)):
        name, _, again = case.partition(" ")
        ours = changed(name) if again else trained(name)
        folder = target / case.replace(" ", "_")
        save_adapter(ours, folder, "adapterhub")
        save_file(
            {"output": output(ours, name.partition("-")[0]).contiguous()},
            folder / "output.safetensors",
        )


if __name__ == "__main__":
    main()
