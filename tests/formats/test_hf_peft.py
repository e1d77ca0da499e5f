"""Adapters of PEFT: read, they compute what PEFT computes; written, they are its files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftfx
from peftfx.exporters.formats import convert
from peftfx.exporters.hf_peft.adapter import READERS as READ
from peftfx.exporters.hf_peft.adapter import REFUSED
from peftfx.rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    NoFormError,
    NonFiniteError,
    RewriteError,
)

from ..models import randomise
from .peft_cases import CASES, IDS, base, computed, inputs, output, program, write

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("case", list(CASES))
def test_read_and_written_as_peft_has_it(case: str, tmp_path: Path) -> None:
    import peft

    name, _ = CASES[case]
    want = write(case, tmp_path / "theirs")
    before = program(name)
    read = peftfx.load_peft(before, tmp_path / "theirs")
    got = output(read(**inputs(name)))
    near(got, want)
    assert (got - output(before(**inputs(name)))).abs().max() > 1e-3 * want.abs().max()

    peftfx.save_peft(read, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / d / WEIGHTS) for d in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]) and tensor.dtype == ours[key].dtype, key
    again = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "ours")).eval()
    near(computed(again, name, case), want)


@pytest.mark.parametrize(
    "case",
    ["patterns", "dora", "loha", "table", "prefix", "head saved", "kasa", "invocation"],
)
def test_an_imported_adapter_is_one_of_ours(case: str, tmp_path: Path) -> None:
    """Saved, loaded, verified, taken out, folded."""
    name, _ = CASES[case]
    write(case, tmp_path / "a")
    before = program(name)
    read = peftfx.load_peft(before, tmp_path / "a", name="theirs")
    assert read.adapters == ("theirs",) and "read from peft" in str(read.history[-1])
    peftfx.save(read, tmp_path / "b")
    again = peftfx.load(before, tmp_path / "b")
    assert torch.equal(output(again(**inputs(name))), output(read(**inputs(name))))
    assert all(c.holds for c in again.verify())
    without = read.without("theirs")
    assert torch.equal(output(without(**inputs(name))), output(before(**inputs(name))))
    if case not in ("prefix", "table", "invocation"):
        folded = peftfx.run(read, "fold")
        assert not folded.attachments
        near(output(folded(**inputs(name))), output(read(**inputs(name))))


OURS = {
    "lora{rank=3,where=q|v}": "llama",
    "lora{rank=3,where=linear};train{where=norm,name=lora_norms}": "llama",
    "dora{rank=3,where=q|ffn.down}": "llama",
    "lora{rank=2,where=q}": "gpt2",
    "ia3": "llama",
    "prompt_tuning{length=3}": "llama",
    "prefix_tuning{length=3,shift_positions=true}": "llama",
    "train{where=norm}": "llama",
    "train_tokens{ids=[3,9]}": "llama",
    "lora{rank=2,where=embedding.token|k}": "llama",
    "lora{rank=2,where=experts}": "qwen3_moe",
    "loha{rank=3,alpha=5,where=q|ffn.down}": "llama",
    "loha{rank=2,where=conv}": "unet",
    "lokr{rank=2,alpha=5,where=q|ffn.down}": "llama",
    "lokr{rank=1,decompose_both=true,factor=4,where=q|v}": "llama",
    "lokr{rank=9,where=conv}": "unet",
    "oft{block=8,where=q|ffn.down}": "llama",
    "oft{blocks=2,share=true,where=q|ffn.down}": "llama",
    "oft{block=8,series=true,terms=4,coft=true,eps=1.5,where=q}": "llama",
    "boft{block=8,where=q|ffn.down}": "llama",
    "boft{block=4,where=name:a}": "convolutions",
}


@pytest.mark.parametrize("recipe", list(OURS))
def test_what_is_trained_here_is_loaded_there(recipe: str, tmp_path: Path) -> None:
    import peft

    name = OURS[recipe]
    made = peftfx.run(program(name), recipe)
    made = randomise(made, 0.2)
    first = made.adapters[0]
    alone = made.without(*made.adapters[1:]) if len(made.adapters) > 1 else made
    task = None if name in ("unet", "convolutions") else "CAUSAL_LM"
    peftfx.save_peft(made, tmp_path / "a", first, task=task)
    theirs = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "a")).eval()
    near(computed(theirs, name, ""), output(alone(**inputs(name))))
    read = peftfx.load_peft(program(name), tmp_path / "a")
    near(output(read(**inputs(name))), output(alone(**inputs(name))))


def together(task: str | None, recipe: str, path: Path, *adapters: str) -> Tensor:
    """Writes what a recipe on the classifier trains; what it computes."""
    made = randomise(peftfx.run(program("bert"), recipe), 0.3)
    peftfx.save_peft(made, path, list(adapters), task=task)
    left = set(made.adapters) - set(adapters) if adapters else set[str]()
    alone = made.without(*left) if left else made
    return output(alone(**inputs("bert")))


@pytest.mark.parametrize("task", [None, "SEQ_CLS", "TOKEN_CLS"])
def test_a_head_that_trained_goes_into_the_same_directory(task: str | None, tmp_path: Path) -> None:
    import peft

    recipe = "lora{rank=3};train{where=head};train_tokens{ids=[3,9]}"
    want = together(task, recipe, tmp_path / "all")
    theirs = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path / "all")).eval()
    near(computed(theirs, "bert", ""), want)
    config = json.loads((tmp_path / "all" / CONFIG).read_text())
    assert config["modules_to_save"] == ["classifier"] and "bias" not in config
    read = peftfx.load_peft(program("bert"), tmp_path / "all")
    near(output(read(**inputs("bert"))), want)
    peftfx.save_peft(randomise(read, 0.3), tmp_path / "on")
    again = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path / "on")).eval()
    near(computed(again, "bert", ""), output(read(**inputs("bert"))))


def test_peft_finds_the_head_of_a_task_in_the_file(tmp_path: Path) -> None:
    """Without, it raises a KeyError for its weight."""
    import peft

    recipe = "lora{rank=3};train{where=head}"
    for names in (["lora"], ["train", "lora"]):
        want = together("SEQ_CLS", recipe, tmp_path / "a", *names)
        theirs = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path / "a")).eval()
        near(computed(theirs, "bert", ""), want)
    with pytest.raises(ArtifactError, match="nearest: train"):
        together(None, recipe, tmp_path / "b", "lora", "tran")
    with pytest.raises(ArtifactError, match="say which"):
        together(None, "lora{name=one};lora{name=two}", tmp_path / "c")


def test_what_trained_on_is_not_written_as_it_was(tmp_path: Path) -> None:
    """What has no form here has none there once its whole change trained; LoRA does."""
    write("shira", tmp_path / "shira")
    moved = randomise(peftfx.load_peft(program("llama"), tmp_path / "shira"))
    with pytest.raises(NoFormError, match=r"no type of PEFT holds change .*--to peftfx"):
        peftfx.save_peft(moved, tmp_path / "b")
    write("pissa", tmp_path / "pissa")
    moved = randomise(peftfx.load_peft(program("llama"), tmp_path / "pissa"))
    peftfx.save_peft(moved, tmp_path / "c")
    again = peftfx.load_peft(program("llama"), tmp_path / "c")
    near(output(again(**inputs("llama"))), output(moved(**inputs("llama"))))


def test_an_invocation_is_looked_for_in_every_call(tmp_path: Path) -> None:
    """Its last place counts; rows without one, and tokens before it, are the base's."""
    write("invocation", tmp_path / "a")
    before = program("llama")
    read = peftfx.load_peft(before, tmp_path / "a")
    first, second = IDS[0, 2:4].tolist()
    rows = [
        [5, first, second, 9, first, 8],
        [first, second, first, second, 7, 5],
        [second, first, 5, 5, 5, first],
        [9, 8, 7, 6, first, second],
    ]
    ids = torch.tensor(rows)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    moved = (output(read(**given)) != output(before(**given))).any(-1)
    want = [
        [False, *[True] * 5],
        [False, False, *[True] * 4],
        [False] * 6,
        [*[False] * 4, *[True] * 2],
    ]
    assert moved.tolist() == want
    short = {n: t[:, :1] for n, t in given.items()}
    assert torch.equal(output(read(**short)), output(before(**short)))
    folded = peftfx.run(read, "fold")
    assert len(folded.attachments) == len(read.attachments)
    assert "depends on the input" in str(folded.history[-1])
    with pytest.raises(ArtifactError, match="acts on some tokens alone"):
        peftfx.save_peft(read, tmp_path / "b", plain=True)
    peftfx.save_peft(randomise(read), tmp_path / "c")
    again = peftfx.load_peft(before, tmp_path / "c")
    near(output(again(**given)), output(read(**given)))


