"""What the user trains beside adapters stays trained, is saved, and comes back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ArtifactError, PassError
from peftfx.rewriter.program.history import ITSELF

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
HEAD = ("head.weight", "head.bias")


class Classifier(nn.Module):
    """A backbone and a new head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(x).relu()))


def chosen_head() -> Classifier:
    model = Classifier().eval().requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def moved(program: peftfx.Program) -> peftfx.Program:
    """The program as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return program


def base_trained(program: peftfx.Program) -> set[str]:
    names = program.named_trainable_parameters()
    return {n for n in names if not n.startswith("peftfx.")}


def test_a_chosen_head_trains_through_every_pass(tmp_path: Path) -> None:
    model = chosen_head()
    captured = peftfx.capture(model, (X,))
    program = moved(peftfx.run(captured, "lora{rank=2,where=name:up}"))
    assert base_trained(program) == set(HEAD)
    assert "goes on training 2 parameters of the base (first: head.weight)" in str(
        program.history[-1]
    )
    assert program.adapters == ("lora",)
    more = moved(peftfx.run(program, "ia3{where=name:up};bitfit{where=name:up}"))
    assert base_trained(more) == {*HEAD, "up.bias"}
    more.verify()
    folded = peftfx.run(more, "fold{names=[lora,ia3]}")
    torch.testing.assert_close(folded(X), more(X))
    assert set(HEAD) <= base_trained(folded)
    folded.verify()
    less = more.without("lora").without("ia3").without("bitfit")
    assert base_trained(less) == set(HEAD)
    for name in HEAD:
        assert torch.equal(less.module.get_parameter(name), more.module.get_parameter(name))
    assert torch.equal(less.module.get_parameter("up.weight"), model.up.weight)
    for index, one in enumerate((program, more, folded)):
        folder = tmp_path / str(index)
        peftfx.save(one, folder)
        frozen = Classifier().eval().requires_grad_(False)
        for target in (
            chosen_head(),
            frozen,
            Classifier().eval(),
            peftfx.capture(Classifier(), (X,)),
            peftfx.capture(frozen, (X,)),
        ):
            again = peftfx.load(target, folder)
            torch.testing.assert_close(again.eval()(X), one(X), rtol=0, atol=0)
            assert base_trained(again) == base_trained(one)
            again.verify()
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in frozen.state_dict().items())
    peftfx.save(more, tmp_path / "some", adapters=["ia3"])
    some = peftfx.load(Classifier().eval(), tmp_path / "some")
    torch.testing.assert_close(some(X), more.only(("ia3",))(X), rtol=0, atol=0)


def test_a_head_trained_alone_or_first_is_saved_for_the_untouched_base(tmp_path: Path) -> None:
    captured = moved(peftfx.capture(chosen_head(), (X,)))
    peftfx.save(captured, tmp_path / "head")
    alone = peftfx.load(Classifier().eval(), tmp_path / "head")
    assert torch.equal(alone(X), captured(X)) and base_trained(alone) == set(HEAD)
    assert {n for n, p in alone.module.named_parameters() if p.requires_grad} == set(HEAD)
    program = peftfx.run(captured, "lora{rank=2,where=name:up}")
    assert torch.equal(program(X), captured(X))
    peftfx.save(program, tmp_path / "both")
    assert torch.equal(peftfx.load(Classifier().eval(), tmp_path / "both")(X), captured(X))
    assert not torch.equal(captured.base(X), captured(X))


def test_the_users_model_and_earlier_programs_stay_as_they_are() -> None:
    model = chosen_head()
    before = copy.deepcopy(model.state_dict())
    captured = peftfx.capture(model, (X,))
    program = peftfx.run(captured, "lora{rank=2,where=name:up}")
    want = captured(X).detach()
    moved(program)
    assert torch.equal(captured(X), want)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not torch.equal(program(X), want)


def test_a_fresh_model_is_frozen_and_the_record_says_so() -> None:
    program = peftfx.run(peftfx.capture(Classifier(), (X,)), "lora{rank=2,where=name:up}")
    assert base_trained(program) == set() and ITSELF not in program.owners
    assert "froze 6 parameters that required gradients" in str(program.history[-1])
    assert "train{where=...} keeps some" in str(program.history[-1])
    again = peftfx.run(program, "ia3{where=name:up}")
    assert "froze" not in str(again.history[-1])
    kept = peftfx.run(program, "train{where='name:head'}")
    assert base_trained(kept) == set(HEAD)
    assert peftfx.run(program.without("lora"), "ia3{where=name:up}").adapters == ("ia3",)


def test_position_tables_that_a_model_freezes_itself_are_no_choice() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(9, 8), nn.Embedding(16, 8)
            self.positions.weight.requires_grad_(False)
            self.up = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            places = torch.arange(ids.shape[1], device=ids.device)
            return self.up(self.tokens(ids) + self.positions(places))

    base = peftfx.capture(Positions(), (torch.randint(0, 9, (2, 5)),))
    assert base_trained(peftfx.run(base, "lora{rank=2,where=name:up}")) == set()


def test_a_choice_on_the_captured_program(tmp_path: Path) -> None:
    captured = peftfx.capture(Classifier(), (X,))
    for name, parameter in captured.module.named_parameters():
        parameter.requires_grad_(name in HEAD)
    program = moved(peftfx.run(captured, "lora{rank=2,where=name:up}"))
    assert base_trained(program) == set(HEAD)
    peftfx.save(program, tmp_path / "a")
    again = peftfx.load(Classifier(), tmp_path / "a")
    assert torch.equal(again(X), program(X)) and base_trained(again) == set(HEAD)


def test_a_parameter_asked_for_behind_a_pass_is_refused_by_name(tmp_path: Path) -> None:
    model = Classifier().requires_grad_(False)
    program = peftfx.run(peftfx.capture(model, (X,)), "lora{rank=2,where=name:up}")
    program.module.get_parameter("head.weight").requires_grad_(True)
    for action in (
        lambda: peftfx.run(program, "ia3{where=name:up}"),
        lambda: peftfx.run(program, "fold"),
        lambda: peftfx.save(program, tmp_path / "a"),
        lambda: program.without("lora"),
        lambda: program.only(("lora",)),
    ):
        with pytest.raises(PassError, match=r"head.weight require.*train\{where=...\}"):
            action()
    assert not (tmp_path / "a").exists()
    program.module.get_parameter("head.weight").requires_grad_(False)
    moved(peftfx.run(program, "train{where='name:head'}"))


def test_a_model_without_that_parameter_is_refused(tmp_path: Path) -> None:
    peftfx.save(moved(peftfx.capture(chosen_head(), (X,))), tmp_path / "a")
    program = peftfx.run(peftfx.capture(Classifier(), (X,)), "peqa{where=name:head,group=8}")
    with pytest.raises(ArtifactError, match=r"'head.weight', which was trained, is no parameter"):
        peftfx.load(program, tmp_path / "a")


def test_training_sees_the_head(tmp_path: Path) -> None:
    program = peftfx.run(peftfx.capture(chosen_head(), (X,)), "lora{rank=2,where=name:up}")
    done = peftfx.fit(
        program, [{"x": X}], loss=lambda y, b: (y - 1).square().mean(), epochs=3, progress=False
    ).program
    assert not torch.equal(
        done.module.get_parameter("head.bias"), program.base.module.get_parameter("head.bias")
    )
    peftfx.save(done, tmp_path / "a")
    assert torch.equal(peftfx.load(Classifier().eval(), tmp_path / "a")(X), done.eval()(X))
    assert any(
        place.method == "base" and share.gradients for place, share in done.memory(4).shares.items()
    )


def test_batch_statistics_go_with_the_adapters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    before = copy.deepcopy(model.state_dict())
    base = peftfx.capture(model, (X,))
    program = moved(
        peftfx.run(base, "lora{name=a,rank=2,where=linear};lora{name=b,rank=2,where=linear,seed=1}")
    )
    program.train()(X * 3 + 1)
    program.eval().verify()
    peftfx.save(program, tmp_path / "a")
    for target in (model, base):
        again = peftfx.load(target, tmp_path / "a")
        assert torch.equal(again(X), program(X))
        again.verify()
    assert torch.equal(again.only(("a", "b"))(X), program(X))
    removed = program.without("a").without("b")
    assert torch.equal(removed(X), base(X))  # bit for bit the base
    peftfx.save(program.without("b"), tmp_path / "b")
    assert torch.equal(peftfx.load(model, tmp_path / "b")(X), program.without("b")(X))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_choice_on_a_hollow_model(tmp_path: Path) -> None:
    real = Classifier().eval()
    save_file(real.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        hollow = Classifier().eval().requires_grad_(False)
    hollow.head.requires_grad_(True)
    program = peftfx.capture(hollow, (X,))
    for loaded in (
        peftfx.load_weights(program, tmp_path),
        peftfx.load_weights(peftfx.run(program, "lora{rank=2,where=name:up}"), tmp_path),
    ):
        assert base_trained(loaded) == set(HEAD)
        torch.testing.assert_close(loaded(X), real(X))
        trained = moved(loaded)
        peftfx.save(trained, tmp_path / "a")
        assert torch.equal(peftfx.load(real, tmp_path / "a")(X), trained(X))


def test_two_artifacts_of_one_trained_tensor_are_not_mixed(tmp_path: Path) -> None:
    """The second would overwrite what the first has learnt."""
    model = Classifier().requires_grad_(False)
    base = peftfx.capture(model, (X,))
    for name in ("one", "two"):
        trained = peftfx.run(base, f"train{{name={name},where='name:head'}}")
        with torch.no_grad():
            trained.module.get_parameter("head.weight").add_(1.0 if name == "one" else 2.0)
        peftfx.save(trained, tmp_path / name)
    one = peftfx.load(model, tmp_path / "one")
    with pytest.raises(ArtifactError, match=r"other values of head.weight.*'one' has trained"):
        peftfx.load(one, tmp_path / "two")
    again = peftfx.load(peftfx.run(base, "lora{rank=2,where=name:up}"), tmp_path / "two")
    assert torch.equal(again(X), peftfx.load(model, tmp_path / "two")(X))
