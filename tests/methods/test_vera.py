"""VeRA against its equation, and with PEFT's matrices, training steps and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.vera import VeRABranch
from peftfx.rewriter.errors import ArtifactError, OptionError, PassError

from ..formats.peft_cases import base, computed, inputs, output, program
from ..models import batch, first, moved, randomise
from .common import check, hooked


def shared_of(program: peftfx.Program) -> Any:
    (path,) = program.shared
    return program.module.get_submodule(path)


def test_it_is_its_equation_everywhere_it_goes(hand: Any, tmp_path: Path) -> None:
    """W x + b (B (d (A x))), with the first rows and columns of one A and one B."""
    _, model, bare = hand
    program = randomise(peftfx.run(bare, "vera{rank=4,where=q|v|ffn.down}"), 0.3)
    shared = shared_of(program)
    hooks: dict[str, Callable[..., Tensor]] = {}
    for attachment in program.attachments:
        held: Any = program.branch(attachment)

        def put(i: Any, o: Tensor, held: Any = held) -> Tensor:
            (x,) = i
            inner = (x @ shared.a[:, : x.shape[-1]].T) * held.d
            return o + (inner @ shared.b[: o.shape[-1]].T) * held.b

        hooks[attachment.site.removesuffix(".weight")] = put
    assert len(hooks) == 6
    data = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**data)
    check(program, bare, want, data)
    names = program.named_trainable_parameters()
    assert {n.rpartition(".")[2] for n in names} == {"d", "b"}
    outputs = sum(program.sites[a.site].matrices[1] for a in program.attachments)
    assert sum(p.numel() for p in names.values()) == 6 * 4 + outputs

    folded = peftfx.run(program, "fold")
    assert not folded.attachments and not folded.shared and not folded.history[-1].skipped
    torch.testing.assert_close(first(folded(**data)), first(want), rtol=1e-5, atol=1e-5)
    peftfx.save(folded, tmp_path / "folded")
    again = peftfx.load(bare, tmp_path / "folded")
    assert torch.equal(first(again(**data)), first(folded(**data)))
    assert torch.equal(first(folded.without("vera")(**data)), first(bare(**data)))

    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    peftfx.fold_checkpoint(program, tmp_path / "base", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for key, tensor in folded.export_state_dict().items():
        torch.testing.assert_close(merged[key], tensor)


def test_half_of_a_shared_projection_folds(captured: Any) -> None:
    """What is left keeps training with the shared matrices."""
    recipe = "vera{rank=4,where=q,name=one};vera{rank=4,where=v,name=two}"
    program = randomise(peftfx.run(captured["encoder"][1], recipe), 0.3)
    folded = peftfx.run(program, "fold{names=two}")
    assert [a.adapter for a in folded.attachments] == ["one", "one"]
    assert folded.shared == ("peftfx.one.projection",)
    data = batch(4, 11, pad=3)
    torch.testing.assert_close(first(folded(**data)), first(program(**data)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["ffn.up", "ffn.down"])
def test_channels_are_not_cut_through_what_others_read(captured: Any, where: str) -> None:
    program = peftfx.run(captured["encoder"][1], f"vera{{where={where}}}")
    with pytest.raises(PassError, match=r"VeRABranch\) does not say which axes"):
        peftfx.run(program, "channel_pruning{ratio=0.5}")


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), groups=4)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))


def full(branch: VeRABranch, shared: Any) -> Tensor:
    """diag(b) B diag(d) A, `[count * out, in]`, matrix by matrix."""
    count = branch.shape.count
    rows: list[Tensor] = []
    for d, b in zip(branch.d.chunk(count), branch.b.chunk(count), strict=True):
        rows.append(b[:, None] * (shared.b[: len(b)] @ (d[:, None] * shared.a[:, : branch.width])))
    return torch.cat(rows)


def test_convolutions_in_groups(captured: Any) -> None:
    torch.manual_seed(0)
    model, x = Images().eval(), torch.randn(3, 4, 9, 8)
    bare = peftfx.capture(model, (x,))
    program = randomise(peftfx.run(bare, "vera{rank=3,where=conv}"), 0.3)
    shared = shared_of(program)
    with torch.no_grad():
        for attachment in program.attachments:
            weight = model.get_parameter(program.sites[attachment.site].weight)
            branch = program.branch(attachment)
            assert isinstance(branch, VeRABranch)
            weight += full(branch, shared).view(weight.shape)
    want = model(x)
    assert moved(bare(x), program(x)) > 0.01
    torch.testing.assert_close(program(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peftfx.run(program, "fold")(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["experts", "embedding.token"])
def test_experts_and_tables(zoo: Any, captured: Any, where: str) -> None:
    bare = zoo["mixtral"] if where == "experts" else captured["encoder"][1]
    program = randomise(peftfx.run(bare, f"vera{{rank=3,where={where}}}"), 0.3)
    data = {n: t for n, t in batch(2, 7).items() if n in bare.spec.names}
    assert moved(first(bare(**data)), first(program(**data))) > 1e-3
    shared, stored = shared_of(program), bare.export_state_dict()
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**data)), first(program(**data)), rtol=1e-4, atol=1e-5)
    for attachment in program.attachments:
        site = program.sites[attachment.site]
        branch = program.branch(attachment)
        assert isinstance(branch, VeRABranch)
        if site.features is not None:  # gates and ups are one weight
            continue
        want = stored[site.weight] + branch.shape.stored(full(branch, shared))
        torch.testing.assert_close(folded.export_state_dict()[site.weight], want)


def test_peft_draws_the_same_and_trains_the_same() -> None:
    """Matrices bit for bit, with the key that is our seed; then three steps of both."""
    import peft

    model = base("llama")
    config = peft.VeraConfig(
        r=4, target_modules=["q_proj", "down_proj"], projection_prng_key=7, d_initial=0.2
    )
    theirs: Any = peft.get_peft_model(model, config)
    ours = peftfx.run(program("llama"), peftfx.from_peft_config(config)).train()
    shared = shared_of(ours)
    assert torch.equal(shared.a, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.b, theirs.base_model.vera_B["default"])
    own = dict(theirs.named_parameters())
    for name, parameter in ours.named_trainable_parameters().items():
        path, leaf = name.split(".", 2)[2].removesuffix(name[-2:]), name[-1]
        path = path.removesuffix(".delta")
        twin = own[f"base_model.model.{path}.vera_lambda_{leaf}.default"]
        assert torch.equal(twin, parameter)  # they start alike
    mine = torch.optim.SGD(ours.trainable_parameters(), lr=200.0)
    yours = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=200.0)
    start = first(ours(**inputs("llama"))).detach()
    for _ in range(3):
        got, want = first(ours(**inputs("llama"))), output(theirs(**inputs("llama")))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for optimizer, value in ((mine, got), (yours, want)):
            value.square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
    assert moved(start, first(ours(**inputs("llama")))) > 1e-3


def trained_by_peft(path: Path, **options: Any) -> Tensor:
    import peft

    config = peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)
    model: Any = peft.get_peft_model(base("llama"), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(path)
    return computed(model.eval(), "llama", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [True, False])
def test_files_of_peft_are_its_own_branches(saved: bool, tmp_path: Path) -> None:
    """With the matrices, or with the key that they are drawn from again."""
    want = trained_by_peft(tmp_path / "a", projection_prng_key=3, save_projection=saved)
    read = peftfx.load_peft(program("llama"), tmp_path / "a", name="theirs")
    assert len(read.shared) == 1
    assert all(isinstance(read.branch(a), VeRABranch) for a in read.attachments)
    got = output(read(**inputs("llama")))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    peftfx.save(read, tmp_path / "b")
    again = peftfx.load(program("llama"), tmp_path / "b")
    assert torch.equal(output(again(**inputs("llama"))), got)
    held = load_file(tmp_path / "b" / "tensors.safetensors")
    wide = [n for n, t in held.items() if t.shape == shared_of(read).a.shape]
    assert len(wide) <= 2 * (1 + len(read.attachments))  # A once, and a weight's own factors
    trained = randomise(read, 0.3)
    peftfx.save_peft(trained, tmp_path / "c")
    import peft

    theirs = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "c")).eval()
    assert theirs.peft_config["default"].peft_type == "VERA"
    torch.testing.assert_close(
        computed(theirs, "llama", ""), output(trained(**inputs("llama"))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_what_is_trained_here_is_a_vera_there(tmp_path: Path) -> None:
    import peft

    made = randomise(peftfx.run(program("llama"), "vera{rank=3,where=q|ffn.down}"), 0.3)
    peftfx.save_peft(made, tmp_path / "a", task="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "a")).eval()
    assert theirs.peft_config["default"].peft_type == "VERA"
    want = output(made(**inputs("llama")))
    torch.testing.assert_close(computed(theirs, "llama", ""), want, rtol=1e-4, atol=1e-5)
    read = peftfx.load_peft(program("llama"), tmp_path / "a")
    torch.testing.assert_close(output(read(**inputs("llama"))), want, rtol=1e-5, atol=1e-6)
    lost = peftfx.save_peft(made, tmp_path / "plain", plain=True)
    assert not lost
    again = peftfx.load_peft(program("llama"), tmp_path / "plain")
    torch.testing.assert_close(output(again(**inputs("llama"))), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_files_without_matrices_must_say_so(tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    del tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"not in the file.*Save the adapter again"):
        peftfx.load_peft(program("llama"), tmp_path / "a")


def test_files_need_not_hold_the_matrices(captured: Any, tmp_path: Path) -> None:
    model, bare = captured["encoder"]
    sizes: list[int] = []
    for saved in ("true", "false"):
        recipe = f"vera{{rank=64,save_projection={saved},seed=5}}"
        made = randomise(peftfx.run(bare, recipe), 0.3)
        peftfx.save(made, tmp_path / saved)
        again = peftfx.load(model, tmp_path / saved)
        assert torch.equal(first(again(**batch())), first(made(**batch())))
        held = load_file(tmp_path / saved / "tensors.safetensors")
        sizes.append(sum(t.numel() for t in held.values()))
    assert sizes[0] - sizes[1] == 2 * 64 * 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("rank=0", "at least 1"),
        ("d_initial=0", "other than 0"),
        ("dropout=1", r"in \[0, 1\)"),
        ("dropout=0.1,where=embedding.token", "ids have no dropout"),
    ],
)
def test_bad_options_are_refused(captured: Any, options: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        peftfx.run(captured["encoder"][1], f"vera{{{options}}}")
