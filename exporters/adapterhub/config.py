"""AdapterHub's `adapter_config.json`: what its options mean, and what older versions meant by them.

    {"config": {...}, "name": "NAME", "version": "adapters.1.3.0", ...}

`config` is that of a bottleneck (no `architecture`), `lora`, `prefix_tuning`, `prompt_tuning`, or
a `union` of them. Keys and defaults are those of adapters 1.3.0; a key that is not understood is an
error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...rewriter.branches.bottleneck import ACTIVATIONS
from ...rewriter.errors import ArtifactError, nearest

CONFIG, TENSORS, SAFE = "adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"
HEAD_CONFIG, HEAD, SAFE_HEAD = (
    "head_config.json",
    "pytorch_model_head.bin",
    "model_head.safetensors",
)
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION, SAFE_FUSION = "pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors"
SETUP = "adapter_setup.json"
INTERFACE = "adapter_interface.json"

VERSION = "adapters.1.3.0"

BOTTLENECK, LORA, PREFIX, PROMPT = "bottleneck", "lora", "prefix_tuning", "prompt_tuning"
INVERTIBLE = "inv_adapter"

BOTTLENECK_DEFAULTS: Mapping[str, Any] = {
    "original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "init_weights": "bert", "init_weights_seed": None, "is_parallel": False, "scaling": 1.0,
    "use_gating": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "inv_adapter": None, "inv_adapter_reduction_factor": None, "cross_adapter": False,
    "leave_out": [], "dropout": 0.0, "phm_layer": False, "phm_dim": 4, "factorized_phm_W": True,
    "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False,
    "phm_c_init": "normal", "phm_init_range": 0.0001, "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": True,
    "stochastic_depth": 0.0,
}  # fmt: skip
LORA_DEFAULTS: Mapping[str, Any] = {
    "architecture": "lora", "selfattn_lora": True, "intermediate_lora": False,
    "output_lora": False, "leave_out": [], "r": 8, "alpha": 8, "dropout": 0.0,
    "attn_matrices": ["q", "v"], "composition_mode": "add", "init_weights": "lora",
    "init_weights_seed": None, "use_gating": False, "use_dora": False, "vera_d": None,
    "vera_b": None, "dtype": None,
}  # fmt: skip
PREFIX_DEFAULTS: Mapping[str, Any] = {
    "architecture": "prefix_tuning", "encoder_prefix": True, "cross_prefix": True, "leave_out": [],
    "flat": False, "prefix_length": 30, "bottleneck_size": 512, "non_linearity": "tanh",
    "dropout": 0.0, "use_gating": False, "shared_gating": True, "init_weights_seed": None,
}  # fmt: skip

PROMPT_DEFAULTS: Mapping[str, Any] = {
    "architecture": "prompt_tuning", "prompt_length": 10, "prompt_init": "random_uniform",
    "prompt_init_text": None, "random_uniform_scale": 0.5, "combine": "prefix",
    "init_weights_seed": None,
}  # fmt: skip

_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What activations were called before files said their version."""


@dataclass
class Options:
    """One config, whose options are those of its architecture.

    Attributes:
        data: the options; missing ones have their defaults.
        where: the file, for errors.
    """

    data: Mapping[str, Any]
    where: str

    @property
    def architecture(self) -> str:
        """What kind of adapter it is."""
        return str(self.data.get("architecture") or BOTTLENECK)

    def take(self, key: str, *kinds: type) -> Any:
        """An option's value.

        Raises:
            ArtifactError: it is of another type, or required and missing.
        """
        value = self.data.get(key, _DEFAULTS[self.architecture].get(key))
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if not fits:
            names = " or ".join(k.__name__ for k in kinds)
            said = f"is {value!r}" if key in self.data else "is missing"
            raise ArtifactError(f"{self.where}: {key} {said}; it must be {names}. Save it again.")
        return value

    def take_activation(self) -> str:
        """The name of the activation function, lower case, as today's versions have it."""
        name = str(self.take("non_linearity", str)).lower()
        if name not in ACTIVATIONS:
            raise ArtifactError(
                f"{self.where}: the non_linearity {name!r} is not known. Nearest: "
                f"{nearest(name, ACTIVATIONS)}. Fold it, or use one of these."
            )
        return name

    def refuse(self, key: str, why: str) -> ArtifactError:
        """The error for an option with a value that no program here computes."""
        return ArtifactError(
            f"{self.where}: {key}={self.data.get(key)!r} is not read: {why}. Use the adapter with "
            "the library that wrote it, or write it without that option."
        )

    def require_known(self) -> None:
        """Raises ArtifactError for an option that this architecture does not have."""
        for key, value in self.data.items():
            known = key in _DEFAULTS[self.architecture] or key in _REQUIRED
            if not known and value not in (None, False, [], {}):
                raise ArtifactError(
                    f"{self.where}: the option {key}={value!r} of {self.architecture} is not "
                    "understood, so the adapter would compute something else. Write it without "
                    "that option."
                )


_REQUIRED = {"architecture", "mh_adapter", "output_adapter", "reduction_factor", "non_linearity"}
"""Options of bottlenecks that have no default."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    BOTTLENECK: BOTTLENECK_DEFAULTS, LORA: LORA_DEFAULTS, PREFIX: PREFIX_DEFAULTS,
    PROMPT: PROMPT_DEFAULTS,
}  # fmt: skip


def options_of(data: Mapping[str, Any], where: str) -> list[Options]:
    """The configs of an adapter, those of a union one by one, by the meaning of its version.

    Raises:
        ArtifactError: there is none, or one of an architecture that is not read.
    """
    config = data.get("config")
    if not isinstance(config, Mapping):
        raise ArtifactError(
            f"{where}: `config` is {config!r}, and must hold the options. Save the adapter with a "
            "version of the library that writes them."
        )
    whole: dict[str, Any] = dict(config)
    each: Any = whole.get("configs") if whole.get("architecture") == "union" else [whole]
    if not isinstance(each, list) or not all(isinstance(one, dict) for one in each):
        raise ArtifactError(f"{where}: `configs` must be a list of objects. Save it again.")
    options = [Options(_today(data, one), where) for one in each]
    for one in options:
        if one.architecture not in _DEFAULTS:
            raise ArtifactError(
                f"{where}: architecture={one.architecture!r} is not read; {', '.join(_DEFAULTS)} "
                "and unions of them are. Use the adapter with the library that wrote it, or train "
                "one of these."
            )
        one.require_known()
    names = [one.architecture for one in options]
    if len(set(names)) < len(names):
        raise ArtifactError(
            f"{where}: a union of two configs of one architecture ({', '.join(names)}) is not "
            "read. Save them as two adapters."
        )
    return options


def _today(data: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A config with the names and numbers that today's version would give it."""
    own: dict[str, Any] = dict(config)
    version = str(data.get("version") or "")
    activation = own.get("non_linearity")
    if not version and isinstance(activation, str):
        own["non_linearity"] = _RENAMED.get(activation, activation)
    said = re.match(r"adapters\.(\d{1,6})\.(\d{1,6})", version)
    old = said is not None and tuple(map(int, said.groups())) < (1, 1)
    if old and data["config"].get("architecture") == LORA:
        own["alpha"] = own.get("r")  # they scaled by 1, whatever alpha was
    return own
