"""A real language model trained for 20 steps by PEFT and by peftfx, each read by the other:
`python benchmarks/long_peft.py --model DIRECTORY`.

The directory is a Hugging Face one, or holds one GGUF file (which is dequantised). The task is
real: one-line summaries of functions of the standard library, in the model's chat template, the
loss on the answer. Next-token probabilities are compared on summaries that were held out:

    trained by PEFT, read by load_peft, folded, written, loaded by transformers alone
    trained by peftfx, written by save_peft, loaded by PeftModel

Writes `benchmarks/long_peft.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

import peftfx
from peftfx.demo.corpus import read_corpus

RANK, ALPHA, RATE = 8, 16, 1e-3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Batch = dict[str, Tensor]


def plain_base(source: Path, target: Path) -> Any:
    """Writes the model as a Hugging Face directory in float32; returns its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if files := sorted(source.glob("*.gguf")):
        options = {"gguf_file": files[0].name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # the weights are not quantised any more
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    return AutoTokenizer.from_pretrained(source, **options)


def name_of(source: Path) -> str:
    return next((f.stem for f in sorted(source.glob("*.gguf"))), source.name)


def model_at(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def examples(tokenizer: Any, count: int, longest: int) -> list[Batch]:
    """One function each: `input_ids`, `attention_mask` and `labels`, -100 on the question."""
    pairs = read_corpus().pairs
    made: list[Batch] = []
    for pair in pairs[:: max(1, len(pairs) // (20 * count))]:
        asked = f"Say in one line what this function does.\n\n{pair.code}"
        chat = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        question = tokenizer(text)["input_ids"]
        answer = tokenizer(f"{pair.query}<|im_end|>\n")["input_ids"]
        if len(question) + len(answer) > longest:
            continue
        ids = torch.tensor([question + answer])
        labels = torch.tensor([[-100] * len(question) + answer])
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        if len(made) == count:
            return made
    raise SystemExit(f"the corpus holds only {len(made)} functions of at most {longest} tokens")


def batches(rows: Sequence[Batch], size: int) -> list[Batch]:
    """Rows side by side, padded on the right."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return [
        {
            name: torch.nn.utils.rnn.pad_sequence(
                [row[name][0] for row in rows[i : i + size]], True, fill
            )
            for name, fill in fills.items()
        }
        for i in range(0, len(rows), size)
    ]


def loss_of(run: Callable[..., Any], batch: Batch) -> Tensor:
    logits = run(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )


def trained(
    run: Callable[..., Any], parameters: Iterable[Tensor], data: Sequence[Batch]
) -> dict[str, float]:
    """One step a batch; the first and the last loss, and CPU seconds a step."""
    optimizer = torch.optim.AdamW(list(parameters), lr=RATE, weight_decay=0.0)
    losses: list[float] = []
    begun = time.process_time()
    for batch in data:
        loss = loss_of(run, batch)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {len(losses)}: {losses[-1]:.4f}", flush=True)
    seconds = (time.process_time() - begun) / len(data)
    return {"first loss": losses[0], "last loss": losses[-1], "CPU s a step": round(seconds, 2)}


@torch.no_grad()
def probabilities(run: Callable[..., Any], held_out: Sequence[Batch]) -> list[Tensor]:
    """Of the next token, at every place of an example each."""
    return [
        run(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.softmax(-1)
        for b in held_out
    ]


@torch.no_grad()
def perplexity(run: Callable[..., Any], held_out: Sequence[Batch]) -> float:
    return float(torch.stack([loss_of(run, b) for b in held_out]).mean().exp())


def compared(got: Sequence[Tensor], want: Sequence[Tensor]) -> dict[str, float]:
    pairs = list(zip(got, want, strict=True))
    same = torch.cat([(g.argmax(-1) == w.argmax(-1)).flatten() for g, w in pairs])
    return {
        "largest difference of a probability": max(float((g - w).abs().max()) for g, w in pairs),
        "same most probable token": float(same.float().mean()),
        "places": len(same),
    }


def from_peft(base: Path, work: Path, data: Sequence[Batch], held_out: Sequence[Batch]) -> Any:
    """Trained there, folded here, loaded by transformers."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES)
    theirs: Any = peft.get_peft_model(model_at(base), config).train()
    figures: dict[str, Any] = trained(
        theirs, (p for p in theirs.parameters() if p.requires_grad), data
    )
    want = probabilities(theirs.eval(), held_out)
    figures["perplexity held out"] = perplexity(theirs, held_out)
    theirs.save_pretrained(str(work / "theirs"))
    del theirs
    gc.collect()
    model = model_at(base)
    read = peftfx.load_peft(captured(model, data), work / "theirs")
    figures["read"] = compared(probabilities(read, held_out), want)
    folded = peftfx.run(read, "fold")
    peftfx.as_hf(folded, model.config).save_pretrained(work / "folded")
    del read, folded, model
    gc.collect()
    alone = model_at(work / "folded")
    figures["folded, by transformers alone"] = compared(probabilities(alone, held_out), want)
    return figures


def to_peft(base: Path, work: Path, data: Sequence[Batch], held_out: Sequence[Batch]) -> Any:
    """Trained here, loaded there."""
    import peft

    model = model_at(base)
    program = captured(model, data)
    text = f"lora{{rank={RANK},alpha={ALPHA},where=linear and not head}}"
    ours = peftfx.run(program, text)
    figures: dict[str, Any] = {"perplexity untrained": perplexity(program, held_out)}
    ours.train()
    figures |= trained(ours, ours.trainable_parameters(), data)
    ours.eval()
    want = probabilities(ours, held_out)
    figures["perplexity held out"] = perplexity(ours, held_out)
    peftfx.save_peft(ours, work / "ours", task="CAUSAL_LM")
    del ours, program, model
    gc.collect()
    theirs = peft.PeftModel.from_pretrained(model_at(base), str(work / "ours")).eval()
    figures["loaded by PEFT"] = compared(probabilities(theirs, held_out), want)
    return figures


def captured(model: Any, data: Sequence[Batch]) -> peftfx.Program:
    example = {n: data[0][n][:2] for n in ("input_ids", "attention_mask")}
    return peftfx.capture(model, kwargs=example)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--longest", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = plain_base(options.model, work / "base")
        count = options.steps * options.batch + options.held_out
        rows = examples(tokenizer, count, options.longest)
        held_out, data = rows[: options.held_out], batches(rows[options.held_out :], options.batch)
        given = work / "base", work, data, held_out
        figures = {
            "machine": f"{platform.machine()}, {platform.system()}, torch {torch.__version__}",
            "model": f"{name_of(options.model)}, LoRA rank {RANK} on all linears but the head, "
            f"{options.steps} steps of {options.batch} examples",
            "trained by PEFT": from_peft(*given),
            "trained by peftfx": to_peft(*given),
        }
    text = json.dumps(figures, indent=2)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
