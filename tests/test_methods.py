"""The methods: against independent references and Hugging Face PEFT, and the tests that every
registered method gets for free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.running.passes import REGISTRY, Method
from peftfx.rewriter.sites.sites import AttentionSite

from .models import batch, bert, first, llama, moved, randomise
from .reference import eager

METHODS = sorted(name for name, cls in REGISTRY.items() if issubclass(cls, Method))
SMALL = {
    "lora": "lora{rank=4,where=linear and not head}", "serial_adapter": "serial_adapter{bottleneck=6}",
    "prefix_tuning": "prefix_tuning{length=5}", "prompt_tuning": "prompt_tuning{length=4}",
}  # fmt: skip
BASES = ("encoder", "decoder", "bert", "llama")


def text_of(method: str) -> str:
    return SMALL.get(method, method)


def tensors(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """Branch tensors by module name: {"layers.0.query": {"a": ..., "b": ...}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for attachment in program.attachments:
        module = program.branch(attachment)
        site = attachment.site.removesuffix(".weight")
        found[site] = {n: p.detach() for n, p in module.named_parameters()}
    return found


@pytest.fixture(params=["encoder", "decoder"])
def hand(request: Any, captured: Any) -> tuple[str, Any, peftfx.Program]:
    model, program = captured[request.param]
    return request.param, model, program


def check(program: peftfx.Program, base: peftfx.Program, want: Any, inputs: Any) -> None:
    got = first(program(**inputs))
    torch.testing.assert_close(got, first(want), rtol=1e-5, atol=1e-5)
    assert moved(first(base(**inputs)), got) > 0.01


def test_lora_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "lora{rank=4,alpha=6,where=linear}"))
    inputs = batch(4, 11, pad=3)
    check(program, base, eager.lora(model, tensors(program), inputs, 1.5), inputs)


def test_ia3_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "ia3"), 0.3)
    inputs = batch(4, 11, pad=3)
    check(program, base, eager.ia3(model, tensors(program), inputs), inputs)


def test_serial_adapter_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "serial_adapter{bottleneck=6,norms=false}"))
    last = {"encoder": ("dense", "fc2"), "decoder": ("o_proj", "down")}[name]
    by_module = {
        f"layers.{site[8]}.{last[site.endswith('ffn')]}": t for site, t in tensors(program).items()
    }
    inputs = batch(4, 11, pad=3)
    check(program, base, eager.serial_adapter(model, by_module, inputs), inputs)


def test_prefix_tuning_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "prefix_tuning{length=5}"), 0.5)
    rows = [(t["key"], t["value"]) for t in tensors(program).values()]
    inputs = batch(4, 11, pad=3)
    check(program, base, eager.prefix_tuning(model, rows, inputs), inputs)


def test_projected_prefix_is_the_mlp_of_its_embedding(captured: Any) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, "prefix_tuning{length=5,projection=7}"), 0.3)
    rows: list[tuple[Tensor, Tensor]] = []
    for t in tensors(program).values():
        inner = torch.tanh(t["embedding"] @ t["inner.weight"].T + t["inner.bias"])
        both = (inner @ t["outer.weight"].T + t["outer.bias"]).view(5, 2, 2, 8)
        rows.append((both[:, 0], both[:, 1]))
    inputs = batch(4, 11)
    check(program, base, eager.prefix_tuning(model, rows, inputs), inputs)


def test_prompt_tuning_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "prompt_tuning{length=4}"), 0.5)
    (held,) = tensors(program).values()
    embedding = {"encoder": "words", "decoder": "embed"}[name]
    inputs = batch(4, 11, pad=3)
    want = eager.prompt_tuning(model, embedding, held["prompt"], inputs)
    check(program, base, want, inputs)
    if name == "encoder":  # the pooler reads the first real token, not the prompt
        hidden, pooled = program(**inputs)
        torch.testing.assert_close(pooled, torch.tanh(model.pooler(hidden[:, 0])))


def test_bitfit_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "bitfit"))
    biases = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    inputs = batch(4, 11, pad=3)
    check(program, base, eager.bitfit(model, biases, inputs), inputs)
    if name == "encoder":
        program.export_state_dict()
    else:
        with pytest.raises(peftfx.RewriteError, match=r"layers.0.q_proj.bias"):
            program.export_state_dict()
        assert "layers.0.q_proj.bias" in program.export_state_dict(strict=False)


