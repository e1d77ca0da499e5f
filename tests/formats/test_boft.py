"""BOFT of several butterfly factors, which PEFT makes where its CUDA extension is: its own layer with
the extension's one function in torch tells what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ArtifactError

from .test_hf_peft import CONFIG, WEIGHTS, near

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def written(folder: Path, factors: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Net, Any]:
    """A model of PEFT's and its files; blocks of 2, in up to three factors."""
    import peft
    from peft.tuners.boft import layer

    class Blocks:
        apply = staticmethod(lambda x: torch.stack([torch.block_diag(*b) for b in x]))

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)
    torch.manual_seed(factors)
    net = Net()
    kept = Net()
    kept.load_state_dict(net.state_dict())
    config = peft.BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=factors, target_modules=["inner"]
    )
    model = peft.get_peft_model(net, config).eval()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(str(folder))
    return kept, model


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_factors_turn_as_peft_has_them(
    factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, theirs = written(tmp_path / "a", factors, monkeypatch)
    x = torch.randn(3, 16)
    read = peftfx.load_peft(peftfx.capture(net.eval(), (x,)), tmp_path / "a")
    with torch.no_grad():
        want = theirs(x)
        near(read(x), want)
        assert (net(x) - want).abs().max() > 0.1
    assert {a.slot for a in read.attachments} == {"input_map", "row_scale"}


def test_blocks_that_the_config_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = written(tmp_path / "a", 1, monkeypatch)
    path = tmp_path / "a" / CONFIG
    path.write_text(path.read_text().replace('"boft_block_size": 2', '"boft_block_size": 4'))
    program = peftfx.capture(net.eval(), (torch.randn(3, 16),))
    with pytest.raises(ArtifactError, match=r"8 blocks of 2 for 16 inputs.*boft_block_size=4"):
        peftfx.load_peft(program, tmp_path / "a")
    save_file({"base_model.model.inner.boft_R": torch.zeros(1, 8, 2, 2)}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"boft_s is missing"):
        peftfx.load_peft(program, tmp_path / "a")
