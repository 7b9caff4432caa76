"""What a conversion would do: every convolution with its decision, its reason and its predicted cost.

A model and an example go through :mod:`dysurgery.trace`, :mod:`dysurgery.select` and :mod:`dysurgery.cost`; out comes
a :class:`Plan`, and nothing has been touched. A plan can be printed, written as JSON, edited and carried out
(:mod:`dysurgery.rewrite`).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dysurgery.cost import CostReport, MultAdds, cost, dynamic_mult_adds, gate_parameters, static_mult_adds
from dysurgery.errors import UsageError, did_you_mean
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
        as_graph: whether the result is a GraphModule, with functional convolutions and single calls as sites.

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

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values; :func:`edited` reads them back."""
        return {
            **dataclasses.asdict(self.settings),
            **{key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.selection).items()},
            "input_shape": list(self.before.input_shape),
            "params": dict(zip(("static", "dynamic"), self.params, strict=True)),
            "mult_adds": _mult_adds_json(*self.mult_adds),
            "notes": list(self.graph.notes),
            "sites": [
                {
                    "path": planned.site.path,
                    "kind": planned.site.kind,
                    "decision": "dynamic" if planned.decision.dynamic or planned.site.dynamic else "static",
                    "reason": planned.decision.reason,
                    "aliases": list(planned.site.aliases),
                    "weight_shape": list(planned.site.weight_shape),
                    "calls": [dataclasses.asdict(call) for call in planned.site.calls],
                    "params": dict(zip(("static", "dynamic"), planned.params, strict=True)),
                    "mult_adds": _mult_adds_json(*planned.mult_adds),
                }
                for planned in self.sites
            ],
        }


def _mult_adds_json(before: MultAdds, after: MultAdds) -> dict[str, int]:
    return {
        "static": before.total,
        "dynamic": after.total,
        "pooling": after.pooling,
        "attention": after.attention,
        "aggregation": after.aggregation,
    }


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
) -> Plan:
    """Decide what a conversion of ``model`` would do, and predict its cost. Nothing is touched.

    Args:
        model: any network with convolutions.
        example: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        k: see :class:`Settings`, as for ``reduction``, ``gate``, ``start``, ``spread``, ``seed`` and ``as_graph``.
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

    Raises:
        UsageError: for a value out of range or a pattern that matches nothing.
        DysurgeryError: if the model does not run on the example.
    """
    settings = Settings(k, reduction, gate, start, spread, seed, as_graph)
    selection = Selection(layers, _several(include), _several(exclude), _several(kinds), linear)
    return _assemble(model, example, settings, selection, {})


# What a plan's JSON holds beside its sites; lists hold text.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "k": (int,),
    "reduction": (int,),
    "gate": (str,),
    "start": (str, type(None)),
    "spread": (float, int),
    "seed": (int,),
    "as_graph": (bool,),
}
_SELECTION: dict[str, tuple[type, ...]] = {
    "layers": (str,),
    "include": (list,),
    "exclude": (list,),
    "kinds": (list,),
    "linear": (bool,),
}


def _typed(data: Mapping[str, Any], name: str) -> Any:
    """Return a value of the plan, a list as a tuple, if it is of the expected type."""
    value, expected = data[name], {**_SETTINGS, **_SELECTION}[name]
    if type(value) not in expected or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in expected)
        raise UsageError(f"{name!r} of the plan is {value!r}: expected {names}{' of text' if list in expected else ''}")
    return tuple(value) if isinstance(value, list) else value


def edited(model: nn.Module, example: Example, data: Mapping[str, Any]) -> Plan:
    """Return the plan that ``data`` describes, as :meth:`Plan.to_json` wrote it and a person may have changed it.

    What counts is each site's ``decision`` (``dynamic`` or ``static``); a site that is not listed is static.

    Raises:
        UsageError: if it is no plan, names a site that the model does not have, or asks for what a site cannot be.
        DysurgeryError: if the model does not run on the example.
    """
    sites = data.get("sites")
    if not isinstance(sites, list) or not sites or not all(isinstance(entry, dict) for entry in sites):
        raise UsageError('not a plan: it has no list of "sites" (see dysurgery plan --json)')
    wanted = {}
    for entry in sites:
        path, decision = entry.get("path"), entry.get("decision")
        if not isinstance(path, str) or decision not in ("dynamic", "static"):
            raise UsageError(f"the plan's decision for {path!r} is {decision!r}: expected 'dynamic' or 'static'")
        wanted[path] = decision
    settings = Settings(**{name: _typed(data, name) for name in _SETTINGS if name in data})
    selection = Selection(**{name: _typed(data, name) for name in _SELECTION if name in data})
    return _assemble(model, example, settings, selection, wanted)


def _assemble(
    model: nn.Module, example: Example, settings: Settings, selection: Selection, wanted: Mapping[str, str]
) -> Plan:
    graph = trace(model, example, linear=selection.linear, as_graph=settings.as_graph)
    decisions: Iterable[Decision] = select(graph, selection)
    if wanted:
        decisions = _overrule(tuple(decisions), wanted)
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


def _overrule(decisions: tuple[Decision, ...], wanted: Mapping[str, str]) -> list[Decision]:
    known = {decision.site.path for decision in decisions}
    for path in wanted:
        if path not in known:
            raise UsageError(f"the plan names {path!r}, which the model does not have{did_you_mean(path, known)}")
    result = []
    for decision in decisions:
        site, dynamic = decision.site, wanted.get(decision.site.path) == "dynamic"
        if site.dynamic and not dynamic:
            raise UsageError(f"the plan makes {site.path!r} static, but it is dynamic already")
        if dynamic and site.refusal:
            raise UsageError(f"the plan makes {site.path!r} dynamic, which it cannot be: {site.refusal}")
        if site.dynamic or dynamic == decision.dynamic:
            result.append(decision)
        else:
            result.append(Decision(site, dynamic, "set in the plan"))
    return result


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _static_parameters(site: ConvSite) -> int:
    return math.prod(site.weight_shape) + (site.weight_shape[0] if site.bias else 0) if site.weight_shape else 0


def _base(site: ConvSite) -> int:
    return static_mult_adds(site.weight_shape, site.calls) if site.weight_shape else 0


def _hidden(site: ConvSite, settings: Settings) -> int:
    return max(MIN_HIDDEN, site.channels // settings.reduction)


def _dynamic_parameters(site: ConvSite, settings: Settings) -> int:
    gate = gate_parameters(site.channels, _hidden(site, settings), settings.k)
    return settings.k * _static_parameters(site) + gate


def _dynamic(site: ConvSite, settings: Settings) -> MultAdds:
    hidden = _hidden(site, settings)
    return dynamic_mult_adds(
        site.weight_shape, site.bias, site.calls, channels=site.channels, k=settings.k, hidden=hidden
    )
