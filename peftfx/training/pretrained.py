"""A program as a `transformers.PreTrainedModel`: `generate`, `Trainer`, `save_pretrained`.

    model = peftfx.as_hf(program, config)
    model.generate(ids, attention_mask=mask, max_new_tokens=20)
    peftfx.as_hf(peftfx.run(program, "fold"), config).save_pretrained("folder")
    transformers.AutoModelForCausalLM.from_pretrained("folder")       # without peftfx

The graph has no cache, so `generate` runs it on all tokens for each new one. What the
configuration can express (a folded program, channels cut equally everywhere) is saved in the
model's own format; a program with branches is saved as adapters, and with `base=True` the base:

    model.save_pretrained("folder", base=True)
    model = transformers.AutoModelForCausalLM.from_pretrained("folder/base")
    program = peftfx.load(model, "folder/adapter")
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..rewriter.api import Program
from ..rewriter.blocks.module import Outlined
from ..rewriter.blocks.outline import inline
from ..rewriter.errors import BlockError, ExportError, InputError
from ..rewriter.files.files import write_file
from ..rewriter.graph.module import device_of
from ..rewriter.measure.compare import TOLERANCE, compare, tensors
from ..rewriter.measure.still import forward, still
from ..rewriter.storage.artifact import save
from ..rewriter.storage.card import CARD, card, is_ours
from .partial import frozen_base

IGNORED = -100
"""The label that no loss counts."""

FILLS = {"attention_mask": 1, "decoder_attention_mask": 1, "token_type_ids": 0}
"""Inputs that calls may leave out, with the value that says nothing, where no trial could tell: in
programs that were captured on the meta device, or written by earlier versions."""

ADAPTER, BASE = "adapter", "base"
"""The artifact's folder beside the weights of a program with branches; the base model's."""

FEED_FORWARD = ("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner")
"""What configurations call the feed-forward layers' width."""

SWITCHES = {
    "use_cache": False, "return_dict": True, "output_attentions": False,
    "output_hidden_states": False, "logits_to_keep": 0,
}  # fmt: skip
"""Options of a transformers model's forward, with the value that a program is bound to."""


class Prompt(nn.Module):
    """Stands for an encoder that `generate` runs first: the program runs its own every time."""

    def __init__(self, main_input_name: str) -> None:
        super().__init__()
        self.main_input_name = main_input_name

    def forward(self, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=kwargs[self.main_input_name])


