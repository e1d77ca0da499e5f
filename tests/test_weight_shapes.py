"""Methods beside convolutions, embeddings and experts, against their equations and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ArtifactError, FoldError, OptionError

from .models import batch, build, first, moved, randomise
from .test_selecting import Experts


class Mixed(nn.Module):
    """A table with a padding id, experts for every token, and convolutions over the tokens."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.token, self.block = nn.Embedding(20, 16, padding_idx=0), Experts()
        self.wide = nn.Conv1d(16, 12, 3, stride=2, padding=2, dilation=2)
        self.grouped = nn.Conv1d(12, 8, 3, groups=4, padding="same", bias=False)
        self.image = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.back = nn.ConvTranspose1d(8, 7, 3, stride=2, padding=1, output_padding=1, dilation=2)
        self.head = nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(self.token(ids))
        y = self.grouped(torch.tanh(self.wide(x.mT)))
        return self.head(x), self.back(y).mean(-1) + self.image(x[:, None]).mean((1, 2, 3))[:, None]


IDS = torch.tensor([[3, 0, 7, 7, 19, 4], [1, 2, 0, 5, 6, 11], [9, 9, 8, 3, 0, 2]])
CONVS = ("wide", "grouped", "image", "back")


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def base(model: Mixed) -> peftfx.Program:
    return peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))


