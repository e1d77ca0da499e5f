"""Adapters of AdapterHub: read, they compute what the library computes; written, they are its files.

The fixtures are what the library wrote (`write_adapterhub.py`), with the outputs of its models.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftfx
from peftfx.exporters.adapterhub.files import read_adapterhub
from peftfx.exporters.adapterhub.writing import written
from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    NonFiniteError,
)
from peftfx.rewriter.parts.parts import Coupling

from .adapterhub_models import output
from .write_with_peftfx import AGAIN, RECIPES, changed, program, trained

CONFIG = "adapter_config.json"

HERE = Path(__file__).parent / "adapterhub"
CASES = sorted(p.name for p in HERE.iterdir())
READ = CASES


@functools.cache
def loaded(case: str) -> peftfx.Program:
    return load_adapter(program(case.partition("-")[0]), HERE / case)


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def said(case: str) -> Tensor:
    """What the library's model gave."""
    return load_file(HERE / case / "output.safetensors")["output"]


@pytest.mark.parametrize("case", READ)
def test_read_as_the_library_has_it(case: str) -> None:
    name = case.partition("-")[0]
    near(output(loaded(case), name), said(case))
    assert (said(case) - output(program(name), name)).abs().max() > 1e-3 * said(case).abs().max()


def contents(folder: Path) -> dict[str, dict[str, Tensor]]:
    """File -> tensors of all that a directory holds, and the configs as they are."""
    files: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.rglob("*.bin")) + sorted(folder.rglob("adapter.safetensors")):
        name = str(path.relative_to(folder)).replace("adapter.safetensors", "pytorch_adapter.bin")
        files[name] = (load_file if path.suffix == ".safetensors" else torch.load)(path)
    return files


@pytest.mark.parametrize("case", READ)
def test_written_again_it_is_the_same(case: str, tmp_path: Path) -> None:
    save_adapter(loaded(case), tmp_path / "a", "adapterhub")
    theirs, ours = contents(HERE / case), contents(tmp_path / "a")
    assert theirs.keys() == ours.keys()
    for file, tensors in theirs.items():
        assert tensors.keys() == ours[file].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, ours[file][key]), key
    for path in (HERE / case).rglob("*.json"):
        again = tmp_path / "a" / path.relative_to(HERE / case)
        assert json.loads(again.read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize("case", list(RECIPES))
def test_what_trained_here_is_written(case: str, tmp_path: Path) -> None:
    """The library itself reads these: `write_with_peftfx.py`, `write_adapterhub.py`."""
    name, ours = case.partition("-")[0], trained(case)
    save_adapter(ours, tmp_path / "a", "adapterhub")
    near(output(load_adapter(program(name), tmp_path / "a"), name), output(ours, name))


@pytest.mark.parametrize("case", AGAIN)
def test_what_trained_on_is_written(case: str, tmp_path: Path) -> None:
    name, ours = case.partition("-")[0], changed(case)
    save_adapter(ours, tmp_path / "a", "adapterhub")
    near(output(load_adapter(program(name), tmp_path / "a"), name), output(ours, name))
    if case in ("llama-seq_bn", "bert-normed", "bert-scaled_par_bn"):  # the library's own keys
        theirs, again = contents(HERE / case), contents(tmp_path / "a")
        for file, tensors in theirs.items():
            shapes = {k: t.shape for k, t in tensors.items()}
            assert shapes == {k: t.shape for k, t in again[file].items()}


@pytest.mark.parametrize(
    "case",
    [
        "bert-seq_bn",
        "bert-unipelt",
        "bert-prefix",
        "bert-fusion",
        "t5-prefix_flat",
        "bert-double_seq_bn_inv",
        "llama-unipelt",
        "bert-prompt",
    ],
)
def test_an_imported_adapter_is_one_of_ours(case: str, tmp_path: Path) -> None:
    """Saved, loaded, verified, taken out."""
    read, model = loaded(case), case.partition("-")[0]
    assert "read from adapterhub adapters.1.3.0" in str(read.history[-1])
    peftfx.save(read, tmp_path / "b")
    again = peftfx.load(program(model), tmp_path / "b")
    assert torch.equal(output(again, model), output(read, model))
    assert all(c.holds for c in again.verify())
    for name in reversed(read.adapters):
        read = read.without(name)
    assert torch.equal(output(read, model), output(program(model), model))


WRITING: dict[str, tuple[str, str]] = {
    "norms": ("serial_adapter{bottleneck=4}", "it trained .* Use an adapter of their own"),
    "inputs": ("ia3", "scales what layers give"),
    "outputs": ("lora{rank=2,where=o}", "not o"),
    "biases": ("dora{rank=2,where=q}", "scales the layer's bias"),
    "padding": ("unipelt{rank=2,length=3,bottleneck=4}", "cannot be written"),
    "prompt": ("prompt_tuning{length=3}", "stands in front of them"),
    "some sublayers": ("serial_adapter{bottleneck=4,norms=false,where=attn and sublayer or "
                       "ffn and sublayer and layer in [1]}", "block 0 has others|block 1 has others"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(WRITING))
def test_what_the_library_has_no_form_for(kind: str, tmp_path: Path) -> None:
    recipe, text = WRITING[kind]
    with pytest.raises(ArtifactError, match=text):
        save_adapter(peftfx.run(program("bert"), recipe), tmp_path / "a", "adapterhub")
    assert not (tmp_path / "a").exists()


def test_peft_has_no_prompts_behind_positions(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="behind the position embeddings"):
        peftfx.save_peft(loaded("bert-prompt"), tmp_path / "a")


def test_one_activation_for_all_of_an_adapter() -> None:
    read = read_adapterhub(program("bert"), HERE / "bert-seq_bn_inv").parts
    mixed = [replace(p, activation="silu") if isinstance(p, Coupling) else p for p in read]
    with pytest.raises(ArtifactError, match="one activation"):
        written(program("bert"), mixed, "mine")


def test_gates_that_look_back_are_not_written(tmp_path: Path) -> None:
    """The library's are means over all tokens, in causal models, too."""
    ours = peftfx.run(program("llama"), "unipelt{rank=2,length=3,bottleneck=4,padding=true}")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_adapter(ours, tmp_path / "a", "adapterhub")
    assert "later ones too" in str(loaded("llama-unipelt").history[-1])


# Bad input.


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], file: str = CONFIG) -> None:
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))


