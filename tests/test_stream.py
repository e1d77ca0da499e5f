"""Programs without storage: capture on meta, weights streamed in, checkpoints folded by shard."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import peftfx
from peftfx.cli import main
from peftfx.rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    FoldError,
    MetaTensorError,
    WeightsError,
)
from peftfx.rewriter.storage import stream

from .models import VOCABULARY, Encoder, batch, bert, first, llama, moved, randomise

EVERYWHERE = "lora{where=linear and not head};ia3"


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=0, eos_token_id=1,
    ))  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
    ))  # fmt: skip


MODELS: dict[str, Any] = {"llama": llama, "bert": bert, "gpt2": gpt2, "t5": t5}


class Stored:
    """A real model, its sharded checkpoint, and a program captured on meta."""

    def __init__(self, name: str, directory: Path) -> None:
        torch.manual_seed(0)
        self.model: Any = MODELS[name]().eval()
        self.directory = directory / name
        self.model.save_pretrained(self.directory, max_shard_size="20KB")
        (self.directory / "tokenizer.json").write_text("{}")
        self.inputs = batch(3, 9, pad=2)
        if name == "t5":
            self.inputs["decoder_input_ids"] = batch(3, 7, seed=5)["input_ids"]
        with torch.device("meta"):
            hollow: Any = MODELS[name]()
        self.hollow = peftfx.capture(hollow.eval(), kwargs=self.inputs)

    @functools.cached_property
    def program(self) -> peftfx.Program:
        """The real model, captured."""
        return peftfx.capture(self.model, kwargs=self.inputs)

    @property
    def shards(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Stored] = {}
    root = tmp_path_factory.mktemp("stored")

    def get(name: str) -> Stored:
        if name not in made:
            made[name] = Stored(name, root)
        return made[name]

    return get


@pytest.fixture
def copied(stored: Any, tmp_path: Path) -> tuple[Stored, Path]:
    """Llama's checkpoint as a directory of the test's own, to damage."""
    found = stored("llama")
    own = tmp_path / "own"
    own.mkdir()
    for path in found.directory.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    return found, own


@pytest.mark.parametrize("name", MODELS)
def test_loaded_weights_equal_the_eager_model(stored: Any, name: str) -> None:
    s = stored(name)
    assert len(s.shards) > 2
    program = peftfx.load_weights(s.hollow, s.directory)
    for inputs in (s.inputs, {n: t[:2, :5] for n, t in s.inputs.items()}):
        with torch.no_grad():  # operators choose their kernels by whether gradients flow
            assert torch.equal(first(program(**inputs)), first(s.model(**inputs)))
    assert all(p.is_meta for p in s.hollow.module.parameters())
    assert program.identity == s.program.identity
    state = program.export_state_dict()
    assert all(torch.equal(state[n], t) for n, t in s.model.state_dict().items())
    assert not program.trainable_parameters()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_inserted_without_storage_are_measured_later(stored: Any, name: str) -> None:
    s = stored(name)
    hollow = peftfx.run(s.hollow, EVERYWHERE)
    assert {r.certificate.kind for r in hollow.history} == {"unmeasured"}
    program = peftfx.load_weights(hollow, s.directory)
    assert {r.certificate.kind for r in program.history} == {"identity"}
    here = peftfx.run(s.program, EVERYWHERE)
    assert [s.id for s in program.sites] == [s.id for s in here.sites]
    assert torch.equal(first(program(**s.inputs)), first(here(**s.inputs)))
    for (a, x), (b, y) in zip(
        program.named_trainable_parameters().items(),
        here.named_trainable_parameters().items(),
        strict=True,
    ):
        assert a == b and torch.equal(x, y)
    loss = first(randomise(program).train()(**s.inputs)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in program.trainable_parameters())


def test_what_needs_values_says_what_to_do(stored: Any, tmp_path: Path) -> None:
    program = peftfx.run(stored("llama").hollow, "lora")
    for action in (
        lambda: program.identity,
        lambda: peftfx.run(program, "fold"),
        lambda: peftfx.save(program, tmp_path / "a"),
    ):
        with pytest.raises(MetaTensorError, match="load_weights"):
            action()
    assert not list(tmp_path.iterdir())


def test_buffers_that_nothing_can_compute_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    real = Encoder().eval()
    safetensors.torch.save_file(real.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        hollow = peftfx.capture(Encoder().eval(), kwargs=batch())
    with pytest.raises(MetaTensorError, match=r"position_ids.*buffers="):
        peftfx.load_weights(hollow, tmp_path)
    program = peftfx.load_weights(hollow, tmp_path, buffers=dict(real.named_buffers()))
    with torch.no_grad():
        assert torch.equal(first(program(**batch())), first(real(**batch())))


def test_real_buffers_beside_parameters_on_meta(tmp_path: Path) -> None:
    torch.manual_seed(0)
    real = Encoder().eval()
    safetensors.torch.save_file(real.state_dict(), tmp_path / "model.safetensors")
    mixed = Encoder().eval()
    for module in mixed.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    program = peftfx.load_weights(peftfx.capture(mixed, kwargs=batch()), tmp_path)
    with torch.no_grad():
        assert torch.equal(first(program(**batch())), first(real(**batch())))
    assert not mixed.position_ids.is_meta


def edit_index(own: Path, change: Any) -> None:
    path = own / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def edit_shard(path: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def rename(own: Path) -> None:
    shard = sorted(own.glob("*.safetensors"))[0]
    name = next(iter(safetensors.torch.load_file(shard)))
    edit_shard(shard, lambda t: t.update({"other.weight": t.pop(name)}))
    edit_index(own, lambda m: m.update({"other.weight": m.pop(name)}))


def narrow(own: Path) -> None:
    shard = sorted(own.glob("*.safetensors"))[1]
    edit_shard(shard, lambda t: t.update({n: x.half() for n, x in t.items()}))


DAMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), CorruptFileError,
                      "shard .* is missing"),
    "truncated": (lambda d: (p := sorted(d.glob("*.safetensors"))[-1]).write_bytes(
        p.read_bytes()[:-4]), CorruptFileError, "is truncated"),
    "header": (lambda d: sorted(d.glob("*.safetensors"))[0].write_bytes(b"\xff" * 64),
               CorruptFileError, "header"),
    "index": (lambda d: edit_index(d, lambda m: m.pop(next(iter(m)))), CorruptFileError, "index"),
    "renamed": (rename, WeightsError, r"1 are missing .*1 are unexpected \(other.weight\)"),
    "dtype": (narrow, WeightsError, "float16.*but the program has float32"),
    "nothing": (lambda d: [p.unlink() for p in d.iterdir()], ArtifactError, "0 safetensors files"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(
    copied: tuple[Stored, Path], name: str, tmp_path: Path
) -> None:
    s, own = copied
    damage, error, words = DAMAGES[name]
    damage(own)
    with pytest.raises(error, match=words):
        peftfx.load_weights(s.hollow, own)
    adapted = peftfx.run(s.hollow, "lora")
    with pytest.raises(error, match=words):
        peftfx.fold_checkpoint(adapted, own, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


# Folding into checkpoints.


@pytest.mark.parametrize(("name", "extra"), [("llama", ""), ("bert", ""), ("gpt2", ";bitfit")])
def test_folding_by_shard_equals_folding_in_memory(
    stored: Any, name: str, extra: str, tmp_path: Path
) -> None:
    s = stored(name)
    program = randomise(peftfx.run(s.program, EVERYWHERE + extra))
    assert moved(first(s.model(**s.inputs)), first(program(**s.inputs))) > 0.01
    peftfx.save(program, tmp_path / "adapter")
    want = peftfx.run(program, "fold").export_state_dict()
    done = peftfx.fold_checkpoint(
        s.hollow, s.directory, tmp_path / "out", adapter=tmp_path / "adapter"
    )
    before = {p.name: p.read_bytes() for p in s.directory.iterdir()}
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {*before, stream.RECORD, "README.md"} == {*after} and "tokenizer.json" in done.copied
    for shard in s.shards:
        old = safetensors.torch.load_file(shard)
        new = safetensors.torch.load_file(tmp_path / "out" / shard.name)
        assert old.keys() == new.keys()
        assert all(torch.equal(t, want[n]) for n, t in new.items())
        assert {n for n in old if not torch.equal(old[n], new[n])} <= set(done.changed)
    assert len(done.changed) > 10
    again = type(s.model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        first(again(**s.inputs)), first(program(**s.inputs)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "text",
    [
        "said{dimension=40,where=q}",
        "oft{block=4,where=k}",
        "boft{block=4,where=v}",
        "kadaptation{n=4,where=q|v}",
        "vb_lora{vectors=16,length=8,where=q|v};bake",
    ],
)
def test_branches_at_parts_of_fused_weights_fold_by_shard(
    stored: Any, text: str, tmp_path: Path
) -> None:
    s = stored("gpt2")
    program = randomise(peftfx.run(s.program, text.partition(";")[0]))
    program = peftfx.run(program, "bake") if ";" in text else program
    peftfx.save(program, tmp_path / "adapter")
    want = peftfx.run(program, "fold").export_state_dict()
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    done = peftfx.fold_checkpoint(s.hollow, s.directory, out, adapter=adapter)
    files = map(safetensors.torch.load_file, out.glob("*.safetensors"))
    found = {n: t for file in files for n, t in file.items()}
    assert done.changed and all(torch.equal(t, want[n]) for n, t in found.items())


def test_branches_without_values_are_refused(stored: Any, tmp_path: Path) -> None:
    s = stored("gpt2")
    for text in ("lora", "oft{block=4,where=k}"):
        program = peftfx.run(s.hollow, text)
        with pytest.raises(
            MetaTensorError, match=r"peftfx\..* is on the meta device.*load_weights"
        ):
            peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_head_tied_to_an_embedding_is_refused(stored: Any, tmp_path: Path) -> None:
    s = stored("gpt2")
    with pytest.raises(
        FoldError, match=r"cannot be folded: transformer\.wte\.weight is also read by embedding"
    ):
        program = peftfx.run(s.hollow, "lora{where=head}")
        peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_wrong_base_is_refused(copied: tuple[Stored, Path], tmp_path: Path) -> None:
    s, own = copied
    program = randomise(peftfx.run(peftfx.load_weights(s.hollow, s.directory), "lora"))
    peftfx.save(program, tmp_path / "adapter")
    last = sorted(own.glob("*.safetensors"))[-1]
    edit_shard(last, lambda t: next(iter(t.values())).add_(1.0))
    for adapter, adapted in ((tmp_path / "adapter", s.hollow), (None, program)):
        with pytest.raises(BaseMismatchError, match="other base weights"):
            peftfx.fold_checkpoint(adapted, own, tmp_path / "out", adapter=adapter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "own"]


def test_what_cannot_be_folded_is_refused_before_writing(stored: Any, tmp_path: Path) -> None:
    s = stored("llama")
    for text, words in (
        ("prefix_tuning", "softmax"),
        ("bitfit", "no place for them"),
    ):
        with pytest.raises(FoldError, match=words):
            peftfx.fold_checkpoint(peftfx.run(s.hollow, text), s.directory, tmp_path / "out")
    with pytest.raises(FoldError, match="no adapter"):
        peftfx.fold_checkpoint(s.hollow, s.directory, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def tree(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_a_fold_that_fails_leaves_nothing(
    stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stored("llama")
    program = peftfx.run(peftfx.load_weights(s.hollow, s.directory), "lora")
    before = tree(s.directory)
    count = 0

    def stop(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > 9:
            raise OSError(28, "No space left on device")
        return write(*args)

    write = stream._Writer._tensor
    monkeypatch.setattr(stream._Writer, "_tensor", stop)
    with pytest.raises(ArtifactError, match="No space left"):
        peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert before == tree(s.directory)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    with pytest.raises(ArtifactError, match="holds other files"):
        peftfx.fold_checkpoint(program, s.directory, tmp_path / "full")


def test_an_interrupted_fold_goes_on(stored: Any, tmp_path: Path) -> None:
    s = stored("llama")
    program = randomise(peftfx.run(peftfx.load_weights(s.hollow, s.directory), EVERYWHERE))
    other = randomise(peftfx.run(peftfx.load_weights(s.hollow, s.directory), "lora{rank=2}"))
    whole = peftfx.fold_checkpoint(program, s.directory, tmp_path / "whole")
    for adapted, taken in ((program, 2), (other, 0)):

        def interrupt(file: str) -> None:
            if file == s.shards[2].name:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            peftfx.fold_checkpoint(adapted, s.directory, tmp_path / "out", progress=interrupt)
        assert not (tmp_path / "out").exists()
        (job,) = (p for p in tmp_path.iterdir() if p.name.startswith("."))
        (job / "half.part").write_bytes(b"x")
        with open(job / ".journal", "ab") as journal:
            journal.write(b'[{"file": "half')  # as if it was killed while it wrote this
        again = peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")
        assert len(again.resumed) == taken
        assert (again.changed, again.shares) == (whole.changed, whole.shares)
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        shutil.rmtree(tmp_path / "out")


def test_a_second_fold_has_nothing_to_do(stored: Any, tmp_path: Path) -> None:
    s = stored("llama")
    program = randomise(peftfx.run(peftfx.load_weights(s.hollow, s.directory), "lora"))
    done = peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")
    assert again.nothing_to_do and not done.nothing_to_do
    assert (again.changed, again.shares, again.lost) == (done.changed, done.shares, done.lost)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    other = randomise(peftfx.run(peftfx.load_weights(s.hollow, s.directory), "lora"), 0.1, seed=3)
    with pytest.raises(ArtifactError, match="was made of other files"):
        peftfx.fold_checkpoint(other, s.directory, tmp_path / "out")
    record = tmp_path / "out" / stream.RECORD
    record.write_bytes(record.read_bytes().replace(b'"lost"', b'"cost"', 1))
    with pytest.raises(CorruptFileError, match="was altered"):
        peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")


def test_one_process_folds_into_a_folder(stored: Any, tmp_path: Path) -> None:
    s = stored("llama")
    program = peftfx.run(peftfx.load_weights(s.hollow, s.directory), "lora")

    def twice(file: str) -> None:
        with pytest.raises(ArtifactError, match="is being written by another process"):
            peftfx.fold_checkpoint(program, s.directory, tmp_path / "out")

    peftfx.fold_checkpoint(program, s.directory, tmp_path / "out", progress=twice)
    assert (tmp_path / "out" / stream.RECORD).is_file()


def test_shares_are_those_of_numpy(stored: Any, tmp_path: Path) -> None:
    """What is left of each change in 16 bits, by the equation."""
    s = stored("llama")
    torch.manual_seed(1)
    model = MODELS["llama"]().to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "base")
    program = randomise(
        peftfx.run(peftfx.capture(model, kwargs=s.inputs), "lora{where=q|ffn.up}"), 0.005
    )
    done = peftfx.fold_checkpoint(program, tmp_path / "base", tmp_path / "out")
    new = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert len(done.shares) == 4
    for site, (left, lost) in done.shares.items():
        (branch,) = (program.branch(a) for a in program.attachments if a.site == site)
        old = model.get_parameter(site).detach().double().numpy()
        delta = (branch.b.double() @ branch.a.double() * branch.scale).detach().numpy()  # pyright: ignore
        exact = torch.from_numpy(old + delta).to(torch.bfloat16)
        assert torch.equal(new[site], exact)  # float64 sums, rounded once
        moved = exact.double().numpy() - old
        assert left == pytest.approx((moved * delta).sum() / (delta**2).sum(), rel=1e-4)
        gap = ((moved - delta) ** 2).sum() ** 0.5 / (delta**2).sum() ** 0.5
        assert lost == pytest.approx(gap, rel=1e-3) and 0.01 < lost < 1


def test_the_command_line_folds_shard_by_shard(
    stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s = stored("llama")
    program = randomise(peftfx.run(s.program, "lora"))
    peftfx.save(program, tmp_path / "adapter")
    command = ["fold", str(s.directory), str(tmp_path / "adapter"), "--stream", "--json"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads(capsys.readouterr().out)["changed"]) == 4
    again = type(s.model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        first(again(**s.inputs)), first(program(**s.inputs)), rtol=1e-4, atol=1e-5
    )
    assert main([*command, "--out", str(tmp_path / "adapter")]) == 2
    assert "holds other files" in capsys.readouterr().out
