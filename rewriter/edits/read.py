"""What a pass may look at, and values of the graph that its branches may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..axes.kinds import Kind
from ..branches.samples import Samples
from ..graph.aten import erase_dead, users
from ..program.sites import (
    AttentionSite,
    EmbeddingSite,
    FeedForwardSite,
    LinearSite,
    NormSite,
    Site,
    SublayerSite,
    WeightSite,
)
from ..program.state import BRANCHES
from ..weights.weight import stored_site
from .attention.keyvalue import key_value_widths
from .calls.attach import Attaching
from .calls.call import Value, given, latest
from .calls.samples import ShownAxes
from .calls.signature import add_input, add_output, drop_input, drop_output
from .calls.values import input_of, item_of
from .linear.compose import composed_value
from .linear.expression import matrix_of
from .linear.quantise import whole_weights
from .stream.hidden import Hidden, behind_of, hidden_of, samples_of
from .stream.padding import valid_of
from .stream.region import operand_of, stream_before
from .structure.axes import Channels, channels


class Reading(Attaching):
    """The words that do not change what a program computes."""

    _axes: ShownAxes | None = None

    @property
    def axes(self) -> ShownAxes:
        """What lies along the axes of values, by what was there at the first question."""
        if self._axes is None:
            self._axes = ShownAxes(self.program)
        return self._axes

    def whole(self, ids: Sequence[str]) -> list[WeightSite]:
        """A site for each stored weight that the named sites have all of; reports the others."""
        return whole_weights(self, ids)

    def matrix(self, site: WeightSite) -> Tensor:
        """What the site multiplies by now, expressions included, `[count * own out, in]`."""
        return matrix_of(self, site)

    def table(self, site: EmbeddingSite) -> Tensor:
        """The embedding table of a site, `[size, width]`."""
        return self.stored(site.weight)

    def stored(self, name: str) -> Tensor:
        """A parameter of the base by name; of a weight in few bits what it stands for."""
        packed = stored_site(self.program, name)
        return self.weight(packed).tensor() if packed else self.graph_module.get_parameter(name)

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor of the base is a floating-point parameter."""
        parameter = dict(self.graph_module.named_parameters()).get(name)
        return parameter is not None and parameter.is_floating_point()

    def norms(self) -> tuple[NormSite, ...]:
        """All normalisations with learnt parameters."""
        return tuple(s for s in self.program.sites if isinstance(s, NormSite))

    def key_value_widths(self, site: AttentionSite) -> tuple[int, int]:
        """Width of one head's keys and of its values."""
        return key_value_widths(self.graph_module, self.node(site.nodes[0]))

    def channels(self, site: FeedForwardSite | AttentionSite | SublayerSite) -> Channels:
        """Inner channels or heads of a block, or the width of a sublayer's stream, with everything
        that is coupled to them."""
        return channels(self.program, site)

    def input(self, site: Site) -> Value:
        """What enters a site: a linear's operand, or the residual that a sublayer adds to."""
        if isinstance(site, SublayerSite) and site.parallel:  # its sum is with the other's output
            return stream_before(self.program, site, self._nodes)
        return input_of(site, self._nodes)

    def operand(self, site: SublayerSite, beside: LinearSite | None = None) -> Value | None:
        """What the first product of a sublayer reads: the residual, or its norm in a pre-norm
        model. None where it is not laid out like the sublayer's output, or like what a linear
        `beside` it reads, which is reported."""
        other = self.node(site.nodes[0]) if beside is None else self.input(beside)
        read = operand_of(self.program, site, self._nodes, other)
        if read is None:
            what = "the sublayer's output" if beside is None else f"what {beside.id} reads"
            self.skip(site, f"what its first product reads is not laid out like {what}")
        return read

    def output(self, site: Site) -> Value:
        """The value of a site, with what is composed around it or put behind it now."""
        current = composed_value(self.node(site.nodes[0]))
        while chained := [u for u in users(current) if u.meta.get("serial") == site.id]:
            current = chained[0]
        return current

    def valid(self, site: Site) -> Value | None:
        """Which tokens of a site's stream are real, bool `[batch, tokens]`; None if all are."""
        return valid_of(self.program, self.axes, self.node(site.nodes[0]))

    def hidden(self, site: Site, value: Value | None = None) -> Hidden | None:
        """The hidden states that a site reads, with what tells samples and tokens apart.

        For a linear its operand, for an attention that of its queries, for a sublayer the residual
        that it adds to; or `value`, which lies in the site's stream. None where samples and tokens
        cannot be told, which is reported.
        """
        hidden = hidden_of(self.program, self.axes, site, self._nodes, value)
        if isinstance(hidden, Hidden):
            return hidden
        self.skip(site, hidden)
        return None

    def behind(self, site: SublayerSite) -> Value | None:
        """The stream behind a sublayer, as it is now: residual plus output, normed in a post-norm
        model. None where it is laid out differently from the output, which is reported.

        It is a copy, so that branches put on the sublayer's output later do not change it.
        """
        site_value, add = (self.node(name) for name in site.nodes)
        behind = behind_of(self.graph_module, self.output(site), add, site_value)
        if behind is None:
            self.skip(site, "its output and the stream have different shapes")
        return behind

    def place(self, site: Site, kind: Kind, output: bool = False) -> int | None:
        """The axis of what a site reads (or of its value, as it is now) along which just that kind
        lies, the same at all of its calls; None where it is not known (see `axes/named.py`)."""
        places = {self.axes.named.place(v, kind) for v in self._values(site, output)}
        return places.pop() if len(places) == 1 else None

    def samples(self, site: Site, output: bool = False) -> Samples | None:
        """Where samples lie in what a site reads, or in its value; None where that cannot be told,
        which is reported."""
        samples = samples_of(self.axes, self._values(site, output))
        if samples is None:
            rows = "it cannot be told which of its rows are of which sample"
            self.skip(site, self.axes.samples.reason or rows)
        return samples

    def _values(self, site: Site, output: bool) -> list[Value]:
        """What a site reads, or its values, at all of its calls."""
        names = site.nodes if isinstance(site, WeightSite) else site.nodes[:1]
        calls = [replace(site, nodes=(name, *site.nodes[1:])) for name in names]
        return [self.output(call) if output else self.input(call) for call in calls]

    def add_input(
        self,
        name: str,
        example: Tensor,
        per_sample: bool = False,
        values: tuple[int, int] | None = None,
        sizes: Mapping[int, str] | None = None,
    ) -> Value:
        """A new input of the program, of fixed shape or, `per_sample`, one number for each
        sample; a call that leaves it out gets `example`, and one that gives values beyond the
        smallest and largest of `values` is refused. `sizes` names the axes that have a dynamic size
        of another input, such as `{0: "batch", 1: "sequence"}`."""
        return add_input(self.program, name, example, per_sample, values, sizes)

    def add_state(
        self, name: str, initial: Tensor, sizes: Mapping[int, str] | None = None
    ) -> Value:
        """An input of the program that is an output, too: what one call returns is given to the
        next one, the first of which leaves it out and gets `initial`.

        The pass says with `add_output(name, value)` what it becomes: of the same shape and dtype.
        """
        self._states.append(name)
        return add_input(self.program, name, initial, sizes=sizes)

    def add_output(self, name: str, value: Value) -> None:
        """One more output of the program, behind the model's own, which stay what they are: a dict
        or a class of named outputs gets the key, a tuple or a list one more entry. A single value
        is `output` of named outputs then: `out.output`, `out["output"]` or `out[0]`.

        Raises:
            PassError: there is one of that name.
        """
        add_output(self.program, name, value)

    def drop_output(self, name: str) -> None:
        """Takes an output away that `add_output` added."""
        drop_output(self.program, name)

    def drop_input(self, name: str, reason: str) -> None:
        """Removes an input that nothing reads any more."""
        erase_dead(self.graph_module)
        drop_input(self.program, name, reason)

    def share(self, name: str, module: nn.Module, **reads: Value | None) -> Value:
        """A module evaluated once a forward, as soon as what it reads is known."""
        path = f"{BRANCHES}.{self._owner()}.{self._folder}{name}"
        self._require_free(path, f"there is a shared module {name!r}")
        module.train(self.graph_module.training)
        self.graph_module.add_submodule(path, module)
        self.program.shared = (*self.program.shared, path)
        with self.graph_module.graph.inserting_after(latest(self.graph_module, given(reads))):
            return self._call(path, (), reads)

    def item(self, source: Value, key: str | int) -> Value:
        """One entry of what a shared module returns."""
        return item_of(self.graph_module, source, key)
