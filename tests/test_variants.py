"""The same promises on every spelling of attention, mask and input that models come in."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError, MetaTensorError, RewriteError
from peftfx.rewriter.sites import LinearSite, SublayerSite

from . import variants
from .models import VOCABULARY, Encoder, batch, build, first, moved, randomise
from .variants import CASES, Variant

ROLES = ("q", "k", "v", "o", "ffn.up", "ffn.down")


@functools.cache
def captured(name: str) -> tuple[Variant, peftfx.Program]:
    model = variants.make(name)
    return model, peftfx.capture(model, kwargs=variants.inputs(name))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert moved(want, got) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_capture_is_bit_equal_in_both_modes(name: str) -> None:
    model, base = captured(name)
    for size in ((3, 9), (1, 7), (5, 14), (2, 1)):
        feed = variants.inputs(name, *size)
        want, got = model(**feed), base(**feed)
        assert list(want) == list(got)
        assert all(torch.equal(want[key], got[key]) for key in want)
    feed = variants.inputs(name, 4, 11)
    trained = base.fork().train()
    torch.manual_seed(1)
    want = model.train()(**feed)["logits"]
    model.eval()
    torch.manual_seed(1)
    assert torch.equal(trained(**feed)["logits"], want)


@pytest.mark.parametrize("name", CASES)
def test_roles_and_sublayers(name: str) -> None:
    _, base = captured(name)
    layers = (0,) if name == "shared block" else (0, 1)
    found = {(s.role, s.layer) for s in base.sites if isinstance(s, LinearSite)}
    assert found == {(r, n) for r in ROLES for n in layers} | {("head", None)}
    subs = [(s.layer, s.role) for s in base.sites if isinstance(s, SublayerSite)]
    assert sorted(subs, key=str) == [(0, "attn"), (0, "ffn"), (1, "attn"), (1, "ffn")]


@pytest.mark.parametrize("name", [n for n in CASES if n != "shared block"])
def test_prefix_equals_attention_written_out(name: str) -> None:
    model, base = captured(name)
    program = randomise(peftfx.run(base, "prefix_tuning{length=3}"), 0.5)
    branches: list[Any] = [program.branch(a) for a in program.attachments]
    rows = [(b.key.detach(), b.value.detach()) for b in branches]
    feed = variants.inputs(name, 4, 11, pad=3)
    got = program(**feed)["logits"]
    with variants.explicit(model, rows):
        want = model(**feed)["logits"]
    close(got, want)
    assert moved(base(**feed)["logits"], got) > 0.01


@pytest.mark.parametrize("name", [n for n in CASES if n != "shared block"])
def test_adapter_reads_the_sublayer_before_the_residual(name: str) -> None:
    model, base = captured(name)
    program = randomise(peftfx.run(base, "serial_adapter{bottleneck=5,norms=false}"), 0.3)
    handles: list[Any] = []
    for attachment in program.attachments:
        site, branch = program.sites[attachment.site], program.branch(attachment)
        t = {n: p.detach() for n, p in branch.named_parameters()}
        block: Any = model.blocks[site.layer or 0]

        def adapt(_m: Any, _i: Any, h: Tensor, t: dict[str, Tensor] = t) -> Tensor:
            return h + F.gelu(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

        module = block.attention if site.role == "attn" else block.down
        handles.append(module.register_forward_hook(adapt))
    assert len(handles) == 4
    feed = variants.inputs(name, 4, 11)
    try:
        want = model(**feed)["logits"]
    finally:
        for handle in handles:
            handle.remove()
    close(program(**feed)["logits"], want)


@pytest.mark.parametrize("name", CASES)
def test_four_methods_together_pad_and_fold(name: str) -> None:
    _, base = captured(name)
    text = "lora{where=linear and not head};ia3;prefix_tuning{length=3};prompt_tuning{length=4}"
    program = randomise(peftfx.run(base, text), 0.3)
    feed = variants.inputs(name, 4, 11)
    want = program(**feed)["logits"]
    assert moved(base(**feed)["logits"], want) > 0.01
    folded = peftfx.run(program, "fold")
    close(folded(**feed)["logits"], want, 1e-4)
    assert {a.slot for a in folded.attachments} == {"tokens", "key_value"}
    if name in ("fused", "grouped"):
        assert all(c.holds for c in folded.verify())
    if variants.masked(name):
        both = variants.inputs(name, 2, 11, pad=6)
        together = program(**both)["logits"]
        for row, length in ((0, 5), (1, 11)):
            alone = {n: t[row : row + 1, :length] for n, t in both.items()}
            close(program(**alone)["logits"], together[row : row + 1, :length], 1e-4)


# Inputs and outputs beyond ids and mask.


def with_positions(rows: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    positions = torch.arange(tokens).expand(rows, -1).contiguous()
    return {**batch(rows, tokens), "position_ids": positions}


def test_given_positions_move_behind_prompt_and_prefix() -> None:
    model = variants.make("fused")
    base = peftfx.capture(model, kwargs=with_positions())
    roles = {s.id: s.role for s in base.sites if s.kind == "embedding"}
    assert roles == {"words.weight": "token", "places.weight": "position"}
    feed = with_positions(4, 8)
    prompted = randomise(peftfx.run(base, "prompt_tuning{length=3}"), 0.5)
    (prompt,) = (p.detach() for p in prompted.trainable_parameters())
    longer = {n: F.pad(t, (3, 0), value=1) for n, t in feed.items()}
    longer["position_ids"] = torch.arange(11).expand(4, -1)
    handle = model.words.register_forward_hook(
        lambda _m, _i, o: torch.cat([prompt.expand(4, -1, -1), o[:, 3:]], 1)
    )
    want = model(**longer)["logits"][:, 3:]
    handle.remove()
    close(prompted(**feed)["logits"], want)
    shifted = randomise(peftfx.run(base, "prefix_tuning{length=3,shift_positions=true}"), 0.5)
    branches: list[Any] = [shifted.branch(a) for a in shifted.attachments]
    with variants.explicit(model, [(b.key.detach(), b.value.detach()) for b in branches]):
        want = model(**{**feed, "position_ids": feed["position_ids"] + 3})["logits"]
    close(shifted(**feed)["logits"], want)


def test_learnt_positions_limit_the_sequence(captured: Any) -> None:
    _, fused = captured["fused"]
    ids = torch.ones(2, 41, dtype=torch.long)
    with pytest.raises(InputError, match=r"41 is outside .*40"):
        fused(input_ids=ids)
    prompted = peftfx.run(fused, "prompt_tuning{length=4}")
    assert prompted(input_ids=ids[:, :36]).shape == (2, 36, VOCABULARY)
    with pytest.raises(InputError, match=r"37 is outside .*36"):
        prompted(input_ids=ids[:, :37])


def labelled(rows: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    made = batch(rows, tokens)
    return {**made, "labels": made["input_ids"].clone()}


@pytest.mark.parametrize("name", ["variant", "llama"])
def test_the_loss_ignores_the_prompt(name: str) -> None:
    model = variants.make("causal mask") if name == "variant" else build("llama")
    base = peftfx.capture(model, kwargs=labelled())
    feed = labelled(4, 8)
    assert torch.equal(base(**feed)["loss"], model(**feed)["loss"])
    program = randomise(peftfx.run(base, "prompt_tuning{length=3}"), 0.5)
    output = program(**feed)
    unlabelled = peftfx.capture(model, kwargs=batch())
    same = peftfx.run(unlabelled, "prompt_tuning{length=3}")
    with torch.no_grad():
        same.trainable_parameters()[0].copy_(program.trainable_parameters()[0])
    logits = same(**batch(4, 8))["logits"]
    close(output["logits"], logits)
    # Every real label counts, the first one, too: the last prompt token predicts it.
    rest = F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), feed["labels"][:, 1:].reshape(-1), reduction="sum"
    )
    counted = 4 * 8
    first_label = float(output["loss"]) * counted - float(rest)
    assert first_label > 0
    assert abs(first_label / 4 - 4.2) < 3  # about ln(64) each


def test_labels_of_another_length_are_named() -> None:
    base = peftfx.capture(variants.make("causal mask"), kwargs=labelled())
    wrong = {**labelled(4, 8), "labels": torch.ones(4, 7, dtype=torch.long)}
    with pytest.raises(InputError, match="labels"):
        base(**wrong)


def test_every_token_output_is_stripped() -> None:
    model = build("bert")
    base = peftfx.capture(model, kwargs={**batch(), "output_hidden_states": True})
    want = model(**batch(2, 5), output_hidden_states=True)
    got = base(**batch(2, 5))
    pairs = zip(want.hidden_states, got.hidden_states, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    prompted = peftfx.run(base, "prompt_tuning{length=3}")
    shapes = {tuple(h.shape) for h in prompted(**batch(2, 5)).hidden_states}
    assert shapes == {(2, 5, 32)}
    with pytest.raises(InputError, match="captured as the constant True"):
        base(**batch(2, 5), output_hidden_states=False)


def test_attention_maps_as_outputs() -> None:
    model: Any = build("bert")
    model.set_attn_implementation("eager")
    base = peftfx.capture(model, kwargs={**batch(), "output_attentions": True})
    want = model(**batch(2, 5), output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(want, base(**batch(2, 5)).attentions, strict=True))
    prompted = peftfx.run(base, "prompt_tuning{length=3}")
    assert prompted(**batch(2, 5)).attentions[0].shape == (2, 4, 5, 5)
    with pytest.raises(RewriteError, match="output"):
        peftfx.run(base, "prefix_tuning{length=3}")


def test_equal_table_sizes_do_not_confuse_roles() -> None:
    model = build("bert")  # 64 words, 64 positions
    base = peftfx.capture(model, kwargs=with_positions())
    roles = [s.role for s in base.sites if s.kind == "embedding"]
    assert sorted(roles) == ["position", "token", "type"]
    assert peftfx.run(base, "prompt_tuning{length=3}")(**with_positions(2, 5))


# Dtypes, devices, random state, names.


def test_bfloat16_programs_stay_in_bfloat16() -> None:
    model = build("llama").to(torch.bfloat16)
    base = peftfx.capture(model, kwargs=batch())
    assert torch.equal(first(model(**batch())), first(base(**batch())))
    text = "lora;ia3;prefix_tuning{length=3};prompt_tuning{length=2};serial_adapter{bottleneck=3}"
    program = randomise(peftfx.run(base, f"{text};bitfit"), 0.05).train()
    output = first(program(**batch()))
    assert output.dtype == torch.bfloat16
    assert {p.dtype for p in program.trainable_parameters()} == {torch.bfloat16}
    output.float().sum().backward()


def test_float64_folds_to_rounding() -> None:
    base = peftfx.capture(build("encoder").double(), kwargs=batch())
    program = randomise(peftfx.run(base, "lora{where=linear};ia3"), 0.3)
    close(first(peftfx.run(program, "fold")(**batch())), first(program(**batch())), 1e-12)


def test_autocast_around_a_program(captured: Any) -> None:
    model, base = captured["encoder"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first(model(**batch())), first(base(**batch())))
        program = peftfx.run(base, "lora;ia3;prefix_tuning;prompt_tuning;serial_adapter")
        first(program(**batch())).float().sum().backward()
    assert all(p.grad is not None for p in program.trainable_parameters())


def test_meta_programs_are_planned_and_not_measured() -> None:
    with torch.device("meta"):
        model = Encoder()
    feed = {n: t.to("meta") for n, t in batch().items()}
    base = peftfx.capture(model, kwargs=feed)
    program = peftfx.run(base, "lora;ia3;serial_adapter;prefix_tuning;prompt_tuning;bitfit")
    assert {str(r.certificate) for r in program.history} == {"unmeasured"}
    with pytest.raises(MetaTensorError, match="meta"):
        peftfx.run(peftfx.run(base, "lora"), "fold")


@pytest.mark.parametrize(
    "text",
    ["lora{dropout=0.1}", "ia3", "serial_adapter", "prefix_tuning", "prefix_tuning{projection=4}",
     "prompt_tuning", "prompt_tuning{init=uniform}", "bitfit", "lora;ia3;fold"],
)  # fmt: skip
def test_passes_leave_the_global_random_state_alone(captured: Any, text: str) -> None:
    _, base = captured["encoder"]
    before = torch.get_rng_state()
    peftfx.run(base, text).verify()
    assert torch.equal(torch.get_rng_state(), before)


def test_capture_leaves_the_global_random_state_alone() -> None:
    model = build("encoder")
    before = torch.get_rng_state()
    peftfx.capture(model, kwargs=batch())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", ["lora", "serial_adapter", "prefix_tuning", "prompt_tuning"])
def test_the_seed_decides_the_initialisation(captured: Any, text: str) -> None:
    _, base = captured["encoder"]

    def values(seed: int) -> dict[str, Tensor]:
        return dict(peftfx.run(base, f"{text}{{seed={seed}}}").named_trainable_parameters())

    one, again, other = values(1), values(1), values(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


class Odd(nn.Module):
    """Names that clash with ours or hold odd characters, a root weight and a parameter list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.soft, self.modes = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.by_name = nn.ModuleDict({"a-b": nn.Linear(4, 4), "c d": nn.Linear(4, 4)})
        self.some = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.modes(F.relu(F.linear(x, self.weight))))
        for linear in self.by_name.values():
            x = F.relu(linear(x))
        return self.soft(x @ self.some[0])


