"""An adapter's tensors as its files name them, and what the files say of themselves."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..rewriter.errors import ArtifactError
from ..rewriter.files.directory import reading
from ..rewriter.files.files import header_metadata, parse_tensors, read_file
from ..rewriter.parts.parts import LowRank
from .adapterhub.config import SAFE, TENSORS
from .adapterhub.files import json_in, tensors_in
from .adapterhub.lora import factors_alone
from .gguf.adapter import ALPHA
from .gguf.file import opened
from .hf_peft.adapter import peft_files
from .hf_peft.config import CONFIG
from .mlx import TENSORS as MLX_TENSORS
from .onnx.adapter import onnx_adapter_tensors

_LEAF = re.compile(
    r"[.]((adapters|loras|prefix_tunings|adapter_fusion_layer)[.].*|lora_\w+([.](weight|bias))?|weight[.]lora_[ab]|alpha|dora_scale|m|"
    r"(hada|lokr|oft|boft|vera|ia3|miss|shira|trainable|modules_to_save)_?\w*([.]weight)?)$"
)
"""How the names of an adapter's own tensors end, behind the module's path."""


@dataclass(frozen=True)
class Raw:
    """What files hold.

    Attributes:
        tensors: by their names in the file.
        method: as the file calls it; '' if it does not.
        base: what it was trained on, if the file says so.
        alpha: of all factors, where the file has one for all (GGUF).
        about: further words of the file.
        config: of PEFT, what its file says.
        factors: of AdapterHub, what its files tell without the model, by module.
    """

    tensors: Mapping[str, Tensor]
    method: str = ""
    base: str = ""
    alpha: float = 0.0
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    factors: Mapping[str, LowRank] = field(default_factory=dict[str, LowRank])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def modules(self) -> dict[str, dict[str, str]]:
        """Module path -> the rest of its tensors' names -> their whole names."""
        found: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            leaf = _LEAF.search(name)
            module = name[: leaf.start()] if leaf else name.removesuffix(".weight")
            rest = name[len(module) + 1 :]
            module = module.removeprefix("base_model.model.").removeprefix("base_model.")
            found.setdefault(module, {})[rest] = name
        return found


def raw_adapter(path: str | Path, kind: str) -> Raw:
    """Reads an adapter of another library.

    Args:
        path: of the adapter.
        kind: its format, see `format_of`.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) it is damaged.
    """
    match kind:
        case "peft":
            config, tensors, _ = reading(path, f"a directory with a {CONFIG}", peft_files)
            base = str(config.get("base_model_name_or_path") or "")
            return Raw(tensors, str(config["peft_type"]), base, 0.0, _words(config), config=config)
        case "mlx":
            folder = Path(path)
            config = reading(folder, f"a directory with a {CONFIG}", lambda f: json_in(f, CONFIG))
            tensors = parse_tensors(read_file(folder / MLX_TENSORS), str(folder / MLX_TENSORS))
            method = str(config.get("fine_tune_type", "lora"))
            return Raw(tensors, method, str(config.get("model", "")))
        case "gguf":
            with opened(path) as file:
                tensors = {name: file.tensor(name) for name in file.tensors}
                base = f"a model of architecture {file.architecture}"
                return Raw(tensors, "lora", base, float(file.number(ALPHA, 0.0)))
        case "onnx_adapter":
            return Raw(onnx_adapter_tensors(path), "lora")
        case "adapterhub":
            return _adapterhub(Path(path))
        case _:
            data = read_file(path)
            said = header_metadata(data, str(path)) if len(data) > 8 else {}
            return Raw(parse_tensors(data, str(path)), "", said.get("ss_sd_model_name", ""))


_SAID = (
    "r", "lora_alpha", "use_rslora", "use_dora", "bias", "target_modules", "modules_to_save",
    "num_virtual_tokens", "task_type", "peft_version", "alpha", "reduction_factor", "non_linearity",
    "prefix_length", "prompt_length",
)  # fmt: skip


def _words(config: Mapping[str, Any]) -> dict[str, str]:
    """Options of a config that are set."""
    said = {key: config.get(key) for key in _SAID}
    texts = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in said.items()}
    return {k: text for k, text in texts.items() if text not in ("None", "False", "none", "")}


def _adapterhub(folder: Path) -> Raw:
    """An adapter, or a fusion with its members."""
    configs = sorted(folder.glob(f"**/{CONFIG}"))
    tensors: dict[str, Tensor] = {}
    methods: list[str] = []
    base, about, factors = "", dict[str, str](), dict[str, LowRank]()
    for config in configs:
        inner = config.parent.relative_to(folder).as_posix()
        data, own = reading(config.parent, f"a directory with a {CONFIG}", _member)
        prefix = "" if inner == "." else f"{inner}/"
        tensors |= {f"{prefix}{name}": t for name, t in own.items()}
        said = data.get("config", {})
        methods.append(str(said.get("architecture") or "bottleneck"))
        base = str(data.get("model_name") or "")
        about |= _words(said)
        with contextlib.suppress(ArtifactError):  # what is not understood is told as unknown
            known = factors_alone(data, own, str(config))
            factors |= {f"{prefix}{path}": part for path, part in known.items()}
    if not tensors:
        raise ArtifactError(f"{folder} holds no adapter's tensors. Save it again.")
    return Raw(tensors, "/".join(dict.fromkeys(methods)), base, about=about, factors=factors)


def _member(folder: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = tensors_in(folder, SAFE, TENSORS)
    return json_in(folder, CONFIG), tensors
