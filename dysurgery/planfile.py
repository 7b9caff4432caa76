"""A plan as plain values, and back after a person has edited it.

What ``dysurgery plan --json`` writes and ``convert --plan`` and ``finetune --plan`` read; the figures of
``convert --json`` too.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from dysurgery.cost import MultAdds
from dysurgery.errors import UsageError, did_you_mean
from dysurgery.example import Example
from dysurgery.plan import Plan, Settings, assemble
from dysurgery.select import Decision, Selection

# What a plan's JSON holds beside its sites; lists hold text.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "k": (int,),
    "reduction": (int,),
    "gate": (str,),
    "start": (str, type(None)),
    "spread": (float, int),
    "seed": (int,),
    "as_graph": (bool,),
    "fold": (bool,),
}
_SELECTION: dict[str, tuple[type, ...]] = {
    "layers": (str,),
    "include": (list,),
    "exclude": (list,),
    "kinds": (list,),
    "linear": (bool,),
}


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; :func:`edited` reads them back."""
    return {
        **dataclasses.asdict(plan.settings),
        **{key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(plan.selection).items()},
        "input_shape": list(plan.before.input_shape),
        "params": dict(zip(("static", "dynamic"), plan.params, strict=True)),
        "mult_adds": _mult_adds_json(*plan.mult_adds),
        "notes": list(plan.graph.notes),
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
            for planned in plan.sites
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


def edited(model: nn.Module, example: Example, data: Mapping[str, Any]) -> Plan:
    """Return the plan that ``data`` describes, as :func:`to_json` wrote it and a person may have changed it.

    What counts is each site's ``decision`` (``dynamic`` or ``static``); a site that is not listed is static.

    Raises:
        UsageError: if it is no plan, names a site that the model does not have, or asks for what a site cannot be.
        DysurgeryError: if the model does not run on the example.
    """
    wanted = _wanted(data)
    settings = Settings(**{name: _typed(data, name) for name in _SETTINGS if name in data})
    selection = Selection(**{name: _typed(data, name) for name in _SELECTION if name in data})
    return assemble(model, example, settings, selection, lambda decisions: _overrule(decisions, wanted))


def surgery(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``[surgery]`` of a recipe (:class:`dysurgery.train.recipe.Surgery`) that makes a plan's sites dynamic.

    Raises:
        UsageError: if ``data`` is no plan, makes nothing dynamic, or is of single calls (``as_graph``).
    """
    wanted = _wanted(data)
    paths = [path for path, decision in wanted.items() if decision == "dynamic"]
    if not paths:
        raise UsageError("the plan makes no layer dynamic: there is nothing to fine-tune")
    if data.get("as_graph"):
        raise UsageError("the plan is of single calls (as_graph): convert with it, and fine-tune the result")
    names = ("k", "reduction", "gate", "start", "spread", "fold", "linear")
    settings = {name: _typed(data, name) for name in names if name in data}
    return {**settings, "layers": "all", "include": [f"^{re.escape(path)}$" for path in paths], "exclude": []}


def _wanted(data: Mapping[str, Any]) -> dict[str, str]:
    """Return path -> ``dynamic`` or ``static`` of a plan's sites."""
    sites = data.get("sites")
    if not isinstance(sites, list) or not sites or not all(isinstance(entry, dict) for entry in sites):
        raise UsageError('not a plan: it has no list of "sites" (see dysurgery plan --json)')
    wanted = {}
    for entry in sites:
        path, decision = entry.get("path"), entry.get("decision")
        if not isinstance(path, str) or decision not in ("dynamic", "static"):
            raise UsageError(f"the plan's decision for {path!r} is {decision!r}: expected 'dynamic' or 'static'")
        wanted[path] = decision
    return wanted


def _typed(data: Mapping[str, Any], name: str) -> Any:
    """Return a value of the plan, a list as a tuple, if it is of the expected type."""
    value, expected = data[name], {**_SETTINGS, **_SELECTION}[name]
    if type(value) not in expected or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in expected)
        raise UsageError(f"{name!r} of the plan is {value!r}: expected {names}{' of text' if list in expected else ''}")
    return tuple(value) if isinstance(value, list) else value


def _overrule(decisions: tuple[Decision, ...], wanted: Mapping[str, str]) -> tuple[Decision, ...]:
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
    return tuple(result)