def test_odd_names(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    base = peftfx.capture(model, (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert torch.equal(base(x), model(x))
    program = randomise(peftfx.run(base, "lora{rank=2,where=linear}"), 0.3)
    assert len(program.attachments) == 6
    peftfx.save(program, tmp_path / "a")
    assert torch.equal(peftfx.load(model, tmp_path / "a")(x), program(x))
    other = Odd().eval()
    other.load_state_dict(peftfx.run(program, "fold").export_state_dict())
    close(other(x), program(x))
    biased = peftfx.run(base, "bitfit{where=linear}").named_trainable_parameters()
    assert {"bias", "modes.bias", "soft.bias", "by_name.a-b.bias"} <= set(biased)


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.peftfx = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.peftfx(x)


def test_the_name_of_our_own_branches_is_kept_apart() -> None:
    model = Taken()
    try:
        base = peftfx.capture(model, (torch.randn(3, 4),))
    except RewriteError as error:
        assert "peftfx" in str(error)
        return
    assert set(base.export_state_dict()) == set(model.state_dict())


def test_torch_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    base = peftfx.capture(model, (torch.randn(3, 9, 32),))
    x = torch.randn(2, 5, 32)
    torch.manual_seed(0)
    want = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(base.train()(x), want)
    found = sorted(s.role for s in base.sites if s.kind == "linear")
    assert found == sorted([*ROLES, *ROLES])
    base.eval()
    text = "lora{rank=4};ia3;prefix_tuning{length=3};serial_adapter{bottleneck=4}"
    program = randomise(peftfx.run(base, text), 0.2)
    close(peftfx.run(program, "fold")(x), program(x))