def branches(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """Tensors of the branches by the name of the weight."""
    return {
        a.site: {n: p.detach() for n, p in program.branch(a).named_parameters()}
        for a in program.attachments
    }


def matrices(name: str, weight: Tensor, groups: int = 4) -> Tensor:
    """A weight as `[count, out, in]`, from what its layer computes."""
    if name == "token.weight":
        return weight.T[None]
    if name.startswith("block."):
        return weight.transpose(1, 2)
    if name == "back.weight":
        return torch.stack([weight[:, o].flatten() for o in range(weight.shape[1])])[None]
    return weight.flatten(1).unflatten(0, (groups if name == "grouped.weight" else 1, -1))


def put_back(name: str, stack: Tensor, like: Tensor) -> Tensor:
    if name == "token.weight":
        return stack[0].T
    if name == "back.weight":
        return torch.stack([row.view(like[:, 0].shape) for row in stack[0]], 1)
    return stack.transpose(1, 2) if name.startswith("block.") else stack.reshape(like.shape)


def lora(w: Tensor, t: Mapping[str, Tensor], scale: float) -> Tensor:
    """Every matrix plus s B A of its own."""
    a, b = (p if p.dim() == 3 else p[None] for p in (t["a"], t["b"]))
    return torch.stack([w[i] + scale * b[i] @ a[i] for i in range(len(w))])


def dora(w: Tensor, t: Mapping[str, Tensor], scale: float) -> Tensor:
    v = lora(w, t, scale)
    return t["m"].view(len(w), -1, 1) * v / v.norm(dim=2, keepdim=True)


def adalora(w: Tensor, t: Mapping[str, Tensor], scale: float) -> Tensor:
    return w + scale * t["p"] @ torch.diag(t["e"]) @ t["q"]


FORMULAS: dict[str, Callable[..., Tensor]] = {"lora": lora, "dora": dora, "adalora": adalora}


def changed(
    model: Mixed, program: peftfx.Program, formula: Callable[..., Tensor], scale: float
) -> Mixed:
    """The plain model, with weights that are formed from the equations."""
    other = Mixed().eval()
    state = dict(model.state_dict())
    for name, tensors in branches(program).items():
        stack = formula(matrices(name, state[name]), tensors, scale)
        state[name] = put_back(name, stack, state[name])
    other.load_state_dict(state)
    return other


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("where", ["conv", "embedding.token", "experts"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_method_equals_its_equation_and_folds(
    model: Mixed, base: peftfx.Program, method: str, where: str
) -> None:
    if (method, where) == ("adalora", "experts"):
        with pytest.raises(OptionError, match=r"4 matrices would be left with different ranks"):
            peftfx.run(base, "adalora{rank=2,where=experts}")
        return
    program = randomise(peftfx.run(base, f"{method}{{rank=2,alpha=3,where={where}}}"), 0.2)
    skipped = {s for s, _ in program.history[-1].skipped}
    lost = {"grouped.weight"} if method == "adalora" else set[str]()
    assert skipped == (lost if where == "conv" else set())
    want = changed(model, program, FORMULAS[method], 1.5)(IDS)
    close(program(IDS), want)
    assert moved(model(IDS)[0 if where != "conv" else 1], want[0 if where != "conv" else 1]) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    close(folded(IDS), want)


def test_ia3_scales_channels_vectors_and_each_expert(model: Mixed, base: peftfx.Program) -> None:
    program = randomise(peftfx.run(base, "ia3{where=conv|embedding|experts}"), 0.3)
    scales = {name: t["l"] for name, t in branches(program).items()}
    assert scales["block.down"].shape == (4 * 32,) and scales["block.up"].shape == (4 * 32,)
    other, state = Mixed().eval(), dict(model.state_dict())
    state["token.weight"] = state["token.weight"] * scales["token.weight"]
    state["block.up"] = state["block.up"] * scales["block.up"].view(4, 1, 32)
    state["block.down"] = state["block.down"] * scales["block.down"].view(4, 32, 1)
    for name in CONVS:
        scale = scales[f"{name}.weight"]
        weight = state[f"{name}.weight"]
        ones = [1 for _ in weight.shape[2:]]
        state[f"{name}.weight"] = weight * scale.view(
            *((1, -1) if name == "back" else (-1, 1)), *ones
        )
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.bias"] * scale
    other.load_state_dict(state)
    close(program(IDS), other(IDS))
    assert moved(model(IDS)[0], other(IDS)[0]) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    close(folded(IDS), other(IDS))


class Scaled(nn.Module):
    """A feed-forward block of grouped convolutions of kernel 1, whose down projection reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_an_input_scale_folds_into_a_grouped_convolution() -> None:
    from peftfx.passes.additive.ia3 import IA3Input
    from peftfx.rewriter.branches.convolutions import ConvolutionShape

    torch.manual_seed(0)
    shape = ConvolutionShape((3,), (1,), (0,), (1,), 2)
    branch = IA3Input(torch.rand(8) + 0.5)
    branch.shape = shape
    conv, x = Scaled().conv, torch.randn(2, 8, 7)
    want = F.conv1d(x * branch.l[:, None], conv.weight, None, groups=2)
    scaled = conv.weight.flatten(1)
    scaled = scaled * shape.columns(branch.l, scaled)
    torch.testing.assert_close(F.conv1d(x, shape.stored(scaled), None, groups=2), want)
    torch.testing.assert_close(F.conv1d(branch(x), conv.weight, None, groups=2), want)


TRANSPOSED = {
    "line": nn.ConvTranspose1d(6, 4, 3, stride=3, groups=2),
    "image": nn.ConvTranspose2d(
        4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, bias=False, dilation=(2, 1)
    ),
    "volume": nn.ConvTranspose3d(2, 3, 2, padding=1),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_transposed_convolution_of_any_size_and_groups(
    name: str, method: str, tmp_path: Path
) -> None:
    """The matrix of a group, row by row, from what each output channel is computed from."""
    torch.manual_seed(0)
    layer: Any = copy.deepcopy(TRANSPOSED[name]).eval()
    places, groups = layer.weight.dim() - 2, layer.groups
    x = torch.randn(2, layer.in_channels, *(3 + i for i in range(places)))
    base = peftfx.capture(layer, (x,))
    options = "" if method == "ia3" else "rank=2,alpha=3,"
    program = randomise(peftfx.run(base, f"{method}{{{options}where=conv}}"), 0.3)
    (own,) = branches(program).values()
    other = copy.deepcopy(layer)
    weight, per_group = layer.weight.detach(), layer.out_channels // groups
    stack = torch.stack([
        torch.stack([part[:, o].flatten() for o in range(per_group)])
        for part in weight.chunk(groups)
    ])  # fmt: skip
    if method == "ia3":
        stack = stack * own["l"].view(groups, per_group, 1)
        if other.bias is not None:
            other.bias.data *= own["l"]
    else:
        stack = FORMULAS[method](stack, own, 1.5)
    with torch.no_grad():
        for part, made in zip(other.weight.chunk(groups), stack, strict=True):
            for o, row in enumerate(made):
                part[:, o] = row.view(part[:, o].shape)
    torch.testing.assert_close(program(x), other(x), rtol=1e-4, atol=1e-5)
    assert moved(layer(x), other(x)) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(folded(x), other(x), rtol=1e-4, atol=1e-5)
    if method == "lora" and groups == 1:
        with pytest.raises(ArtifactError, match="no LoRA of transposed convolutions"):
            peftfx.save_peft(program, tmp_path / "peft")


class Small(nn.Module):
    """What PEFT adapts, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 9, padding_idx=0)
        self.conv = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.line, self.out = nn.Conv1d(6, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.relu(self.conv(self.embed(ids)[:, None])).mean(-1)
        return self.out(self.line(x).mean(-1))


PAIRS = {"a": "lora_A.default.weight", "b": "lora_B.default.weight",
         "m": "lora_magnitude_vector.default.weight", "l": "ia3_l.default"}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_method_equals_peft(method: str) -> None:
    """The outputs, and what a step of descent makes of all parameters."""
    import peft

    torch.manual_seed(0)
    model = Small().eval()
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 8)),))
    names = ["conv"] if method == "ia3" else ["embed", "conv", "line"]
    options = "" if method == "ia3" else "rank=2,alpha=6,"
    where = "|".join(f"name:{n}.weight" for n in names)
    program = randomise(peftfx.run(base, f"{method}{{{options}where={where}}}"), 0.3)
    config: Any = (
        peft.IA3Config(target_modules=names, feedforward_modules=[])
        if method == "ia3"
        else peft.LoraConfig(r=2, lora_alpha=6, target_modules=names, use_dora=method == "dora")
    )
    other: Any = peft.get_peft_model(model, config).eval()
    theirs = dict(other.named_parameters())
    together: list[tuple[Tensor, Tensor]] = []
    for site, tensors in branches(program).items():
        path = f"base_model.model.{site.removesuffix('.weight')}"
        for name in tensors:
            target = f"{path}.{PAIRS[name]}"
            if target not in theirs and name in "ab":
                target = f"{path}.lora_embedding_{name.upper()}.default"
            mine = program.branch(next(a for a in program.attachments if a.site == site))
            together.append((mine.get_parameter(name), theirs[target]))
    assert len(together) == sum(p.requires_grad for p in theirs.values())
    with torch.no_grad():
        for mine, its in together:
            its.copy_(mine.view(its.shape))
    ids = torch.randint(0, 20, (3, 8))
    got, want = program(ids), other(ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert moved(base(ids), got) > 0.01
    got.pow(2).mean().backward()
    want.pow(2).mean().backward()
    for mine, its in together:
        assert mine.grad is not None and its.grad is not None and mine.grad.norm() > 0
        torch.testing.assert_close(mine.grad.view(its.shape), its.grad, rtol=1e-4, atol=1e-6)


def test_the_padding_row_gets_no_gradient(base: peftfx.Program) -> None:
    program = randomise(peftfx.run(base, "lora{rank=2,where=embedding.token}"), 0.2)
    program(IDS)[0].pow(2).mean().backward()
    gradient = program.named_trainable_parameters()["peftfx.lora.token.delta.a"].grad
    assert gradient is not None
    read = {int(i) for i in IDS.flatten() if i}
    assert set(gradient.abs().sum(0).nonzero().flatten().tolist()) == read


def test_an_artifact_brings_the_branches_back(base: peftfx.Program, tmp_path: Path) -> None:
    text = "lora{rank=2,where=conv|embedding.token|experts};dora{rank=2,where=conv}"
    program = randomise(peftfx.run(base, text), 0.2)
    peftfx.save(program, tmp_path / "adapter")
    loaded = peftfx.load(base, tmp_path / "adapter")
    for got, want in zip(loaded(IDS), program(IDS), strict=True):
        assert torch.equal(got, want)
    alone = program.without("dora")
    assert {a.adapter for a in alone.attachments} == {"lora"} and len(alone.attachments) == 7


def test_a_tied_table_is_untied_or_refused() -> None:
    torch.manual_seed(0)
    model = Mixed(tied=True).eval()
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))
    program = randomise(peftfx.run(base, "lora{rank=2,alpha=3,where=embedding.token}"), 0.2)
    with pytest.raises(FoldError, match=r"token.weight is also read by"):
        peftfx.run(program, "fold")
    folded = peftfx.run(program, "fold{tied=untie}")
    want = changed(model, program, lora, 1.5)  # without the tie
    want.head.weight = nn.Parameter(model.head.weight.detach().clone())
    close(folded(IDS), want(IDS))
    assert moved(model(IDS)[0], want(IDS)[0]) > 0.01


