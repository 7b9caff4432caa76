"""What a conversion would do: every convolution with its decision, its reason and its predicted cost.

A model and an example go through :mod:`dysurgery.trace`, :mod:`dysurgery.select` and :mod:`dysurgery.cost`; out comes
a :class:`Plan`, and nothing has been touched. A plan can be printed, written as JSON and edited
(:mod:`dysurgery.planfile`), and carried out (:mod:`dysurgery.rewrite`).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from dysurgery.cost import CostReport, MultAdds, cost, dynamic_mult_adds, gate_parameters, static_mult_adds
from dysurgery.errors import UsageError
from dysurgery.example import Example
from dysurgery.nn.attention import MIN_HIDDEN, gate_class
from dysurgery.nn.bank import DEFAULT_SPREAD, check_start, default_start
from dysurgery.select import KINDS, Decision, Selection, select
from dysurgery.trace import ConvGraph, ConvSite, trace


@dataclass(frozen=True)
class Settings:
    """How the chosen sites are converted.

    Args:
        k: number of kernels K, at least 2.
        reduction: hidden width of the attention is ``max(4, Cin // reduction)``.
        gate: ``softmax`` or ``sigmoid``.
        start: ``copies`` or ``zero-sum``; None takes the gate's default.
        spread: size of the zero-sum noise, as a multiple of each weight's standard deviation.
        seed: of the attention's weights and the noise.
        as_graph: whether the result is a GraphModule, with functional convolutions and single calls as sites; where
            the tracer cannot go through the whole model, the parts that it can become GraphModules.
        fold: whether chosen layers whose weight is computed before each call (weight_norm, spectral_norm, pruning,
            parametrizations) are made plain first: training goes on without that. Otherwise they stay static.

    Raises:
        UsageError: for a value out of range, or a start that would change the function under this gate.
    """

    k: int = 4
    reduction: int = 4
    gate: str = "softmax"
    start: str | None = None
    spread: float = DEFAULT_SPREAD
    seed: int = 0
    as_graph: bool = False
    fold: bool = False

    def __post_init__(self) -> None:
        if self.k < 2:
            raise UsageError(f"k is at least 2 (one kernel is the static layer), got {self.k}")
        if self.reduction < 1:
            raise UsageError(f"reduction is at least 1, got {self.reduction}")
        if not 0 < self.spread < math.inf:
            raise UsageError(f"spread is positive and finite, got {self.spread}")
        gate = gate_class(self.gate)
        if self.start is None:
            object.__setattr__(self, "start", default_start(gate))
        check_start(str(self.start), gate)


@dataclass(frozen=True)
class PlannedSite:
    """One site, and its cost before and after.

    ``params`` and ``mult_adds`` are (before, after). Of a module that is called several times, and has a site for
    each call, the first carries the static parameters.
    """

    decision: Decision
    params: tuple[int, int]
    mult_adds: tuple[MultAdds, MultAdds]

    @property
    def site(self) -> ConvSite:
        """The convolution."""
        return self.decision.site


@dataclass(frozen=True)
class Plan:
    """A conversion that has not happened yet.

    Attributes:
        settings: how.
        selection: by which rules.
        sites: every convolution, in run order.
        before: the cost of the model as it is.
        graph: what the tracer found.
        example: what the model was called with.
    """

    settings: Settings
    selection: Selection
    sites: tuple[PlannedSite, ...]
    before: CostReport
    graph: ConvGraph = dataclasses.field(repr=False, compare=False)
    example: Example = dataclasses.field(repr=False, compare=False)

    @property
    def chosen(self) -> tuple[ConvSite, ...]:
        """The sites that become dynamic."""
        return tuple(planned.site for planned in self.sites if planned.decision.dynamic)

    @property
    def params(self) -> tuple[int, int]:
        """Parameters of the whole model before and after."""
        return self.before.params, self.before.params + sum(p.params[1] - p.params[0] for p in self.sites)

    @property
    def mult_adds(self) -> tuple[MultAdds, MultAdds]:
        """Mult-Adds of the whole model per image, before and after."""
        after = self.before.mult_adds
        for planned in self.sites:
            if planned.decision.dynamic:
                after += dataclasses.replace(planned.mult_adds[1], base=0)
        return self.before.mult_adds, after

    def reasons(self) -> str:
        """Return why sites stay static, with counts, as one phrase."""
        counts = Counter(planned.decision.reason for planned in self.sites if not planned.decision.dynamic)
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "it has no convolution"


def plan(
    model: nn.Module,
    example: Example,
    *,
    k: int = 4,
    reduction: int = 4,
    gate: str = "softmax",
    layers: str = "all-but-first",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    kinds: str | Sequence[str] = KINDS,
    linear: bool = False,
    start: str | None = None,
    spread: float = DEFAULT_SPREAD,
    seed: int = 0,
    as_graph: bool = False,
    fold: bool = False,
) -> Plan:
    """Decide what a conversion of ``model`` would do, and predict its cost. Nothing is touched.

    Args:
        model: any network with convolutions.
        example: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        k: see :class:`Settings`, as for ``reduction``, ``gate``, ``start``, ``spread``, ``seed``, ``as_graph`` and
            ``fold``.
        reduction: see ``k``.
        gate: see ``k``.
        layers: see :class:`dysurgery.select.Selection`, as for ``include``, ``exclude``, ``kinds`` and ``linear``.
        include: see ``layers``.
        exclude: see ``layers``.
        kinds: see ``layers``.
        linear: see ``layers``.
        start: see ``k``.
        spread: see ``k``.
        seed: see ``k``.
        as_graph: see ``k``.
        fold: see ``k``.

    Raises:
        UsageError: for a value out of range or a pattern that matches nothing.
        DysurgeryError: if the model does not run on the example.
    """
    settings = Settings(k, reduction, gate, start, spread, seed, as_graph, fold)
    selection = Selection(layers, _several(include), _several(exclude), _several(kinds), linear)
    return assemble(model, example, settings, selection)


def assemble(
    model: nn.Module,
    example: Example,
    settings: Settings,
    selection: Selection,
    overrule: Callable[[tuple[Decision, ...]], tuple[Decision, ...]] = lambda decisions: decisions,
) -> Plan:
    """Trace the model, decide by the rules, let ``overrule`` change the decisions, and predict the cost."""
    graph = trace(model, example, linear=selection.linear, as_graph=settings.as_graph, fold=settings.fold)
    decisions = overrule(select(graph, selection))
    before = cost(model, example)
    costs = {entry.path: entry for entry in before.sites}
    sites, counted = [], set[str | None]()
    for decision in decisions:
        site = decision.site
        was = costs.get(site.path)
        params = was.params if was else _static_parameters(site)
        if site.module is not None and site.module in counted:
            params = 0
        counted.add(site.module)
        base = MultAdds(base=_base(site) // graph.batch) if was is None else was.mult_adds
        after = (params, base)
        if decision.dynamic:
            after = (_dynamic_parameters(site, settings), _dynamic(site, settings) // graph.batch)
        sites.append(PlannedSite(decision, (params, after[0]), (base, after[1])))
    return Plan(settings, selection, tuple(sites), before, graph, example)


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _static_parameters(site: ConvSite) -> int:
    return math.prod(site.weight_shape) + site.biases if site.weight_shape else 0


def _base(site: ConvSite) -> int:
    return static_mult_adds(site.weight_shape, site.calls, site.transposed) if site.weight_shape else 0


def _hidden(site: ConvSite, settings: Settings) -> int:
    return max(MIN_HIDDEN, site.channels // settings.reduction)


def _dynamic_parameters(site: ConvSite, settings: Settings) -> int:
    gate = gate_parameters(site.channels, _hidden(site, settings), settings.k)
    return settings.k * _static_parameters(site) + site.kept + gate


def _dynamic(site: ConvSite, settings: Settings) -> MultAdds:
    return dynamic_mult_adds(
        site.weight_shape,
        site.biases,
        site.calls,
        channels=site.channels,
        k=settings.k,
        hidden=_hidden(site, settings),
        transposed=site.transposed,
    )
