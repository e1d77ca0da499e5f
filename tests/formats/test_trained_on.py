"""The walk of someone who has PEFT and the Trainer: his adapter comes in, trains on, and goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx

from .peft_cases import IDS, TEXT, base, write
from .test_hf_peft import near

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**TEXT, labels=IDS).logits


@pytest.mark.parametrize("case", ["lora", "dora", "token rows", "lokr", "oft"])
def test_an_adapter_of_peft_trains_on_with_the_trainer(case: str, tmp_path: Path) -> None:
    import peft
    import transformers

    want = write(case, tmp_path / "theirs")
    program = peftfx.capture(base("llama"), kwargs={**TEXT, "labels": IDS})
    read = peftfx.load_peft(program, tmp_path / "theirs")
    near(logits(read), want)
    controllers = peftfx.controllers(read)
    rows = [{n: t[0] for n, t in TEXT.items()} | {"labels": IDS[0]} for _ in range(4)]
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "runs"), "max_steps": STEPS, "use_cpu": True, "report_to": [],
        "per_device_train_batch_size": 2, "learning_rate": 0.05, "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip
    transformers.Trainer(
        model=read.module, args=transformers.TrainingArguments(**settings), train_dataset=rows,  # pyright: ignore
        callbacks=[peftfx.trainer_callback(controllers)],
    ).train()  # fmt: skip
    trained = logits(read)
    assert (trained - want).abs().max() > 0.01 * want.abs().max()
    peftfx.save_peft(read, tmp_path / "ours", task="CAUSAL_LM")
    again = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "ours")).eval()
    near(logits(again), trained)