def test_what_does_not_fit_is_said(base: peftfx.Program) -> None:
    with pytest.raises(OptionError, match="ids cannot be dropped"):
        peftfx.run(base, "lora{rank=2,dropout=0.1,where=embedding.token}")
    with pytest.raises(OptionError, match="at most 2 for 9 -> 2 features of each of 4 matrices"):
        peftfx.run(base, "lora{rank=3,where=name:grouped}")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_grouped_rows_meet_their_own_expert(zoo: Any, method: str) -> None:
    """Mixtral sorts tokens by expert, and stores gates and ups in one stack."""
    base, model = zoo["mixtral"], zoo.model("mixtral")
    program = randomise(peftfx.run(base, f"{method}{{rank=2,alpha=3,where=experts}}"), 0.1)
    own = dict(model.named_parameters())
    weights = {n: p.detach().clone() for n, p in own.items() if "experts" in n}
    for attachment in program.attachments:
        name, _, role = attachment.site.partition(":")
        rows = {"ffn.gate": slice(0, 56), "ffn.up": slice(56, 112), "": slice(None)}[role]
        tensors = {n: p.detach() for n, p in program.branch(attachment).named_parameters()}
        weights[name][:, rows] = FORMULAS[method](weights[name][:, rows], tensors, 1.5)
    inputs = batch(4, 11, pad=3)
    plain = first(model(**inputs))
    old = {n: own[n].data for n in weights}
    try:
        for name, weight in weights.items():
            own[name].data = weight
        want = first(model(**inputs))
    finally:
        for name, weight in old.items():
            own[name].data = weight
    torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-4, atol=1e-5)
    assert moved(plain, want) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-4, atol=1e-5)


