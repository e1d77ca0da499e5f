"""`transformers.Trainer` on a program, unmodified: it does what the plain loop does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import ArtifactError, BaseMismatchError, PassError
from peftfx.training.state import read_state
from peftfx.training.trainer import ADAPTER, STATE

from .loops import STEPS, TEXT, Recorder, expected, fresh, loop, record, recorder, same, task_loss
from .models import VOCABULARY, batch, first, llama
from .recipes import METHODS, method_class

LORA = "lora{rank=2,where=q|v}"


class Rows(torch.utils.data.Dataset[Any]):
    """The rows of the loop's batches, in order, with a column that no program takes."""

    def __init__(self, labels: str, steps: int = STEPS) -> None:
        self.rows: list[dict[str, Tensor]] = []
        for step in range(steps):
            inputs = labelled_batch(labels, step)
            inputs["number"] = torch.arange(3)
            self.rows += [{n: t[i] for n, t in inputs.items()} for i in range(3)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def labelled_batch(labels: str, step: int) -> dict[str, Tensor]:
    """A batch without labels, with those of a language model, or with one of two classes."""
    inputs = batch(seed=step)
    if labels == "tokens":
        inputs["labels"] = inputs["input_ids"]
    if labels == "class":
        inputs["labels"] = (inputs["input_ids"][:, 0] > VOCABULARY // 4).long()
    return inputs


def make(model: Any, folder: Path, labels: str, callbacks: Any = (), **options: Any) -> Any:
    """A Trainer over the batches in order."""
    import transformers

    given = ("compute_loss_func", "optimizers")
    others = {n: options.pop(n) for n in given if n in options}
    usual: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 3,
        "save_steps": 4, "report_to": [], "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 0.02,
        "weight_decay": 0.01, "optim": "adamw_torch", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**(usual | options)),
        train_dataset=Rows(labels), eval_dataset=Rows(labels, 1), callbacks=list(callbacks),
        **others,
    )  # fmt: skip


def controlled(
    program: peftfx.Program, folder: Path, labels: str, resume: Any = None, **options: Any
) -> tuple[Any, Any]:
    """The same with the controllers' callback, and the controllers."""
    controllers = peftfx.controllers(program)
    callback = peftfx.trainer_callback(controllers, resume, options.pop("base", False))
    computed = (
        None if labels else callback.compute_loss(lambda outputs, _, **kw: task_loss(outputs))
    )
    made = make(
        options.pop("model", program.module), folder, labels, [callback],
        optimizers=(torch.optim.AdamW(controllers.param_groups(0.02, 0.01)), None),
        **{"compute_loss_func": computed} | options,
    )  # fmt: skip
    return made, controllers


@pytest.fixture(scope="module")
def tied() -> Any:
    """A language model with tied embeddings."""
    torch.manual_seed(0)
    return llama(tie_word_embeddings=True).eval()


@pytest.fixture(scope="module")
def labelled(tied: Any) -> peftfx.Program:
    """The same, computing its own loss."""
    return peftfx.capture(tied, kwargs=labelled_batch("tokens", 0))


def bert_classifier() -> Any:
    """BERT with two classes, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> peftfx.Program:
    """The same, computing its own loss."""
    return peftfx.capture(bert_classifier(), kwargs=labelled_batch("class", 0))


# Without any callback: a program is a model like any other.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_labelled_program_is_a_model(
    classifier: peftfx.Program, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its labels are found, other columns dropped; every step's loss equals the plain loop's."""
    program = peftfx.run(classifier, f"{LORA};bitfit")
    mixed = dtype is torch.bfloat16
    made = make(
        program.module, tmp_path, "class", bf16=mixed, gradient_accumulation_steps=2,
        max_steps=16, num_train_epochs=4, logging_strategy="steps", logging_steps=1,
        save_strategy="no", eval_strategy="steps", eval_steps=8,
    )  # fmt: skip
    assert made.label_names == ["labels"] and not made.model_accepts_loss_kwargs
    made.train()
    logs = made.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    straight = peftfx.run(classifier, f"{LORA};bitfit").train()
    parameters = straight.trainable_parameters()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    want: list[float] = []
    for step in range(16):
        parts: list[Tensor] = []
        for part in (2 * step, 2 * step + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = straight(**labelled_batch("class", part % STEPS))["loss"].float() / 2
            loss.backward()
            parts.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        want.append(float(sum(parts)))
    assert losses == pytest.approx(want, abs=1e-6)
    same(program, straight)
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])  # the same batches, three epochs later
    evaluated = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[-1] > 0


