"""`as_hf`: generates, trains and is saved as the original model is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import peftfx
from peftfx.rewriter.errors import BlockError, ExportError, InputError

from .loops import STEPS, same
from .models import VOCABULARY, batch, first, llama, moved, randomise
from .test_trainers import bert_classifier, controlled, labelled_batch, make

LORA = "lora{rank=2,where=q|v}"


@pytest.fixture(scope="module")
def tied() -> Any:
    torch.manual_seed(0)
    return llama(tie_word_embeddings=True).eval()


@pytest.fixture(scope="module")
def labelled(tied: Any) -> peftfx.Program:
    """A tied language model captured with labels."""
    return peftfx.capture(tied, kwargs=labelled_batch("tokens", 0))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generates_what_the_original_does(
    tied: Any, labelled: peftfx.Program, options: dict[str, Any]
) -> None:
    """Greedily and with beams, without labels although the graph has them; the config stays."""
    before = copy.deepcopy(tied.config.to_dict())
    model = peftfx.as_hf(labelled, tied.config)
    assert type(model).__name__ == "LlamaForCausalLM" and model.can_generate()
    assert dict(model.named_parameters()).keys() == dict(tied.named_parameters()).keys()
    inputs = batch(3, 6)
    want = tied.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False, **options)
    got = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(got, want) and got.shape[1] > 6
    assert tied.config.to_dict() == before
    out, plain = model(**labelled_batch("tokens", 1)), model(**batch(seed=1))
    assert out.loss > 0 and "loss" not in plain and torch.equal(out.logits, plain.logits)
    assert torch.equal(model(**batch(seed=1), return_dict=False)[0], plain.logits)


def test_wrong_inputs_are_named(tied: Any, labelled: peftfx.Program) -> None:
    model = peftfx.as_hf(labelled, tied.config)
    inputs = batch(3, 6)
    inputs["attention_mask"][0, :2] = 0
    with pytest.raises(InputError, match="captured without position_ids"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(InputError, match="'inputs_embeds' was not captured"):
        model(inputs_embeds=torch.zeros(3, 6, 32), **batch(3, 6))


def test_a_folded_program_is_the_original_model(
    tied: Any, labelled: peftfx.Program, tmp_path: Path
) -> None:
    """`AutoModel` loads it without peftfx; the tied tensor is written once."""
    import transformers

    program = randomise(peftfx.run(labelled, LORA), 0.5)
    folded = peftfx.run(program, "fold")
    peftfx.as_hf(folded, tied.config).save_pretrained(tmp_path)
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in held
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(tied) and loaded.config.use_cache == tied.config.use_cache
    assert (
        loaded.generation_config.use_cache
        and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    )
    inputs = labelled_batch("tokens", 3)
    assert torch.equal(loaded(**inputs).logits, first(folded(**inputs)))
    assert moved(first(labelled(**inputs)), loaded(**inputs).logits) > 0.01


def test_branches_are_saved_as_adapters(
    tied: Any, labelled: peftfx.Program, tmp_path: Path
) -> None:
    """Beside what `Trainer` goes on from; and `AutoModel` cannot take it for a whole model."""
    import transformers

    program = randomise(peftfx.run(labelled, LORA), 0.5)
    peftfx.as_hf(program, tied.config).save_pretrained(tmp_path)
    loaded = peftfx.load(labelled, tmp_path / "adapter")
    inputs = labelled_batch("tokens", 3)
    assert torch.equal(first(loaded(**inputs)), first(program(**inputs)))
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(held) == set(program.named_trainable_parameters())
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "adapter")
    assert type(config) is type(tied.config) and config.hidden_size == tied.config.hidden_size
    peftfx.as_hf(program, tied.config).save_pretrained(tmp_path / "all", base=True)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "all" / "base")
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in tied.state_dict().items())
    again = peftfx.load(base, tmp_path / "all" / "adapter")
    assert torch.equal(first(again(**inputs)), first(program(**inputs)))


def test_cards_are_written(tied: Any, labelled: peftfx.Program, tmp_path: Path) -> None:
    program = randomise(peftfx.run(labelled, "lora{rank=2,where=q,name=mine}"), 0.5)
    config = copy.deepcopy(tied.config)
    config.name_or_path = "someone/base"
    peftfx.as_hf(program, config).save_pretrained(tmp_path)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert text.startswith("---\nbase_model: someone/base\n") and "# mine, on someone/base" in text
    assert "`lora{rank=2,where=q,name=mine}` | 2 |" in text and "from_pretrained" in text
    folded = peftfx.run(program, "fold")
    peftfx.as_hf(folded, tied.config).save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "# merged model, on LlamaForCausalLM" in text and "without peftfx" in text
    assert folded.history[-1].certificate.text in text and str(tmp_path) not in text


def tokenizer(side: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(50))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        padding_side=side, model_input_names=names if side == "right" else ["input_ids", names[2]],
    )  # fmt: skip


TEXTS = ["w1 w2 w3", "w4 w5"]


@pytest.mark.parametrize("names", [("attention_mask",), ("token_type_ids", "labels")])
def test_pipelines_run_it(names: Any) -> None:
    """Of texts of unequal lengths; inputs that were not captured, or are not given, are as usual."""
    import transformers

    model = bert_classifier()
    inputs = {**labelled_batch("class", 0), "token_type_ids": torch.zeros(3, 7, dtype=torch.long)}
    kept = {n: t for n, t in inputs.items() if n in ("input_ids", "attention_mask", *names)}
    kept["token_type_ids"] = torch.zeros_like(kept["input_ids"])
    if "token_type_ids" not in names:
        del kept["token_type_ids"]
    program = peftfx.run(peftfx.capture(model, kwargs=kept), LORA)
    mine = peftfx.as_hf(program, model.config)
    run, own = (
        transformers.pipeline("text-classification", model=m, tokenizer=tokenizer("right"))
        for m in (mine, model)
    )  # fmt: skip
    for got, want in zip(run(TEXTS, batch_size=2), own(TEXTS, batch_size=2), strict=True):
        assert got["label"] == want["label"] and got["score"] == pytest.approx(want["score"])
    ids = batch(seed=1)["input_ids"]
    assert torch.allclose(mine(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
    with pytest.raises(InputError, match="'input_ids' is missing"):
        mine()
    if "token_type_ids" not in names:
        with pytest.raises(InputError, match="'token_type_ids' was not captured"):
            mine(input_ids=ids, token_type_ids=torch.ones_like(ids))


def test_pipelines_generate_and_extract(tied: Any) -> None:
    import transformers

    positions = torch.arange(7).expand(3, 7)
    program = peftfx.capture(tied, kwargs={**batch(3, 7), "position_ids": positions})
    mine = peftfx.as_hf(peftfx.run(program, LORA), tied.config)
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "batch_size": 2}
    got, want = (
        transformers.pipeline("text-generation", model=m, tokenizer=tokenizer("left"))(
            TEXTS, **asked
        )
        for m in (mine, tied)
    )
    assert got == want
    plain = batch(2, 5)
    assert torch.equal(mine(**plain).logits, tied(**plain).logits)  # positions may be left out
    classifier = bert_classifier()
    encoder = classifier.bert
    program = peftfx.capture(encoder, kwargs=batch())
    mine = peftfx.as_hf(program, encoder.config)
    got, want = (
        transformers.pipeline("feature-extraction", model=m, tokenizer=tokenizer("right"))(TEXTS)
        for m in (mine, encoder)
    )
    assert torch.allclose(torch.tensor(got[0]), torch.tensor(want[0]), atol=1e-6)


def test_the_trainer_trains_it(tied: Any, labelled: peftfx.Program, tmp_path: Path) -> None:
    """As the module itself; with branches left, a checkpoint is an adapter."""
    trains(labelled, tied.config, LORA, "tokens", tmp_path)
    assert (tmp_path / "b" / "checkpoint-4" / "adapter").is_dir()


def test_the_trainer_checkpoints_its_blocks(
    tied: Any, labelled: peftfx.Program, tmp_path: Path
) -> None:
    """An outlined program, with the controllers hooked in; a flat one says what to do."""
    text = "adalora{rank=4,target=2,warmup=1,final=3,where=q|v}"
    straight, program = (peftfx.run(labelled, text) for _ in range(2))
    controlled(straight, tmp_path, "tokens", save_strategy="no")[0].train()
    options = {"save_strategy": "no", "gradient_checkpointing": True}
    model = peftfx.as_hf(peftfx.outline(program), tied.config)
    controlled(program, tmp_path, "tokens", model=model, **options)[0].train()
    same(program, straight)
    assert all(block.checkpointed for block in model.runs.blocks)
    flat = peftfx.as_hf(program, tied.config)
    with pytest.raises(BlockError, match="Outline it first"):
        make(flat, tmp_path, "tokens", **options).train()


def test_the_trainer_trains_what_the_configuration_expresses(tmp_path: Path) -> None:
    """BitFit on BERT: every checkpoint is a model that transformers loads."""
    import transformers

    model = bert_classifier()
    base = peftfx.capture(model, kwargs=labelled_batch("class", 0))
    trained = trains(base, model.config, "bitfit", "class", tmp_path)
    folder = tmp_path / "b" / f"checkpoint-{STEPS}"
    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = labelled_batch("class", 3)
    assert torch.equal(loaded(**inputs).logits, trained.eval()(**inputs).logits)
    assert not peftfx.as_hf(trained, model.config).can_generate()


def trains(
    base: peftfx.Program, config: Any, text: str, labels: str, folder: Path
) -> peftfx.Program:
    """A program that `Trainer` has trained as a model: as its module, and resumed exactly."""
    straight, program, again = (peftfx.run(base, text) for _ in range(3))
    make(straight.module, folder / "a", labels, save_strategy="no").train()
    made = make(peftfx.as_hf(program, config), folder / "b", labels)
    assert made.label_names == ["labels"]
    made.train()
    made = make(peftfx.as_hf(again, config), folder / "b", labels)
    made.train(resume_from_checkpoint=str(folder / "b" / "checkpoint-4"))
    for name, parameter in straight.named_trainable_parameters().items():
        assert torch.equal(program.module.get_parameter(name), parameter), name
        assert torch.equal(again.module.get_parameter(name), parameter), name
    return program


def test_an_encoder_decoder_generates() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
        "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    model: Any = T5ForConditionalGeneration(T5Config(**options)).eval()
    inputs = batch(3, 7, pad=2)
    program = peftfx.capture(
        model, kwargs={**inputs, "decoder_input_ids": batch(3, 4)["input_ids"]}
    )
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    mine = peftfx.as_hf(program, model.config)
    assert torch.equal(mine.generate(**inputs, max_new_tokens=8, do_sample=False), want)


def test_cut_channels_change_the_configuration(
    tied: Any, labelled: peftfx.Program, tmp_path: Path
) -> None:
    import transformers

    program = peftfx.run(labelled, "channel_pruning{ratio=0.25}")
    peftfx.as_hf(program, tied.config).save_pretrained(tmp_path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.intermediate_size == 48 and tied.config.intermediate_size == 64
    inputs = labelled_batch("tokens", 3)
    assert torch.equal(loaded(**inputs).logits, first(program(**inputs)))
    unequal = peftfx.run(labelled, "channel_pruning{ratio=0.25,where=layer>0}")
    with pytest.raises(ExportError, match=r"Cut the same number everywhere|cannot hold"):
        peftfx.as_hf(unequal, tied.config).save_pretrained(tmp_path / "b")


def test_what_the_configuration_cannot_express(
    captured: Any, tied: Any, labelled: peftfx.Program, tmp_path: Path
) -> None:
    """Added biases, another configuration, and a class that transformers does not have."""
    biased = peftfx.run(labelled, "bitfit")
    with pytest.raises(ExportError, match="no place in the original model"):
        peftfx.as_hf(biased, tied.config).save_pretrained(tmp_path)
    other = copy.deepcopy(tied.config)
    other.rms_norm_eps = 0.5
    with pytest.raises(ExportError, match="gives other outputs"):
        peftfx.as_hf(labelled, other).save_pretrained(tmp_path)
    other.num_hidden_layers = 1
    with pytest.raises(ExportError, match="cannot hold the program's tensors"):
        peftfx.as_hf(labelled, other).save_pretrained(tmp_path)
    mine = peftfx.as_hf(captured["decoder"][1], copy.deepcopy(tied.config))
    with pytest.raises(ExportError, match="transformers has no model Decoder"):
        mine.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    _, program = captured["decoder"]
    inputs = batch(2, 6)
    got = mine.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=VOCABULARY)
    assert torch.equal(got, program.generate(**inputs, max_new_tokens=6))