def test_fused_weights_take_lora_and_ia3_by_role(captured: Any) -> None:
    model, base = captured["fused"]
    program = randomise(peftfx.run(base, "lora{rank=4,where=v}"))
    inputs = {"input_ids": batch(4, 11)["input_ids"]}
    full = {}
    for site, t in tensors(program).items():
        b = torch.cat([torch.zeros(64, 4), t["b"]])
        full[site.removesuffix(".weight:v")] = {"a": t["a"], "b": b}
    want = eager.lora(model, full, inputs, 4.0)
    got = first(program(**inputs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    scaled = randomise(peftfx.run(base, "ia3"), 0.3)
    folded = peftfx.run(scaled, "fold")
    torch.testing.assert_close(first(folded(**inputs)), first(scaled(**inputs)))
    prefixed = peftfx.run(base, "prefix_tuning{length=3}")
    assert moved(first(base(**inputs)), first(prefixed(**inputs))) > 0


# What every method gets for free.


@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_declared_effect_and_trainable_set(captured: Any, method: str, base_name: str) -> None:
    _, base = captured[base_name]
    program = peftfx.run(base, text_of(method))
    kind = REGISTRY[method].contract.kind
    change = moved(first(base(**batch())), first(program(**batch())))
    assert {"identity": change == 0, "near": change < 0.1, "trainable": change > 0}[kind]
    assert program.adapters == (method,)
    assert program.history[-1].edited
    assert all(c.holds for c in program.verify())


@pytest.mark.parametrize("base_name", ["encoder", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_training_touches_only_what_trains(captured: Any, method: str, base_name: str) -> None:
    _, base = captured[base_name]
    program = peftfx.run(base, text_of(method)).train()
    trained = program.named_trainable_parameters()
    before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        loss = first(program(**batch(seed=step))).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {n for n, p in program.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= set(trained)
    assert len(changed) >= 0.6 * len(trained)
    owner = dict(base.module.named_parameters())
    assert all(torch.equal(owner[n], before[n]) for n in owner if n not in trained)


@pytest.mark.parametrize("base_name", ["encoder", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_save_load_replay_and_removal(
    captured: Any, method: str, base_name: str, tmp_path: Path
) -> None:
    model, base = captured[base_name]
    program = randomise(peftfx.run(base, text_of(method)))
    want = first(program(**batch()))
    assert moved(first(base(**batch())), want) > 0.01
    peftfx.save(program, tmp_path / "a")
    for target in (model, base):
        loaded = peftfx.load(target, tmp_path / "a")
        assert torch.equal(first(loaded(**batch())), want)
        assert loaded.text() == program.text()
    assert torch.equal(first(program.only((method,))(**batch())), want)
    bare = program.without(method)
    assert torch.equal(first(bare(**batch())), first(model(**batch())))


@pytest.mark.parametrize("base_name", ["encoder", "decoder", "bert", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_and_sizes_do_not_matter(captured: Any, method: str, base_name: str) -> None:
    _, base = captured[base_name]
    program = randomise(peftfx.run(base, text_of(method)))
    both = batch(2, 11, pad=6)
    together = first(program(**both))
    for row, length in ((0, 5), (1, 11)):
        alone = {n: t[row : row + 1, :length] for n, t in both.items()}
        got = first(program(**alone))
        torch.testing.assert_close(together[row : row + 1, :length], got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_methods_compile_without_breaks(captured: Any, method: str) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, text_of(method)))
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    got = first(compiled(**batch()))
    torch.testing.assert_close(got, first(program(**batch())))
    got.sum().backward()


# Hugging Face PEFT with the same weights.


def copied(program: peftfx.Program, model: Any, pairs: dict[str, str]) -> None:
    """Copies our branch tensors into PEFT's parameters: our suffix -> theirs."""
    theirs = dict(model.named_parameters())
    count = 0
    with torch.no_grad():
        for name, parameter in program.named_trainable_parameters().items():
            _, _, rest = name.split(".", 2)
            path, _, leaf = rest.rpartition(".")
            path = path.rpartition(".")[0]
            target = f"base_model.model.{path}.{pairs[leaf]}"
            theirs[target].copy_(parameter.view(theirs[target].shape))
            count += 1
    assert count


@pytest.mark.parametrize("make", [bert, llama])
def test_lora_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "lora{rank=4,alpha=8,where=q|v}"))
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {"a": "lora_A.default.weight", "b": "lora_B.default.weight"})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_ia3_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "ia3"), 3.0)
    target: Any = ["k_proj", "v_proj", "down_proj"]
    down: Any = ["down_proj"]
    if make is bert:
        down = r".*layer\.\d+\.output\.dense"
        target = rf".*\.(key|value)|{down}"
    config = peft.IA3Config(target_modules=target, feedforward_modules=down)
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {"l": "ia3_l.default"})
    inputs = batch(4, 11, pad=2)
    torch.testing.assert_close(first(program(**inputs)), first(other(**inputs)))
    assert moved(first(base(**inputs)), first(program(**inputs))) > (
        0.001 if make is bert else 0.01
    )


@pytest.mark.parametrize("make", [bert, llama])
def test_prefix_tuning_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "prefix_tuning{length=5,shift_positions=true}"), 0.5)
    task: Any = "FEATURE_EXTRACTION" if make is bert else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5)
    other = peft.get_peft_model(model, config).eval()
    flat: list[Tensor] = []
    for t in tensors(program).values():
        flat += [t["key"].reshape(5, -1), t["value"].reshape(5, -1)]
    table = next(p for n, p in other.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        table.copy_(torch.cat(flat, 1))
    inputs = batch(4, 11)
    check(program, base, other(**inputs), inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_prompt_tuning_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "prompt_tuning{length=5}"), 0.5)
    task: Any = "FEATURE_EXTRACTION" if make is bert else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5)
    other = peft.get_peft_model(model, config).eval()
    (held,) = tensors(program).values()
    table = next(p for n, p in other.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        table.copy_(held["prompt"])
    inputs = batch(4, 11, pad=2)
    want = first(other(**inputs))[:, 5:]
    check(program, base, want, inputs)


def test_trainable_counts(captured: Any) -> None:
    _, base = captured["llama"]
    core = next(s for s in base.sites if isinstance(s, AttentionSite))
    d, kv, f, layers = 32, core.kv_heads * core.head_dim, 64, 2
    want = {
        "lora{rank=4}": layers * (4 * (d + d) + 4 * (d + kv)),
        "ia3": layers * (2 * kv + f),
        "serial_adapter{bottleneck=6,norms=false}": layers * 2 * (2 * d * 6 + 6 + d),
        "prefix_tuning{length=5}": layers * 2 * 5 * kv,
        "prompt_tuning{length=5}": 5 * d,
    }
    for text, count in want.items():
        program = peftfx.run(base, text)
        assert sum(p.numel() for p in program.trainable_parameters()) == count, text