def test_labels_can_stay_outside(tied: Any, labelled: peftfx.Program, tmp_path: Path) -> None:
    """A program without a loss, with `label_names` and `compute_loss_func`, as for any model."""

    def next_token(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    def losses(base: peftfx.Program, **options: Any) -> list[float]:
        made = make(
            peftfx.run(base, LORA).module, tmp_path, "tokens", save_strategy="no", max_steps=3,
            logging_strategy="steps", logging_steps=1, **options,
        )  # fmt: skip
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    plain = peftfx.capture(tied, kwargs=batch())
    outside = losses(plain, label_names=["labels"], compute_loss_func=next_token)
    assert outside == pytest.approx(losses(labelled), abs=1e-6) and len(outside) == 3


def test_an_outlined_program_is_a_model(classifier: peftfx.Program, tmp_path: Path) -> None:
    """Its labels are found in its class, and it trains as the flat one, with its blocks checkpointed."""
    flat, program = (peftfx.run(classifier, TEXT) for _ in range(2))
    controlled(flat, tmp_path / "a", "class")[0].train()
    module = peftfx.outline(program)
    made, mine = controlled(
        program, tmp_path / "b", "class", model=module, gradient_checkpointing=True
    )
    assert made.label_names == ["labels"] and made.evaluate()["eval_loss"] > 0
    made.train()
    same(program, flat)
    assert mine.state_dict()["adalora"]["sensitivity"]
    held = safetensors.torch.load_file(tmp_path / "b" / "checkpoint-4" / "model.safetensors")
    assert set(held) == set(program.named_trainable_parameters())
    assert all(block.checkpointed for block in module.blocks)


@pytest.mark.parametrize("method", METHODS)
def test_every_state_dict_can_be_written(captured: Any, method: str) -> None:
    """What `Trainer` saves: no shared storage, nothing but contiguous tensors; tied weights once,
    where a method reaches the table that the head is tied to."""
    tied = {"embedding", "head"} & {*method_class(method).kinds, *method_class(method).named}
    module = captured.placed("tied" if tied else "tiny", method).module
    held = safetensors.torch.load(safetensors.torch.save(module.state_dict()))
    assert module.load_state_dict(held) and ("head.weight" in held) != bool(tied)


# With the controllers.


def test_equals_the_loop(captured: Any, tmp_path: Path) -> None:
    """A program without a loss: bit for bit what the plain loop gives, and the state is kept."""
    _, base = captured["decoder"]
    straight, controllers, optimizer = fresh(peftfx.run(base, TEXT).train())
    loop(straight, controllers, optimizer, range(STEPS))
    program = peftfx.run(base, TEXT)
    made, mine = controlled(program, tmp_path, "")
    made.train()
    same(program, straight)
    state, want = mine.state_dict()["adalora"], controllers.state_dict()["adalora"]
    assert all(torch.equal(t, want["sensitivity"][n]) for n, t in state["sensitivity"].items())
    smaller = peftfx.run(program.eval(), mine.finish())
    torch.testing.assert_close(first(smaller(**batch())), first(program(**batch())))
    assert len(smaller.trainable_parameters()) > 0
    assert not program.module._forward_hooks and not program.module._forward_pre_hooks


def test_goes_on_where_it_stopped(labelled: Any, tmp_path: Path) -> None:
    """From a checkpoint in its own folder and in another one; without the state it refuses."""
    straight = peftfx.run(labelled, TEXT)
    controlled(straight, tmp_path / "one", "tokens")[0].train()
    checkpoint = tmp_path / "one" / "checkpoint-4"
    program = peftfx.run(labelled, TEXT)
    controlled(program, tmp_path / "one", "tokens")[0].train(resume_from_checkpoint=str(checkpoint))
    same(program, straight)
    program = peftfx.run(labelled, TEXT)
    made, _ = controlled(program, tmp_path / "two", "tokens", resume=checkpoint)
    made.train(resume_from_checkpoint=str(checkpoint))
    same(program, straight)
    made, _ = controlled(peftfx.run(labelled, TEXT), tmp_path / "three", "tokens")
    with pytest.raises(PassError, match="resume=FOLDER"):
        made.train(resume_from_checkpoint=str(checkpoint))
    data = (checkpoint / STATE).read_bytes()
    (checkpoint / STATE).write_bytes(data[:-7])
    with pytest.raises(ArtifactError, match="truncated"):
        read_state(checkpoint / STATE)


@pytest.mark.parametrize("base", [False, True])
def test_what_a_checkpoint_holds(labelled: Any, base: bool, tmp_path: Path) -> None:
    """What trains and the artifact; the frozen base, its tied tensor once, only on request."""
    program = peftfx.run(labelled, f"{LORA};bitfit")
    everything = set(program.module.state_dict())
    trained = set(program.named_trainable_parameters())
    made, _ = controlled(program, tmp_path, "tokens", base=base, max_steps=4)
    made.train()
    checkpoint = tmp_path / "checkpoint-4"
    held = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert set(held) == (everything if base else trained) and trained < everything
    assert "lm_head.weight" not in held and program.aliases["lm_head.weight"] in everything
    loaded = peftfx.load(labelled, checkpoint / ADAPTER)
    same(loaded, program)
    assert set(program.module.state_dict()) == everything
    made.save_model(str(tmp_path / "all"))
    whole = safetensors.torch.load_file(tmp_path / "all" / "model.safetensors")
    assert set(whole) == everything
    assert all(torch.equal(t, whole[n]) for n, t in program.module.state_dict().items())


def test_the_best_checkpoint_comes_back(labelled: Any, tmp_path: Path) -> None:
    """`load_best_model_at_end` reads a checkpoint without the base."""
    program = peftfx.run(labelled, LORA)
    made, _ = controlled(
        program, tmp_path, "tokens", eval_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    same(peftfx.load(labelled, best / ADAPTER), program)


@pytest.mark.parametrize("labels", ["tokens", ""])
def test_calls_in_order(
    captured: Any, labelled: Any, monkeypatch: pytest.MonkeyPatch, labels: str, tmp_path: Path
) -> None:
    """Gradients accumulate over two forwards a step; evaluation is not announced."""
    base = labelled if labels else captured["decoder"][1]
    program = peftfx.run(base, record(monkeypatch))
    made, controllers = controlled(
        program, tmp_path, labels, gradient_accumulation_steps=2, max_steps=3,
        eval_strategy="steps" if labels else "no", eval_steps=1,
    )  # fmt: skip
    made.train()
    assert recorder(controllers).seen == [("start", 3), *expected(range(3), parts=2)]


@pytest.mark.parametrize("labels", ["tokens", ""])
def test_accumulated_terms_count_once(
    captured: Any, labelled: Any, monkeypatch: pytest.MonkeyPatch, labels: str, tmp_path: Path
) -> None:
    """The term alone, accumulated over two forwards, has the gradient of one."""

    class Squares(Recorder):
        def loss(self, outputs: Any, batch: Any, forward: Any) -> Tensor:
            return self.squares() - 0.0 * first(outputs).sum()

        def before_step(self, step: int) -> None:
            self.seen = [(b.a.grad, 2 * b.a.detach()) for _, b in self.branches()]

    monkeypatch.setattr(peftfx.LoRA, "controller", Squares)
    base = labelled if labels else captured["decoder"][1]
    program = peftfx.run(base, "lora{rank=2,where=q}")  # B is zero: no other gradient to A
    made, controllers = controlled(
        program, tmp_path, labels, gradient_accumulation_steps=2, max_steps=1
    )
    seen: list[Any] = []
    recorder(controllers).after_step = lambda step: seen.extend(
        (g.clone(), w.clone()) for g, w in recorder(controllers).seen
    )
    made.train()
    assert len(seen) == 2
    for grad, want in seen:
        torch.testing.assert_close(grad, want)


def test_an_interrupted_run_leaves_nothing_behind(
    captured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next run's controllers alone hear of it."""
    program = peftfx.run(captured["decoder"][1], record(monkeypatch))
    made, before = controlled(program, tmp_path, "", max_steps=2)

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder(before), "after_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    heard = list(recorder(before).seen)
    made, after = controlled(program, tmp_path, "", max_steps=2)
    made.train()
    assert recorder(after).seen == [("start", 2), *expected(range(2))]
    assert recorder(before).seen == heard and not program.module._forward_hooks


def test_misuse_is_named(
    captured: Any, labelled: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another program's module, and a loss that lacks the controllers' terms."""
    made, _ = controlled(peftfx.run(labelled, LORA), tmp_path, "tokens", max_steps=1)
    made.model = made.model_wrapped = peftfx.run(labelled, LORA).module
    with pytest.raises(PassError, match="did not run the program"):
        made.train()
    program = peftfx.run(captured["decoder"][1], record(monkeypatch))
    made, _ = controlled(
        program, tmp_path, "", max_steps=1, compute_loss_func=lambda o, _, **kw: task_loss(o)
    )
    with pytest.raises(PassError, match=r"lacks the terms of lora.*callback\.compute_loss"):
        made.train()
    assert not peftfx.run(labelled, LORA).module._forward_hooks


def test_resuming_needs_the_same_recipe_and_base(tied: Any, labelled: Any, tmp_path: Path) -> None:
    first_run = peftfx.run(labelled, LORA)
    controlled(first_run, tmp_path, "tokens", max_steps=4)[0].train()
    other = peftfx.run(labelled, "lora{rank=2,alpha=1,where=q|v}")
    with pytest.raises(PassError, match=r"was written by lora.*Run the same recipe"):
        controlled(other, tmp_path, "tokens")[0].train(resume_from_checkpoint=True)
    changed = copy.deepcopy(tied)
    changed.get_parameter("model.norm.weight").data.fill_(1.5)
    moved = peftfx.run(peftfx.capture(changed, kwargs=labelled_batch("tokens", 0)), LORA)
    with pytest.raises(BaseMismatchError, match="other base weights"):
        controlled(moved, tmp_path, "tokens")[0].train(resume_from_checkpoint=True)
    same(peftfx.load(labelled, tmp_path / "checkpoint-4" / ADAPTER), first_run)


@pytest.mark.parametrize("text", ["ia3", "dora{rank=2,where=q}", "train{where=norm}"])
def test_decay_of_multipliers_is_refused(labelled: Any, text: str, tmp_path: Path) -> None:
    """`Trainer`'s own optimizer decays all but biases and layer norms, by their names."""
    program = peftfx.run(labelled, text)
    controllers = peftfx.controllers(program)
    callback = peftfx.trainer_callback(controllers)
    usual: dict[str, Any] = {"save_strategy": "no", "max_steps": 1}
    made = make(program.module, tmp_path, "tokens", [callback], **usual)
    line = r"to zero: .*optimizers=\(torch.optim.AdamW\(controllers.param_groups"
    if text != "train{where=norm}":  # their names say norm
        with pytest.raises(PassError, match=line):
            made.train()
    undecayed = make(program.module, tmp_path, "tokens", [callback], weight_decay=0.0, **usual)
    undecayed.train()
    everything = torch.optim.AdamW(program.trainable_parameters(), weight_decay=0.1)
    names = controllers.decayed(everything)
    assert names and all(program.module.get_parameter(n).dim() < 2 for n in names)
    own = torch.optim.AdamW(controllers.param_groups(lr=1.0, weight_decay=0.1))
    assert not controllers.decayed(own)


def test_what_the_user_trains_decays_like_the_rest() -> None:
    """A norm or bias that the model itself trains is no matrix either."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    program = peftfx.capture(model, (torch.randn(3, 4),))
    groups = peftfx.controllers(program).param_groups(1e-3, 0.1)
    decayed = [n for g in groups if g["weight_decay"] for n in g["names"]]
    assert decayed == ["2.weight"] and sum(len(g["names"]) for g in groups) == 4
