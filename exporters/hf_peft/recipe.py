"""PEFT's configurations as recipes: `peftfx.run(program, config)`, or `from_peft_config`.

Which option is which of ours, each method's `aliases` say. Here is what PEFT has as one
configuration and we have as several passes, and where its adapters start otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ...rewriter.errors import OptionError, nearest
from ...rewriter.pipeline.aliases import says_nothing, translated
from ...rewriter.pipeline.passes import Pass, lookup, make
from ...rewriter.pipeline.syntax import CONFIGURATIONS, Pipeline
from .config import ABOUT


@dataclass(frozen=True)
class Method:
    """Which pass a type of PEFT's is.

    Attributes:
        name: of the pass.
        options: of it, where PEFT's adapters start otherwise than ours.
        ignored: options that PEFT has for the type and does not read.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ignored: frozenset[str] = frozenset()


_DERIVED = frozenset({"token_dim", "num_attention_heads", "num_layers", "tokenizer_name_or_path"})
"""What prompts and prefixes are told of a model, which the graph says itself."""

METHODS: Mapping[str, Method] = {
    "LORA": Method("lora"),
    "ADALORA": Method("adalora", ignored=frozenset({"r"})),
    "VERA": Method("vera"),
    "VBLORA": Method("vb_lora", ignored=frozenset({"save_only_topk_weights"})),
    "IA3": Method("ia3", ignored=frozenset({"feedforward_modules"})),
    "PREFIX_TUNING": Method("prefix_tuning", {"std": 1.0, "shift_positions": True}, _DERIVED),
    "PROMPT_TUNING": Method("prompt_tuning", {"init": "normal"}, _DERIVED),
    "LOHA": Method("loha"),
    "LOKR": Method("lokr"),
    "OFT": Method("oft", {"series": True}),
    "BOFT": Method("boft"),
    "LN_TUNING": Method("norm_tuning"),
    "TRAINABLE_TOKENS": Method("train_tokens"),
}

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks whose head PEFT trains, said or not."""

SILENT = {"megatron_core", "qalora_group_size", "runtime_config"}
"""Options that say nothing by themselves, whatever PEFT writes for them."""

_TOKENS = "trainable_token_indices"


def from_peft_config(config: Any, name: str = "") -> Pipeline:
    """The recipe that trains what a configuration of PEFT trains.

    (IA)3 scales the inputs of the feed-forward blocks' last weights, found by dataflow, whatever
    `feedforward_modules` says.

    Args:
        config: such as `peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])`, or the contents
            of an `adapter_config.json`.
        name: of the adapter; by default the method's.

    Returns:
        The adapter, then `train{...}` for `modules_to_save` and the heads of classifiers, and
        `train_tokens{...}` for `trainable_token_indices`. `str` of it is the recipe as text.

    Raises:
        OptionError: an option that changes what is trained has no word here, or the type is no
            method here; the message says what to write.
    """
    said = _said(config)
    kind = _word(said.get("peft_type"))
    if kind not in METHODS:
        raise OptionError(
            f"there is no method here for PEFT's type {kind or 'None'}. Nearest: "
            f"{nearest(kind, METHODS)}. Choose one of `peftfx methods`; adapters of other types "
            "that are trained already are read by load_peft."
        )
    method, task = METHODS[kind], _word(said.get("task_type"))
    text = "dora" if said.get("use_dora") else method.name
    saved, tokens = _list(said.pop("modules_to_save", None)), said.pop(_TOKENS, None)
    if saved and said.get("target_modules") is not None:  # saved modules get no adapter
        said["exclude_modules"] = [*_list(said.get("exclude_modules")), *saved]
    options = _known(said, text, kind, ABOUT | SILENT | method.ignored)
    usual = {o: v for o, v in method.options.items() if o not in _ours(text, options)}
    adapter = make(text, usual | options | ({"name": name} if name else {}))
    return Pipeline((adapter, *_beside(saved, tokens, task, name)))


def _said(config: Any) -> dict[str, Any]:
    """What a configuration says, of an object also what is as usual."""
    if isinstance(config, Mapping):
        return dict(config)  # pyright: ignore[reportUnknownArgumentType]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise OptionError(
            f"a configuration is one of PEFT's, or a dict, not {type(config).__name__}. For a "
            "directory of PEFT's, use load_peft."
        )
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _known(said: Mapping[str, Any], text: str, kind: str, silent: Set[str]) -> dict[str, Any]:
    """The options that a pass has words for.

    Raises:
        OptionError: another one says something.
    """
    cls = lookup(text)
    words = {*cls.aliases, *(f.name for f in dataclasses.fields(cls))}
    for option in said.keys() - words - silent:
        if not says_nothing(said[option]):
            raise OptionError(
                f"{option}={said[option]!r} of PEFT's {kind} has no word here. Leave it out, or "
                "train with PEFT and read the adapter with load_peft."
            )
    return {o: v for o, v in said.items() if o in words - silent}


def _ours(text: str, options: Mapping[str, Any]) -> Set[str]:
    """Which of a pass's own options some are."""
    return translated(text, lookup(text).aliases, options, "").keys()


def _beside(saved: Sequence[str], tokens: Any, task: str, name: str) -> Iterator[Pass]:
    """The passes for what PEFT trains beside an adapter."""
    words = [*(f"name:{module}" for module in saved), *(["head"] if task in HEADED else [])]
    if words:
        yield make("train", {"where": "|".join(words), **_named(name, "train")})
    tables = tokens if isinstance(tokens, Mapping) else {"": tokens} if tokens else {}
    for table, ids in tables.items():  # pyright: ignore[reportUnknownVariableType]
        where = {"where": f"name:{table}"} if table else {}
        end = "tokens" if len(tables) == 1 else f"tokens_{str(table).replace('.', '_')}"  # pyright: ignore[reportUnknownArgumentType]
        own = _named(name, end) or ({"name": end} if len(tables) > 1 else {})  # pyright: ignore[reportUnknownArgumentType]
        yield make("train_tokens", {"ids": list(ids), **where, **own})  # pyright: ignore[reportUnknownArgumentType]


def _named(name: str, end: str) -> dict[str, str]:
    return {"name": f"{name}_{end}"} if name else {}


def _word(value: Any) -> str:
    """The text of an enumeration's member or of a text."""
    return str(getattr(value, "value", value) or "")


def _list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


CONFIGURATIONS["peft"] = from_peft_config
