"""PEFT's words and configurations: what they adapt and train here is what PEFT does with them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

import peftfx
from peftfx.rewriter.errors import OptionError, PassError, SelectorError

from ..models import VOCABULARY, batch, llama


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return llama().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base(model: Any) -> peftfx.Program:
    return peftfx.capture(model, kwargs=batch())


def theirs(config: Any, model: Any) -> tuple[set[str], int]:
    """Names of the modules with an adapter, and how many numbers train, by PEFT itself."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(llama().eval().requires_grad_(False), config)
    del model
    named = [n for n, p in adapted.named_parameters() if p.requires_grad]
    ends = (
        ".lora_A.", ".lora_magnitude_vector.", ".ia3_l.", ".hada_w1_a.", ".lokr_w1.", ".lokr_w1_b.",
        ".oft_R.", ".boft_R.",
    )  # fmt: skip
    modules = {n.split(e)[0] for n in named for e in ends if e in n}
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {n.removeprefix("base_model.model.") for n in modules}, count


def ours(recipe: Any, base: peftfx.Program) -> tuple[set[str], int]:
    program = peftfx.run(base, recipe)
    modules = {program.sites[a.site].module for a in program.attachments}
    return modules, sum(p.numel() for p in program.trainable_parameters())


CONFIGS: dict[str, Any] = {
    "names": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "default places": peft.LoraConfig(r=4),
    "all": peft.LoraConfig(r=4, target_modules="all-linear"),
    "pattern": peft.LoraConfig(r=4, target_modules=r".*layers\.1\..*(q|up)_proj"),
    "ends": peft.LoraConfig(r=4, target_modules=["self_attn.q_proj", "model.layers.0.mlp.up_proj"]),
    "layers": peft.LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=[1]),
    "one layer": peft.LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=0),
    "excluded": peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["o_proj"]),
    "ranks": peft.LoraConfig(
        r=4, target_modules="all-linear", rank_pattern={"q_proj": 2, r".*1\.mlp\.up_proj": 3, "up_proj": 5},
    ),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "saved": peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"]),
    "lokr": peft.LoKrConfig(
        r=2, alpha=5, target_modules=["q_proj", "down_proj"], decompose_both=True,
        init_weights="lycoris",
    ),
    "oft": peft.OFTConfig(oft_block_size=6, target_modules=["q_proj", "down_proj"]),
    "exact oft": peft.OFTConfig(
        r=2, oft_block_size=0, use_cayley_neumann=False, coft=True, block_share=True,
        target_modules=["q_proj"],
    ),
    "boft": peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_trains_what_it_does_in_peft(
    model: Any, base: peftfx.Program, case: str
) -> None:
    pipeline = peftfx.from_peft_config(CONFIGS[case])
    modules, count = ours(str(pipeline), base)
    inside = set[str]() if case in ("prompt", "prefix") else modules
    assert (inside, count) == theirs(CONFIGS[case], model)
    assert str(peftfx.parse(str(pipeline))) == str(pipeline)


def test_numbers_are_the_same(model: Any, base: peftfx.Program) -> None:
    """Rank stabilised, with dropout: scales, rates and the start of B."""
    config = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.25, use_rslora=True, target_modules=["q_proj"],
        init_lora_weights="gaussian",
    )  # fmt: skip
    adapted: Any = peft.get_peft_model(llama().eval(), config)
    want = adapted.base_model.model.model.layers[0].self_attn.q_proj
    program = peftfx.run(base, peftfx.from_peft_config(config, name="mine"))
    branch: Any = program.branch(program.attachments[0])
    assert branch.scale == want.scaling["default"] == 6.0 and branch.dropout == 0.25
    assert not branch.b.any() and 0.05 < float(branch.a.detach().std()) < 0.5
    assert program.adapters == ("mine",)


def test_the_contents_of_a_file(base: peftfx.Program, tmp_path: Any) -> None:
    config = CONFIGS["names"].to_dict()
    assert str(peftfx.from_peft_config(config)) == str(peftfx.from_peft_config(CONFIGS["names"]))


def test_tokens_and_heads_are_passes_of_their_own() -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["query"], trainable_token_indices=[7, 9], task_type="SEQ_CLS"
    )
    text = str(peftfx.from_peft_config(config, name="a"))
    assert text.endswith(";train{where=head,name=a_train};train_tokens{ids=[7,9],name=a_tokens}")
    config.trainable_token_indices = {"embed": [1], "shared.table": [2]}
    text = str(peftfx.from_peft_config(config))
    assert "train_tokens{ids=[1],where=name:embed,name=tokens_embed}" in text
    assert "train_tokens{ids=[2],where=name:shared.table,name=tokens_shared_table}" in text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("lora{r=2,lora_alpha=4,target_modules=[q_proj]}", "lora{rank=2,alpha=4,where=name:q_proj}"),
        ("lora{layers_to_transform=[0,1]}", "lora{where=(q|v) and (layer in [0,1])}"),
        ("lora{init_lora_weights=pissa,fan_in_fan_out=false}", "lora{init=pissa}"),
        ("lora{bias=none,rank_pattern={},use_dora=false}", "lora"),
        ("lora{r=4,rank_pattern={q_proj=3,layers.0.v_proj=2},alpha_pattern={v_proj=5}}",
         "lora{rank={name:q_proj=3,name:layers.0.v_proj=2,default=4},"
         "alpha={name:v_proj=5,default=16}}"),
        ("dora{rank_pattern={'.*[qv]_proj'=3},r=2}",
         r"dora{rank={'re:\'^(.*\\.)?(.*[qv]_proj)$\''=3,default=2}}"),
        ("dora{use_dora=true}", "dora"),
        ("adalora{init_r=6,target_r=3,tinit=5,tfinal=9,deltaT=2,total_step=40}",
         "adalora{rank=6,target=3,warmup=5,final=9,interval=2}"),
        ("prefix_tuning{num_virtual_tokens=3,prefix_projection=false}", "prefix_tuning{length=3}"),
        ("prompt_tuning{prompt_tuning_init=SAMPLE_VOCAB}", f"prompt_tuning{{common={2**31}}}"),
        ("train_tokens{token_indices=[3]}", "train_tokens{ids=[3]}"),
        ("serial_adapter{non_linearity=relu}", "serial_adapter{activation=relu}"),
    ],
)  # fmt: skip
def test_words_of_the_same_meaning(text: str, same: str) -> None:
    (mine,), (own,) = peftfx.parse(text), peftfx.parse(same)
    assert mine == own and "r=" not in str(mine).replace("where=", "").split("{")[0]