def options(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda d: d["config"].update(changes))


def retensor(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        path = folder / "pytorch_adapter.bin"
        tensors = torch.load(path, weights_only=True)
        torch.save(change(tensors) or tensors, path)

    return work


def cut(folder: Path) -> None:
    path = folder / "pytorch_adapter.bin"
    path.write_bytes(path.read_bytes()[:-30])


def other_copy(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key] + 1


BAD: dict[str, tuple[str, Callable[[Path], Any], type[Exception], str]] = {
    "architecture": ("bert-lora", options(architecture="reft"), ArtifactError,
                     "architecture='reft' is not read.*Use the adapter with the library"),
    "place of a prompt": ("bert-prompt", options(combine="end"), ArtifactError, "combine='end'"),
    "length of a prompt": ("bert-prompt", options(prompt_length=5), ArtifactError,
                           "prompt_length is 5, and the file has 3 rows"),
    "option": ("bert-seq_bn", options(surprise=1), ArtifactError, "option surprise=1 of bottleneck"),
    "type": ("bert-seq_bn", options(ln_before="no"), ArtifactError, "ln_before is 'no'; it must be"),
    "activation": ("bert-seq_bn", options(non_linearity="wave"), ArtifactError, "'wave' is not known"),
    "invertible": ("bert-seq_bn", options(inv_adapter="nice"), ArtifactError,
                   "inv_adapter is 'nice', and the file has 0 of it"),
    "glow": ("bert-seq_bn_inv", options(inv_adapter="glow"), ArtifactError, "inv_adapter='glow'"),
    "coupled": ("bert-seq_bn_inv", options(inv_adapter_reduction_factor=8), ArtifactError,
                "inv_adapter_reduction_factor=8 makes 1 of 8"),
    "not coupled": ("bert-seq_bn_inv", options(inv_adapter=None), ArtifactError,
                    "tensors of invertible_adapters"),
    "post add": ("bert-seq_bn", options(residual_before_ln="post_add"), ArtifactError,
                 "residual_before_ln='post_add'"),
    "no norm": ("bert-seq_bn", options(original_ln_after=False), ArtifactError,
                "original_ln_after=False"),
    "scaling": ("bert-seq_bn", options(scaling="learned"), ArtifactError, "scaling='learned'"),
    "size": ("bert-seq_bn", options(reduction_factor=2), ArtifactError, "reduction_factor=2 makes 8"),
    "place": ("bert-seq_bn", options(mh_adapter=True), ArtifactError, "mh_adapter is True"),
    "no size": ("bert-seq_bn", options(reduction_factor={"0": "x"}), ArtifactError,
                "do not fit together"),
    "no rank": ("bert-lora", options(r=0), ArtifactError, "rank is 0"),
    "factors": ("bert-compacter", retensor(lambda t: {k: v[..., :1] if "W_left" in k else v[:, :0]
                for k, v in t.items() if v.dim() > 1} | {k: v for k, v in t.items() if v.dim() < 2}),
                ArtifactError, "do not fit together|there are"),
    "configs": ("bert-unipelt", lambda f: edit(f, lambda d: d["config"].update(configs=[3])),
                ArtifactError, "must be a list of objects"),
    "rank": ("bert-lora", options(r=4), ArtifactError, "the config's rank is 4"),
    "mode": ("bert-lora", options(composition_mode="x"), ArtifactError, "composition_mode='x'"),
    "two gates": ("bert-unipelt", lambda f: edit(f, lambda d: d["config"]["configs"][0].update(
        shared_gating=False)), ArtifactError, "shared_gating=False"),
    "twice": ("bert-unipelt", lambda f: edit(f, lambda d: d["config"]["configs"].append(
        d["config"]["configs"][0])), ArtifactError, "a union of two configs"),
    "interface": ("bert-seq_bn", lambda f: (f / "adapter_interface.json").write_text("{}"),
                  ArtifactError, "plug-in interface"),
    "name": ("bert-seq_bn", lambda f: edit(f, lambda d: d.update(name="mine")), ArtifactError,
             "belongs to no adapter called 'mine'"),
    "no name": ("bert-seq_bn", lambda f: edit(f, lambda d: d.pop("name")), ArtifactError,
                "`name` is None"),
    "no config": ("bert-seq_bn", lambda f: edit(f, lambda d: d.update(config="pfeiffer")),
                  ArtifactError, "`config` is 'pfeiffer'"),
    "key": ("bert-seq_bn", retensor(lambda t: {**t, "bert.x": torch.ones(2)}), ArtifactError,
            "the key 'bert.x'"),
    "leaf": ("bert-seq_bn", retensor(lambda t: {**t, next(iter(t)).replace("weight", "w"): torch.ones(
        2)}), ArtifactError, r"adapter_down\.0\.w' is not understood"),
    "missing": ("bert-seq_bn", retensor(lambda t: {k: v for k, v in t.items() if "up.bias" not in k}),
                ArtifactError, r"adapter_up\.bias is missing"),
    "tensors of another": ("bert-seq_bn", retensor(lambda t: {**t, **{
        "bert.encoder.layer.0.attention.self.query.loras.theirs.lora_A": torch.ones(2, 16)}}),
        ArtifactError, "tensors of loras"),
    "width": ("bert-lora", retensor(lambda t: {k: v[:, :8] if "lora_A" in k else v
                                               for k, v in t.items()}), BaseMismatchError, "does not fit"),
    "outputs": ("bert-lora", retensor(lambda t: {k: v[:9] if "lora_B" in k else v
                                                 for k, v in t.items()}), ArtifactError, "9 outputs"),
    "copies": ("bert-prefix_flat", retensor(other_copy), ArtifactError, "3 times, with other values"),
    "rows": ("bert-prefix_flat", options(prefix_length=5), ArtifactError, "is not 5 rows"),
    "not a number": ("bert-seq_bn", retensor(lambda t: {k: v * float("nan") for k, v in t.items()}),
                     NonFiniteError, "NaN"),
    "an object": ("bert-seq_bn", retensor(lambda t: {**t, "epoch": 3}), ArtifactError,
                  r"pytorch_adapter\.bin: 'epoch' is a int"),
    "cut": ("bert-seq_bn", cut, CorruptFileError, "is damaged"),
    "head": ("bert-head", lambda f: torch.save({"heads.x.1.weight": torch.ones(2)}, f /
             "pytorch_model_head.bin"), ArtifactError, r"head's 'heads\.x\.1\.weight'"),
    "stack": ("bert-fusion", lambda f: edit(f, lambda d: d["adapter_setup"].update(type="Stack"),
                                            "adapter_setup.json"), ArtifactError, "'Stack' is not read"),
    "nested": ("bert-fusion", lambda f: edit(f, lambda d: d["adapter_setup"]["children"].append(
        {"type": "Stack", "children": []}), "adapter_setup.json"), ArtifactError, "'Fuse' is not read"),
    "unlike members": ("bert-fusion", lambda f: edit(f / "other", lambda d: d["config"].update(
        original_ln_before=False)), ArtifactError, "the members read output and stream"),
    "temperature": ("bert-fusion", lambda f: edit(f / "theirs,other", lambda d: d["config"].update(
        temperature=True), "adapter_fusion_config.json"), ArtifactError, "temperature=True"),
    "layers left out": ("t5-prefix_flat", options(leave_out=[0]), ArtifactError, "share biases"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(BAD))
def test_a_bad_adapter_is_refused(fault: str, tmp_path: Path) -> None:
    case, change, kind, text = BAD[fault]
    shutil.copytree(HERE / case, tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(kind, match=text):
        load_adapter(program(case.partition("-")[0]), tmp_path / "a")


@pytest.mark.parametrize("case", ["bert-lora", "bert-seq_bn", "bert-fusion"])
def test_an_adapter_of_another_base(case: str) -> None:
    with pytest.raises(ArtifactError, match="Use the base that"):
        load_adapter(program("llama"), HERE / case)


def test_a_fusion_of_what_is_not_there() -> None:
    with pytest.raises(ArtifactError, match="'theirs' is not in the program"):
        load_adapter(program("bert"), HERE / "bert-fusion" / "theirs,other")