def test_differences_of_every_shape_fold(model: Mixed, base: peftfx.Program) -> None:
    text = "diff_pruning{density=0.1,where=conv|embedding|experts|linear}"
    baked = peftfx.run(randomise(peftfx.run(base, text), 0.1), "bake")
    folded = peftfx.run(baked, "fold")
    assert not folded.attachments
    close(folded(IDS), baked(IDS), 1e-6)
    state, before = folded.export_state_dict(), model.state_dict()
    changed = {n for n in before if not torch.equal(state[n], before[n])}
    assert changed >= {"token.weight", "block.up", "block.down", "back.weight", "head.weight"}
    assert changed >= {f"{n}.weight" for n in CONVS}
    count = sum(before[n].numel() for n in before if "norm" not in n)
    assert sum(int((state[n] != before[n]).sum()) for n in before) <= round(0.1 * count)
    other = Mixed().eval()
    other.load_state_dict(state)
    close(folded(IDS), other(IDS), 1e-6)


class Left(nn.Module):
    """Stacks that multiply columns, stored as they multiply, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up @ x.mT[:, None])
        return (self.down.mT @ hidden).sum(1).mT


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_stack_that_multiplies_from_the_left(method: str) -> None:
    torch.manual_seed(0)
    model, x = Left().eval(), torch.randn(2, 5, 8)
    base = peftfx.capture(model, (x,))
    program = randomise(peftfx.run(base, f"{method}{{rank=2,alpha=3,where=experts}}"), 0.2)
    other = Left().eval()
    own = branches(program)
    assert set(own) == {"up", "down"}
    with torch.no_grad():
        other.up.copy_(FORMULAS[method](model.up, own["up"], 1.5))
        other.down.copy_(FORMULAS[method](model.down.mT, own["down"], 1.5).mT)
    torch.testing.assert_close(program(x), other(x), rtol=1e-5, atol=1e-5)
    assert moved(model(x), other(x)) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(folded(x), other(x), rtol=1e-5, atol=1e-5)
    scaled = randomise(peftfx.run(base, "ia3{where=name:up}"), 0.3)
    done = peftfx.run(scaled, "fold")
    torch.testing.assert_close(done(x), scaled(x), rtol=1e-5, atol=1e-5)
    assert moved(model(x), done(x)) > 0.01 and not done.attachments


def one_by_one(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix of its expert; rows behind the last end give zero."""
    y, start = torch.zeros(x.shape[0], matrices.shape[2], dtype=x.dtype), 0
    for expert, end in enumerate(ends.tolist()):
        y = y.index_put((torch.arange(start, end),), x[start:end] @ matrices[expert])
        start = end
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_meet_the_factors_of_their_expert_alone(dtype: torch.dtype) -> None:
    """With the gradients of one product a row; nothing is made of experts that have no rows."""
    from peftfx.rewriter.branches.shapes import ExpertsShape

    torch.manual_seed(0)
    ends, results = torch.tensor([3, 3, 10, 17], dtype=torch.int32), list[list[Tensor]]()
    given = [torch.randn(s, dtype=dtype) for s in ((20, 16), (4, 2, 16), (4, 24, 2))]
    shape = ExpertsShape(4, in_out=False, grouped=True)
    for mine in (True, False):
        x, a, b = (t.clone().requires_grad_() for t in given)
        if mine:
            assert shape.narrow(x, a, ends=ends).shape == (20, 2)
            y = shape.low_rank(x, a, b, 1.5, ends=ends)
        else:
            y = one_by_one(one_by_one(x, a.mT, ends) * 1.5, b.mT, ends)
        (y * y).sum().backward()
        results.append([y.detach(), *(t.grad for t in (x, a, b) if t.grad is not None)])
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(*results, strict=True):
        assert float(want.abs().max()) > 0 and got.dtype == dtype
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance * float(want.abs().max())
        )
    assert not results[0][0][17:].any() and not results[0][1][17:].any()