def test_words_in_python(base: peftfx.Program) -> None:
    """Constructors and `run` take them, too; text, Python and PEFT's configuration are one recipe."""
    words: Any = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    mine = peftfx.LoRA(**words)
    assert mine == peftfx.LoRA(rank=2, alpha=4.0, where="name:q_proj") and type(mine.alpha) is float
    assert replace(mine, where="v") == peftfx.LoRA(r=2, lora_alpha=4, where="v")  # type: ignore
    direct = peftfx.run(base, [peft.LoraConfig(**words), "ia3{where=k}"])
    assert [r.applied for r in direct.history] == [mine, peftfx.IA3(where="k")]
    for wrong, said in (
        (lambda: peftfx.LoRA(rnk=3), "no option 'rnk'. Nearest: rank, r"),  # type: ignore
        (lambda: peftfx.IA3(rank_pattern={"q": 2}), "a pass for each rank"),  # type: ignore
        (lambda: peftfx.LoRA(rank_pattern=3), "a map from names to values"),  # type: ignore
        (lambda: peftfx.LoRA(8), "takes its options by name"),  # type: ignore
        (lambda: peftfx.run(base, 3), "a configuration .of peft., not int"),  # type: ignore
    ):
        with pytest.raises(OptionError, match=said):
            wrong()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora{modules_to_save=[score]}", r"train\{where=head\}"),
        ("lora{use_dora=true}", r"dora\{\.\.\.\} in place of lora"),
        ("lora{bias=all}", r"bitfit\{add=false"),
        ("ia3{rank_pattern={q_proj=3}}", "a pass for each rank"),
        ("lora{rank={q=3},rank_pattern={q_proj=3}}", "rank and rank_pattern say the same"),
        ("lora{r=2,rank=2}", "r and rank say the same"),
        ("lora{where=q,target_modules=[q_proj]}", "where and target_modules say the same"),
        ("lora{target_modules=[]}", "selects nothing"),
        ("lora{layers_to_transform=[one]}", "a number or a list"),
        ("lora{init_lora_weights=false}", "change the model before it trains"),
        ("adalora{r=3}", "no option 'r'. Nearest: rank"),
        ("prefix_tuning{prefix_projection=true}", "projection=WIDTH"),
        ("prompt_tuning{prompt_tuning_init=TEXT}", "init=vocabulary"),
        ("serial_adapter{reduction_factor=16}", "inner width itself"),
        ("lora{lora_alhpa=3}", "Nearest: lora_alpha"),
    ],
)
def test_words_of_another_meaning_are_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        peftfx.parse(text)


def test_configurations_that_have_no_recipe(base: peftfx.Program) -> None:
    with pytest.raises(OptionError, match=r"no method here for PEFT's type FOURIERFT.*load_peft"):
        peftfx.from_peft_config(peft.FourierFTConfig())
    with pytest.raises(OptionError, match=r"layer_replication=.* has no word here"):
        peftfx.from_peft_config(peft.LoraConfig(layer_replication=[(0, 2)]))
    with pytest.raises(OptionError, match="one of PEFT's, or a dict, not str"):
        peftfx.from_peft_config("adapter")
    with pytest.raises(SelectorError, match="'name:nowhere'"):  # PEFT passes over unknown names
        peftfx.run(base, peftfx.from_peft_config(peft.LoraConfig(target_modules=["nowhere"])))


def test_names_take_embeddings_too(base: peftfx.Program) -> None:
    program = peftfx.run(base, "lora{r=2,target_modules=[q_proj,embed_tokens]}")
    kinds = {program.sites[a.site].kind for a in program.attachments}
    assert kinds == {"linear", "embedding"} and not program.history[-1].skipped
    assert program.sites["model.embed_tokens.weight"].size == VOCABULARY  # pyright: ignore


def test_two_of_one_name_need_another(base: peftfx.Program, tmp_path: Any) -> None:
    peftfx.save_peft(peftfx.run(base, "lora{r=2}"), tmp_path / "a")
    once = peftfx.load_peft(base, tmp_path / "a")
    with pytest.raises(PassError, match=r"'a' already.*name='a_2'"):
        peftfx.load_peft(once, tmp_path / "a")
    assert peftfx.load_peft(once, tmp_path / "a", name="a_2").adapters == ("a", "a_2")