def test_biases_of_factors_are_written_where_the_layer_has_none(tmp_path: Path) -> None:
    import peft

    write("new biases", tmp_path / "a")
    moved = randomise(peftfx.load_peft(program("llama"), tmp_path / "a"))
    peftfx.save_peft(moved, tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "b")).eval()
    near(computed(theirs, "llama", ""), output(moved(**inputs("llama"))))


def test_experts_of_an_old_peft_mean_the_transpose(tmp_path: Path) -> None:
    write("experts", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    experts = 4
    for key in [k for k in tensors if "experts" in k and "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key].unflatten(0, (experts, -1)), tensors[other].unflatten(1, (-1, experts))
        tensors[key] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
        tensors[other] = a.permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    old = peftfx.load_peft(program("qwen3_moe"), tmp_path / "a")
    write("experts", tmp_path / "b")
    new = peftfx.load_peft(program("qwen3_moe"), tmp_path / "b")
    near(output(old(**inputs("qwen3_moe"))), output(new(**inputs("qwen3_moe"))))


def test_a_model_is_captured_with_its_own_example() -> None:
    with pytest.raises(ArtifactError, match="has no dummy_inputs"):
        peftfx.load_peft(torch.nn.Linear(2, 2), "nowhere")


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def _rename(old: str, new: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _drop(part: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.pop(next(k for k in tensors if part in k))

    return change


def _put(key: str, value: Any) -> Change:
    return lambda config, tensors: config.update({key: value})


def _nan(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _wide(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    key = next(k for k in tensors if "lora_A" in k)
    tensors[key] = torch.randn(4, 33)


BAD: dict[str, tuple[Change, type[RewriteError], str]] = {
    "another prefix": (_rename("base_model.model.", "module."), ArtifactError, "does not start with"),
    "no such module": (_rename("layers.1", "layers.7"), ArtifactError, r"layers\.7.*no such module"),
    "unknown leaf": (_rename("lora_A.weight", "lora_X.weight"), ArtifactError, "lora_A.weight is missing"),
    "unknown key": (_rename("q_proj.lora_A.weight", "q_proj.extra.weight"), ArtifactError, "is missing"),
    "no partner": (_drop("lora_B"), ArtifactError, "lora_B.weight is missing"),
    "rank": (_put("r", 5), ArtifactError, "the rank of .* is 5, but its tensors have 4"),
    "type": (_put("peft_type", "LORRA"), ArtifactError, "LORRA are not read. Nearest that are: LORA"),
    "no type": (_put("peft_type", None), ArtifactError, "no peft_type"),
    "new option": (_put("frobnicate", 3), ArtifactError, "frobnicate=3 of LORA is not understood"),
    "replicated layers": (_put("layer_replication", [[0, 2], [1, 2]]), BaseMismatchError,
                          r"layer_replication=\[\[0, 2\], \[1, 2\]\] makes a model of 3 layers.*"
                          "this model has 2 layers. Repeat them before the capture"),
    "invocation": (_put("alora_invocation_tokens", ["a"]), ArtifactError, "alora_invocation_tokens"),
    "no diagonal": (_put("kasa_config", {"beta": 0.1}), ArtifactError, "has no lora_diag"),
    "other base": (_put("init_lora_weights", "pissa_niter_4"), ArtifactError, "another base"),
    "wrong kind": (_put("lora_alpha", "16"), ArtifactError, "lora_alpha must be int or float"),
    "pattern": (_put("rank_pattern", {"(": 3}), ArtifactError, "no regular expression"),
    "not a number": (_nan, NonFiniteError, "NaN"),
    "shape": (_wide, BaseMismatchError, r"/a: the adapter has .*q_proj.weight, which does not fit this "
              "model. Use the base"),
    "replication": (_put("layer_replication", 3), ArtifactError, "layer_replication must be list"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(BAD))
def test_a_bad_adapter_is_refused(fault: str, tmp_path: Path) -> None:
    change, kind, text = BAD[fault]
    write("lora", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    change(config, tensors)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    before = program("llama")
    with pytest.raises(kind, match=text):
        peftfx.load_peft(before, tmp_path / "a")
    assert not before.adapters and not before.attachments


STARTS = {
    "pissa_niter_4": r"random vectors.*Convert it there", "corda": "calibration.*Convert it there",
    "lora_ga": "gradients.*Convert it there", "loftq": "quantised.*Merge it there",
}  # fmt: skip


def altered(case: str, folder: Path, **options: Any) -> Path:
    write(case, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | options))
    return folder


def test_other_bases_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for start, text in STARTS.items():
        folder = altered("lora", tmp_path / start, init_lora_weights=start)
        with pytest.raises(ArtifactError, match=f"'{start}' the adapter trained.*{text}"):
            peftfx.load_peft(program("llama"), folder)
    folder = altered("lora", tmp_path / "arrow", arrow_config={"top_k": 1})
    with pytest.raises(ArtifactError, match=r"arrow_config chooses among LoRAs.*one by one"):
        peftfx.load_peft(program("llama"), folder)


def test_every_type_of_peft_is_read_or_refused_by_name(tmp_path: Path) -> None:
    """And stands in the table that users look into."""
    import peft

    table = (Path(__file__).parents[2] / "docs" / "peft-types.md").read_text()
    types = table.partition("| options")[0].splitlines()
    rows = [line.split(" | ") for line in types if line.startswith("| `")]
    said = {name: kind for names, kind, *_ in rows for name in re.findall(r"`(\w+)`", names)}
    known = {t.value for t in peft.PeftType}
    assert said.keys() == known == READ.keys() | REFUSED.keys()
    assert {n for n, kind in said.items() if kind == "refused"} == REFUSED.keys()
    for number, (name, why) in enumerate(REFUSED.items()):
        folder = altered("lora", tmp_path / str(number), peft_type=name)
        with pytest.raises(ArtifactError, match=f"type {name} are not read: {re.escape(why)}"):
            peftfx.load_peft(program("llama"), folder)


def test_means_of_groups_are_read_as_what_all_columns_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QA-LoRA, which PEFT has beside GPTQ's layers alone: its own formula, beside a float one."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import QALoraLinearVariant

    folder = tmp_path / "a"
    with monkeypatch.context() as patched:
        patched.setattr(Linear, "resolve_lora_variant", lambda *_, **__: QALoraLinearVariant())
        want = write("pooled", folder)
    assert load_file(folder / WEIGHTS)[f"{QUERY}.lora_A.weight"].shape == (4, 8)
    read = peftfx.load_peft(program("llama"), folder)
    near(output(read(**inputs("llama"))), want)
    near(output(peftfx.run(read, "fold")(**inputs("llama"))), want)
    with pytest.raises(ArtifactError, match=r"use_qalora pools.*Give the base"):
        convert(folder, tmp_path / "b", "peft")
    wrong = altered("pooled", tmp_path / "c", qalora_group_size=3)
    (wrong / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(ArtifactError, match="in groups of qalora_group_size=3"):
        peftfx.load_peft(program("llama"), wrong)
    near(output(peftfx.load_peft(program("llama"), altered("pooled", tmp_path / "d"))
                (**inputs("llama"))), write("pooled", tmp_path / "d"))  # fmt: skip


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_truncated_file_is_refused(file: str, tmp_path: Path) -> None:
    write("lora", tmp_path / "a")
    path = tmp_path / "a" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=file):
        peftfx.load_peft(program("llama"), tmp_path / "a")


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        peftfx.load_peft(program("llama"), tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    made = peftfx.run(program("llama"), "lora")
    with pytest.raises(ArtifactError, match="holds other files"):
        peftfx.save_peft(made, tmp_path / "x")
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_what_has_no_form_there_is_refused(tmp_path: Path) -> None:
    made = peftfx.run(program("llama"), "lora{name=one};serial_adapter{bottleneck=4}")
    with pytest.raises(ArtifactError, match="no type of PEFT holds bottleneck"):
        peftfx.save_peft(made, tmp_path / "a", "serial_adapter")
    gated = peftfx.run(program("llama"), "diff_pruning{where=q}")
    with pytest.raises(ArtifactError, match=r"GatedDelta at .*: no other library has a form"):
        peftfx.save_peft(gated, tmp_path / "a")
    with pytest.raises(ArtifactError, match="say which"):
        peftfx.save_peft(made, tmp_path / "a")
    with pytest.raises(ArtifactError, match="nearest: one"):
        peftfx.save_peft(made, tmp_path / "a", "ones")


@pytest.mark.parametrize("case", ["prefix of t5", "prefix of bart"])
def test_prefixes_of_decoders_train_on(case: str, tmp_path: Path) -> None:
    """PEFT's two layers share one pair of rows; trained here, each has its own, which PEFT loads."""
    import peft

    name, _ = CASES[case]
    write(case, tmp_path / "a")
    before = program(name)
    moved = randomise(peftfx.load_peft(before, tmp_path / "a"), 0.3)
    got = output(moved(**inputs(name)))
    peftfx.save_peft(moved, tmp_path / "b", task="SEQ_2_SEQ_LM")
    theirs = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "b")).eval()
    near(computed(theirs, name, case), got)
    again = peftfx.load_peft(before, tmp_path / "b")
    near(output(again(**inputs(name))), got)
    longer = {n: torch.cat([t, t], 1) for n, t in inputs(name).items()}
    with torch.no_grad():
        near(output(moved(**longer)), output(theirs(**longer)))
    without = moved.without(*moved.adapters)
    assert torch.equal(output(without(**inputs(name))), output(before(**inputs(name))))
    assert all(c.holds for c in again.verify())


def test_a_prefix_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write("prefix of t5", tmp_path / "a")
    with pytest.raises(
        BaseMismatchError, match=r"/a: .*of a decoder beside an encoder, and this model has 2"
    ):
        peftfx.load_peft(program("llama"), tmp_path / "a")
    write("prefix", tmp_path / "b")
    with pytest.raises(
        BaseMismatchError, match=r"/b: .*of one stack of layers, and this model has"
    ):
        peftfx.load_peft(program("t5 of 2"), tmp_path / "b")
    with pytest.raises(ArtifactError, match="is of 2 layers, and this model's decoder has 3"):
        peftfx.load_peft(program("bart"), tmp_path / "a")


def test_replicated_layers_of_a_model_that_has_them(tmp_path: Path) -> None:
    """The same layers once more, each with an adapter of its own; and as the refusal says."""
    import peft
    from peft.tuners.tuners_utils import replicate_layers

    repeated = [[0, 2], [1, 2]]
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    config = peft.LoraConfig(layer_replication=repeated, **options)  # pyright: ignore
    theirs: Any = peft.get_peft_model(copy.deepcopy(base("llama")), config)
    theirs = randomised(theirs)
    theirs.eval().save_pretrained(str(tmp_path / "a"))
    want = computed(theirs, "llama", "lora")
    model = copy.deepcopy(base("llama"))
    layers = [copy.deepcopy(model.model.layers[i]) for a, b in repeated for i in range(a, b)]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = 3
    deeper = peftfx.capture(model, kwargs=inputs("llama"))
    near(output(peftfx.load_peft(deeper, tmp_path / "a")(**inputs("llama"))), want)
    tied = copy.deepcopy(base("llama"))
    replicate_layers(tied, repeated)  # pyright: ignore
    with pytest.raises(BaseMismatchError, match=r"shares weights of its layers.*copy.deepcopy"):
        peftfx.load_peft(peftfx.capture(tied, kwargs=inputs("llama")), tmp_path / "a")


def randomised(model: Any) -> Any:
    """With noise on all that trains."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
