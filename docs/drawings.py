"""Draws the example pictures of this folder: `python docs/drawings.py` (extras hf and demo)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx.demo.encoder import load_model

HERE = Path(__file__).parent


def main() -> None:
    ids = torch.arange(32).view(2, 16) + 5
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = peftfx.capture(load_model(), kwargs=inputs)
    peftfx.draw_sites(program, HERE / "sites-minilm.svg")
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    program = peftfx.capture(LlamaForCausalLM(config).eval(), kwargs=inputs)
    peftfx.draw_sites(program, HERE / "sites-llama.svg", where="(q|v) and layer>=4")


if __name__ == "__main__":
    main()