class ForPretrained:
    """What `as_hf` adds to `PreTrainedModel`: it holds a program's tensors and runs its graph."""

    runs: nn.Module
    """What runs: the program's module, or an outlined one."""
    config: Any
    generation_config: Any
    main_input_name = "input_ids"
    _supports_sdpa = True
    accepts_loss_kwargs = False
    """For `Trainer`: the captured loss is the batch's mean."""

    def __init__(self, config: Any, program: Program, runs: nn.Module) -> None:
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        self.program = program
        self.all_tied_weights_keys: Any = {}
        self.__dict__["runs"] = runs  # no child, or names would get longer
        me: Any = self
        for name, child in runs.named_children():
            me.add_module(name, child)
        for name, parameter in runs.named_parameters(recurse=False):
            me.register_parameter(name, parameter)
        for name, buffer in runs.named_buffers(recurse=False):
            me.register_buffer(name, buffer)
        me.training = runs.training
        if isinstance(encoder := me._modules.get("encoder"), nn.Module):
            encoder.main_input_name = self.main_input_name  # pyright: ignore  # generate asks it
        if me.can_generate():
            me.generation_config.use_cache = False
            for name, token in program.generation.items():
                tokens: Any = list(token) if isinstance(token, tuple) else token
                setattr(me.generation_config, name, tokens)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The program's output, without the loss if no labels are given.

        Raises:
            InputError: inputs that were not captured or are out of range.
        """
        spec = self.program.spec
        given = {**dict(zip(spec.names, args, strict=False)), **kwargs}
        encoded = given.pop("encoder_outputs", None)
        if encoded is not None:
            given[self.main_input_name] = encoded[0]
        labels = [n for n in spec.names if "label" in n and given.get(n) is None]
        as_tuple = given.get("return_dict") is False
        outputs = self.runs(**spec.bind((), self._completed(given, labels)))
        if isinstance(outputs, Tensor):
            from transformers.modeling_outputs import CausalLMOutput

            outputs: Any = CausalLMOutput(logits=outputs)  # pyright: ignore[reportArgumentType]
        if labels and isinstance(outputs, dict):
            outputs = type(outputs)(**{n: t for n, t in outputs.items() if n != "loss"})
        return outputs.to_tuple() if as_tuple else outputs

    def _completed(self, given: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        """The inputs of the graph: what it is bound to dropped, masks and labels filled in."""
        spec = self.program.spec
        given.pop("return_dict", None)
        for name, bound in SWITCHES.items():
            if name not in spec.constants and given.get(name, bound) == bound:
                given.pop(name, None)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if "attention_mask" not in spec.names and mask is not None and bool(mask.all()):
            del given["attention_mask"]
        if "position_ids" not in spec.names and positions is not None:
            given.pop("position_ids")
            if not torch.equal(positions[0].expand_as(positions), positions) or positions[0, 0]:
                raise InputError(
                    "the prompts are padded on the left, so their positions differ, but the "
                    "program was captured without position_ids. Capture again with them, or "
                    "generate from prompts of equal length."
                )
        types = given.get("token_type_ids")
        if "token_type_ids" not in spec.names and types is not None and not bool(types.any()):
            del given["token_type_ids"]  # as the model's own
        fills = {**dict.fromkeys(labels, IGNORED), **FILLS}
        main = given.get(self.main_input_name)
        sizes = {
            size: given[i.name].shape[axis]
            for i in spec.inputs
            for axis, size in enumerate(i.shape)
            if isinstance(given.get(i.name), Tensor) and axis < given[i.name].dim()
        }
        for i in spec.inputs:
            missing = given.get(i.name) is None and not i.optional
            if missing and i.name in fills and isinstance(main, Tensor):
                named = enumerate(i.shape)
                shape = [s if isinstance(s, int) else sizes.get(s, main.shape[a]) for a, s in named]
                fill = 0.0 if i.dtype.is_floating_point else fills[i.name]
                given[i.name] = main.new_full(shape, fill, dtype=i.dtype)
        return given

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # pyright: ignore
        self.program.train(mode)
        self.runs.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.runs._apply(fn, recurse)  # the tensors are its own, and so are the graph's devices
        if isinstance(self.runs, Outlined):
            self.program = inline(self.runs)
        return self

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Checkpoints blocks, for `Trainer`.

        Raises:
            BlockError: the program is not outlined.
        """
        if not isinstance(self.runs, Outlined):
            raise BlockError(
                "a flat program has no blocks to checkpoint. Outline it first: "
                "peftfx.as_hf(peftfx.outline(program), config)."
            )
        self.runs.peftfx_outlined.activation_checkpointing_enable(*args, **options)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def get_encoder(self, modality: str | None = None) -> Any:
        del modality
        return Prompt(self.main_input_name) if self.config.is_encoder_decoder else self

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        base: bool = False,
        **options: Any,
    ) -> None:
        """Writes the model's own format, or adapters where branches are left, and a model card.

        With branches: `adapter/` for `peftfx.load`, with the configuration, and the trained
        tensors, from which `Trainer` goes on. A folder without the base is no whole model, so it
        has no configuration of its own: `from_pretrained` would draw what is missing at random.

        Args:
            base: write the base model, too, as `base/` for `from_pretrained`.
            save_directory, is_main_process, state_dict, options: as transformers has them.

        Raises:
            ExportError: the configuration cannot express the program, or the base.
        """
        del state_dict
        if not is_main_process:
            return
        folder = Path(save_directory)
        if not self.program.attachments:
            self._save_whole(self.program, folder, options)
            _write_card(folder, card(self.program, (), self._base_name(), _WHOLE))
            return
        if base:
            self._save_whole(self.program.base, folder / BASE, options)
        save(self.program, folder / ADAPTER)
        self.config.save_pretrained(folder / ADAPTER)
        text = card(self.program, self.program.adapters, self._base_name(), _LOADING)
        _write_card(folder / ADAPTER, text)
        left_out = frozen_base(self.program)
        state = {n: t for n, t in self.program.module.state_dict().items() if n not in left_out}
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})

    def _save_whole(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        model = original(program, self.config)
        if model.can_generate():
            model.generation_config = copy.deepcopy(self.generation_config)
            model.generation_config.use_cache = True
        model.save_pretrained(folder, **options)

    def _base_name(self) -> str:
        """What the configuration says that it is of; empty for a path of this machine."""
        name = str(getattr(self.config, "name_or_path", "") or "")
        return "" if Path(name).is_absolute() else name


_WHOLE = "The adapters are in the weights: transformers loads the model without peftfx."
_LOADING = """```python
model = transformers.AutoModel.from_pretrained("BASE")  # the class that was captured
program = peftfx.load(model, "THIS FOLDER")
```"""


def _write_card(folder: Path, text: str) -> None:
    if is_ours(folder):
        write_file(folder / CARD, text.encode())


def original(program: Program, config: Any) -> Any:
    """The program as a model of its own class, checked to give the program's outputs.

    Raises:
        ExportError: branches are left, tensors have no place in that model, its class is not
            known, or the outputs differ.
    """
    kind, config = _class_of(program, config), copy.deepcopy(config)
    if getattr(vars(config).get("quantization_config"), "quant_method", "") == "gguf":
        del config.quantization_config  # of where tensors that are dense by now were read from
    cut = program.reshaped()
    if cut:
        _narrow(program, config, cut)
    if program.untied:
        config.tie_word_embeddings = False
    state = program.export_state_dict(strict=not cut)
    dtype = next((p.dtype for p in program.module.parameters()), torch.float32)
    with torch.random.fork_rng(devices=[]):
        model = kind._from_config(config, dtype=dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"{kind.__name__} cannot hold the program's tensors: {str(error).splitlines()[-1]} "
            "Save the program itself (peftfx.save_program), or its adapters (peftfx.save)."
        ) from error
    _compare(program, model.eval().to(device_of(program.module)))
    return model


def _class_of(program: Program, config: Any) -> Any:
    """The model's class, which transformers must have."""
    import transformers

    names = [type(program.module).__name__, *(config.architectures or ())]
    for name in names:
        if isinstance(cls := getattr(transformers, name, None), type):
            return cls
    raise ExportError(
        f"transformers has no model {names[0]}, so nothing could load what is saved. Save the "
        "program itself (peftfx.save_program), or its tensors (program.export_state_dict())."
    )


def _narrow(program: Program, config: Any, cut: list[str]) -> None:
    """Writes the width of channels that were cut equally everywhere into the configuration."""
    before = program.base.module.state_dict(keep_vars=True)
    after = program.module.state_dict(keep_vars=True)
    pairs = {
        pair
        for name in cut
        for pair in zip(before[name].shape, after[name].shape, strict=True)
        if pair[0] != pair[1]
    }
    fields = [f for f in FEED_FORWARD if {getattr(config, f, None)} == {old for old, _ in pairs}]
    if len(pairs) != 1 or not fields:
        shapes = ", ".join(f"{old} -> {new}" for old, new in sorted(pairs))
        raise ExportError(
            f"sizes changed by {shapes}, which {type(config).__name__} cannot express: it has one "
            "feed-forward width for all layers. Cut the same number everywhere, or save the "
            "program itself (peftfx.save_program)."
        )
    setattr(config, fields[0], next(iter(pairs))[1])


def _compare(program: Program, model: Any) -> None:
    sample = {n: t.to(device_of(program.module)) for n, t in program.sample.items()}
    args, kwargs = program.spec.arguments(sample)
    cache, model.config.use_cache = getattr(model.config, "use_cache", None), False
    with torch.no_grad():
        want, got = forward(still(program), sample), model(*args, **kwargs)
    model.config.use_cache = cache
    limit = TOLERANCE.get(model.dtype, 2e-5)
    if wrong := next(
        (g for g in compare(tensors(want), tensors(got)) if g.reason or g.relative > limit), None
    ):
        raise ExportError(
            f"{type(model).__name__} with the program's tensors gives other outputs ({wrong.name}: "
            f"{wrong.reason or f'off by {wrong.absolute:.3g}'}): the graph was changed in a way "
            "that the configuration cannot express. Save the program itself (peftfx.save_program)."
        )


def as_hf(program: Program | Outlined, config: Any) -> Any:
    """A `PreTrainedModel` that runs the program and shares its tensors; needs transformers.

    Args:
        program: with or without branches; captured with labels it returns the loss if they are
            given. Outlined (`peftfx.outline`), its blocks can be checkpointed.
        config: the model's `PreTrainedConfig`; it is copied.

    Returns:
        A model of a class of its own with the captured class's name: `generate` (without a
        cache; greedy, sampled or beams, also of an encoder-decoder captured with
        `decoder_input_ids`), `save_pretrained`, and whatever `Trainer` asks for.
    """
    import transformers
    from transformers.generation.utils import GenerationMixin

    runs = program if isinstance(program, Outlined) else program.module
    program = inline(program) if isinstance(program, Outlined) else program
    name = type(program.module).__name__
    known: Any = getattr(transformers, name, None)
    generates = known.can_generate() if hasattr(known, "can_generate") else True
    bases = (ForPretrained, transformers.PreTrainedModel, *((GenerationMixin,) * generates))
    names = [*program.spec.names]
    if generates and not config.is_encoder_decoder and "position_ids" not in names:
        names.append("position_ids")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ForPretrained.forward(self, *args, **kwargs)

    parameter = inspect.Parameter
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter("self", parameter.POSITIONAL_OR_KEYWORD)]
        + [parameter(n, parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    )
    main = next((n for n in names if n in ("input_ids", "pixel_values")), names[0])
    members = {"forward": forward, "config_class": type(config), "main_input_name": main}
    return type(name, bases, members)(copy.deepcopy(config), program, runs)
