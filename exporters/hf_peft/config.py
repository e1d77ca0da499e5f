"""PEFT's `adapter_config.json` and `adapter_model.safetensors`: what their options mean.

An option that changes numbers and is not understood is an error that names it; nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...rewriter.errors import ArtifactError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""What PEFT writes in its place with `safe_serialization=False`."""

PREFIX = "base_model.model."

ABOUT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip
"""Keys of every config that change no number."""

TARGETS = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters", "feedforward_modules",
}  # fmt: skip
"""Which modules got an adapter: the tensors' own names tell."""

INERT = {
    "init_weights", "init_ia3_weights", "rank_dropout", "module_dropout", "rank_dropout_scale",
    "use_effective_conv2d", "decompose_both", "decompose_factor", "megatron_config",
    "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "d_initial",
    "mask_type", "random_seed", "boft_dropout", "miss_dropout", "target_r", "init_r", "tinit",
    "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "prefix_projection", "token_dim", "num_attention_heads", "num_layers",
    "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks",
    "fan_in_fan_out", "nvfp4_merge_aware", "hira_dropout", "num_frozen_tokens",
}  # fmt: skip
"""Options of training, of what the tensors say themselves, or of how the base is stored (names and
shapes of ours are those of the product, whatever the storage)."""


@dataclass
class Config:
    """A config whose options are taken one by one; what is left over must be a default.

    Attributes:
        data: the file's content.
        where: its path, for errors.
    """

    data: Mapping[str, Any]
    where: str
    taken: set[str] = field(default_factory=set[str])

    @property
    def type(self) -> str:
        """The `peft_type`, such as LORA."""
        return str(self.data.get("peft_type"))

    @property
    def version(self) -> tuple[int, ...]:
        """The `peft_version` that wrote it; (0,) if it is not said."""
        said = re.match(r"(\d+)\.(\d+)", str(self.data.get("peft_version") or ""))
        return tuple(map(int, said.groups())) if said else (0,)

    def take(self, key: str, default: Any, *kinds: type) -> Any:
        """An option's value, None meaning the default.

        Raises:
            ArtifactError: it is of another type.
        """
        self.taken.add(key)
        got = self.data.get(key)
        if got is None:
            return default
        wanted = kinds or (type(default),)
        if not isinstance(got, wanted) or (isinstance(got, bool) and bool not in wanted):
            names = " or ".join(k.__name__ for k in wanted)
            raise ArtifactError(f"{self.where}: {key} must be {names}, not {got!r}.")
        return got

    def finish(self) -> None:
        """Raises ArtifactError for an option that changes numbers and is not understood."""
        for key in self.data.keys() - self.taken - ABOUT - TARGETS - INERT:
            value = self.data[key]  # 0 is a number that somebody chose, though it equals False
            if value not in (None, False, {}, [], "none") or type(value) in (int, float):
                raise ArtifactError(
                    f"{self.where}: the option {key}={self.data[key]!r} of {self.type} is not "
                    "understood, so the adapter would compute something else. Merge it with the "
                    "library that wrote it, or write it without that option."
                )


def resolved(patterns: Mapping[str, Any], path: str, default: Any, where: str) -> Any:
    """The value that PEFT takes for a module: of the first pattern that its path ends like.

    Raises:
        ArtifactError: a pattern is no regular expression.
    """
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise ArtifactError(
                f"{where}: {pattern!r} is no regular expression: {error}."
            ) from error
    return default


def by_module(tensors: Mapping[str, Tensor], leaves: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Module path -> leaf -> tensor, of the keys that end with one of the leaves."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for leaf in leaves:
            if key.endswith(f".{leaf}"):
                modules.setdefault(key[: -len(leaf) - 1], {})[leaf] = tensor
                break
    return modules