def test_branches_go_into_program_files_and_checkpoints(
    model: Mixed, base: peftfx.Program, tmp_path: Path
) -> None:
    program = randomise(peftfx.run(base, "lora{rank=2,where=conv|embedding.token|experts}"), 0.2)
    peftfx.save_program(program, tmp_path / "program")
    close(peftfx.load_program(tmp_path / "program")(IDS), program(IDS), 1e-6)
    (tmp_path / "model").mkdir()
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "model" / "model.safetensors")
    peftfx.fold_checkpoint(program, tmp_path / "model", tmp_path / "merged")
    merged, files = Mixed().eval(), (tmp_path / "merged").glob("*.safetensors")
    merged.load_state_dict({n: t for f in files for n, t in load_file(f).items()})
    close(merged(IDS), program(IDS))
    assert moved(model(IDS)[0], merged(IDS)[0]) > 0.01


def test_what_is_for_linears_says_so(base: peftfx.Program) -> None:
    program = randomise(peftfx.run(base, "lora{rank=2,where=conv|head}"), 0.2)
    skipped = dict(peftfx.run(program, "lower").history[-1].skipped)
    assert skipped["wide.weight"].startswith("it is no linear (conv)")
    assert "head.weight" not in skipped
    bank = peftfx.run(program, "bank")
    ids = torch.arange(len(IDS)) % 2 - 1  # the model without adapters, and the adapter
    for got, alone, plain in zip(bank(IDS, adapter=ids), program(IDS), base(IDS), strict=True):
        close(got[ids == 0], alone[ids == 0])
        close(got[ids < 0], plain[ids < 0])


def test_bfloat16_rows_and_channels_keep_their_dtype(model: Mixed) -> None:
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),), dtype=torch.bfloat16)
    text = "lora{rank=2,where=conv|embedding.token|experts};dora{rank=2,where=embedding.token}"
    program = randomise(peftfx.run(base, text), 0.05)
    assert {p.dtype for p in program.trainable_parameters()} == {torch.float32}
    folded = peftfx.run(program, "fold")
    for got, want in zip(folded(IDS), program(IDS), strict=True):
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)
    assert not folded.attachments


def test_a_prompt_stays_in_front_of_an_adapted_table(captured: Any) -> None:
    """Whatever was inserted first, what a table learns is no part of the prompt's vectors."""
    model, base = captured["encoder"]
    lora, prompt = "lora{rank=2,alpha=3,where=embedding.token}", "prompt_tuning{length=3}"
    inputs = batch(4, 11, pad=3)
    one = randomise(peftfx.run(base, f"{lora};{prompt}"), 0.2)
    two = peftfx.run(base, f"{prompt};{lora}")
    values = one.named_trainable_parameters()
    with torch.no_grad():
        for name, parameter in two.named_trainable_parameters().items():
            parameter.copy_(values[name])
    want = first(one(**inputs))
    torch.testing.assert_close(first(two(**inputs)), want)
    table = model.words.weight.detach()
    tensors = {n.rpartition(".")[2]: p.detach() for n, p in values.items()}
    only = peftfx.run(base, prompt)
    with torch.no_grad():
        for name, parameter in only.named_trainable_parameters().items():
            parameter.copy_(values[name])
    plain = first(only(**inputs))
    other = build("encoder")
    with torch.no_grad():
        other.words.weight.copy_(table + 1.5 * (tensors["b"] @ tensors["a"]).T)
    adapted = peftfx.run(peftfx.capture(other, kwargs=batch()), prompt)
    with torch.no_grad():
        for name, parameter in adapted.named_trainable_parameters().items():
            parameter.copy_(values[name])
    torch.testing.assert_close(want, first(adapted(**inputs)), rtol=1e-5, atol=1e-5)
    assert moved(plain, want) > 0.01
