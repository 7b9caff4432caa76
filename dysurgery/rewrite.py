"""A plan is carried out: chosen convolutions become dynamic layers, and the result is checked against the original.

By default the new layers are grafted into a copy of the model, under every alias, so that its class, methods, hooks
and other state_dict keys survive. With ``as_graph`` the nodes of the fx graph are rewritten instead, which also
reaches functional convolutions and single calls of a shared module. Here the graph and the operator meet.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from dysurgery import graph as graphs_of
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.example import Example, undisturbed
from dysurgery.graph import join
from dysurgery.nn import DynamicLayer, duplicate, folded, handler
from dysurgery.nn.bank import DEFAULT_SPREAD
from dysurgery.plan import Plan
from dysurgery.plan import plan as make_plan
from dysurgery.select import KINDS
from dysurgery.trace import UNTRANSPOSED, functional_arguments, site_nodes
from dysurgery.verify import (
    TOLERANCES,
    in_float64,
    largest_difference,
    layers_differ,
    layers_that_run,
    outputs,
    random_batch,
    rounded,
    tolerance,
)


@dataclass(frozen=True)
class Conversion:
    """A converted model, and how far its outputs are from the original's on a random batch.

    Attributes:
        model: the result.
        plan: what was done.
        max_abs_diff: largest absolute difference over all output tensors.
        relative_diff: the same relative to the largest output.
        rounding: where that is large, by how much rounding alone changes the outputs of the original: they are choices
            (the boxes that a detector keeps) or a network that amplifies, and its layers were compared one by one, or
            both in float64; else 0.
    """

    model: nn.Module
    plan: Plan
    max_abs_diff: float
    relative_diff: float
    rounding: float


def convert(
    model: nn.Module,
    example: Example | None = None,
    *,
    plan: Plan | None = None,
    in_place: bool = False,
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
) -> nn.Module:
    """Return ``model`` with its convolutions made dynamic, computing what it did.

    Args:
        model: any network with convolutions.
        example: what it is called with; not needed with ``plan``.
        plan: from :func:`dysurgery.plan`; then the options below are not looked at.
        in_place: change ``model`` itself instead of a copy.
        k: see :func:`dysurgery.plan` for this and all other options.
        reduction: see ``k``.
        gate: see ``k``.
        layers: see ``k``.
        include: see ``k``.
        exclude: see ``k``.
        kinds: see ``k``.
        linear: see ``k``.
        start: see ``k``.
        spread: see ``k``.
        seed: see ``k``.
        as_graph: see ``k``.
        fold: see ``k``.

    Returns:
        A network of the same class, in the same mode, on the same device; a GraphModule with ``as_graph``. Its
        temperature tau is 1.

    Raises:
        UsageError: for a value out of range, a pattern that matches nothing, or nothing to select.
        DysurgeryError: if the model does not run on the example, or the result would compute something else; the
            model is then left as it was.

    Warns:
        UserWarning: if everything that the rules select is dynamic already, so that there is nothing to do.
    """
    if plan is None:
        if example is None:
            raise UsageError("convert needs an example of the model's input, or a plan")
        plan = make_plan(
            model,
            example,
            k=k,
            reduction=reduction,
            gate=gate,
            layers=layers,
            include=include,
            exclude=exclude,
            kinds=kinds,
            linear=linear,
            start=start,
            spread=spread,
            seed=seed,
            as_graph=as_graph,
            fold=fold,
        )
    return carry_out(plan, model, in_place=in_place).model


def carry_out(plan: Plan, model: nn.Module, *, in_place: bool = False) -> Conversion:
    """Carry out ``plan`` on the model it was made for, and verify the result. See :func:`convert`."""
    if in_place and plan.settings.as_graph:
        raise UsageError("a GraphModule is a new model: as_graph and in_place exclude each other")
    if not plan.chosen:
        if not any(planned.site.dynamic for planned in plan.sites):
            raise UsageError(f"nothing is selected in {type(model).__name__}: {plan.reasons()}")
        warnings.warn(f"nothing to convert in {type(model).__name__}: {plan.reasons()}", stacklevel=3)
        return Conversion(model if in_place else duplicate(model), plan, 0.0, 0.0, 0.0)
    _check_fits(plan, model)

    inputs = random_batch(model, plan.example, plan.settings.seed)
    modes = (False, True) if plan.settings.as_graph else (False,)
    expected = outputs(model, inputs, modes)

    def build(static: nn.Module, path: str) -> DynamicLayer:
        static, settings = folded(static), plan.settings
        counterpart = handler(static)
        assert counterpart is not None, path
        return counterpart.from_static(
            static,
            k=settings.k,
            reduction=settings.reduction,
            gate=settings.gate,
            start=settings.start,
            spread=settings.spread,
        )

    paths = [site.path for site in plan.chosen]
    put: Callable[[bool], None] = lambda new: None  # noqa: E731
    # What is made in inference mode could never be trained.
    with undisturbed(model, plan.settings.seed), torch.inference_mode(False):
        if plan.settings.as_graph:
            result = rewrite_graphs(duplicate(model), plan.graph.fixed, paths, build, linear=plan.selection.linear)
        elif in_place:
            result, put = graft_in_place(model, paths, build)
        else:
            result = graft(model, paths, build)
    dtype, allowed = tolerance(model)
    try:
        absolute, relative = largest_difference(expected, outputs(result, inputs, modes))
        rounding = 0.0
        if not relative <= allowed and not plan.settings.as_graph:
            # An output may be a choice, such as the boxes that a detector keeps: rounding then makes another one.
            layers = {path: result.get_submodule(path) for path in paths}
            put(False)
            exact = None
            if layers_differ(model, layers, inputs) <= allowed:
                rounding = largest_difference(expected, [rounded(model, paths, inputs)])[1]
                if not relative <= 10 * rounding:
                    exact = in_float64(model, inputs)
            put(True)
            if exact is not None and (found := in_float64(result, inputs)) is not None:
                apart = largest_difference(exact, found)[1]
                rounding = relative if apart <= max(TOLERANCES[torch.float64], 1e-4 * relative) else rounding
        if not relative <= max(allowed, 10 * rounding):
            raise DysurgeryError(
                f"the converted {type(model).__name__} computes something else: its outputs differ by {absolute:.2e} "
                f"({relative:.2e} of the largest; rounding in {dtype} explains {allowed:.0e}); nothing was changed, "
                "narrow it down with --include or --exclude"
            )
        _check_runs(result, plan, in_place)
    except BaseException:
        put(False)
        raise
    return Conversion(result, plan, absolute, relative, rounding)


def _check_fits(plan: Plan, model: nn.Module) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for site in plan.chosen:
        static = model if site.module is None else modules.get(site.module)
        weight = None if static is None else folded(static)._parameters.get("weight")
        if static is None or (site.module is not None and (weight is None or weight.shape != site.weight_shape)):
            raise UsageError(f"the plan was made for another model: {type(model).__name__} has no such {site.path!r}")


Build = Callable[[nn.Module, str], nn.Module]
"""Makes what takes the place of a module, given that and its path: a dynamic layer for a static one, or the reverse."""


def graft(model: nn.Module, paths: Sequence[str], build: Build) -> nn.Module:
    """Return a copy of ``model`` with new layers at ``paths``; ``model`` is left alone.

    Every reference to a replaced module, registered or not, leads to its layer in the copy.
    """
    layers = {id(static := model.get_submodule(path)): (static, build(static, path)) for path in paths}
    memo: dict[int, Any] = {identity: layer for identity, (_, layer) in layers.items()}
    copied = duplicate(model, memo)
    for static, layer in layers.values():
        _carry_over(static, layer, lambda value: copy.deepcopy(value, memo))
    return copied


def graft_in_place(model: nn.Module, paths: Sequence[str], build: Build) -> tuple[nn.Module, Callable[[bool], None]]:
    """Put new layers at ``paths`` of ``model`` itself, under every alias.

    Returns:
        The model, and a function that puts the old modules back (False) or the new layers (True).
    """
    if "" in paths:
        raise UsageError("the model is itself one convolution: it cannot be replaced in place")
    layers = {id(static := model.get_submodule(path)): build(static, path) for path in paths}
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in layers:
                replaced.append((parent, name, child))
                # The very same dictionaries: a handle that the caller keeps still removes its hook.
                _carry_over(child, layers[id(child)], lambda value: value)
                parent._modules[name] = layers[id(child)]

    def put(new: bool) -> None:
        for parent, name, child in replaced:
            parent._modules[name] = layers[id(child)] if new else child

    return model, put


def _carry_over(old: nn.Module, layer: nn.Module, carry: Callable[[Any], Any]) -> None:
    """Give ``layer`` the hooks and the extra attributes of ``old``, each through ``carry``."""
    old = folded(old)
    known = vars(layer).keys() | (old.own_attributes() if isinstance(old, DynamicLayer) else set())
    for name, value in vars(old).items():
        # The flag is of the backward hooks: without it they are never called.
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")) or (
            name not in known and not name.startswith("_")
        ):
            vars(layer)[name] = carry(value)


def rewrite_graphs(
    model: nn.Module, fixed: graphs_of.Fixed, paths: Sequence[str], build: Build, *, linear: bool
) -> nn.Module:
    """Rewrite the nodes at ``paths`` in the graphs of ``model``, which is used up, and return what holds them.

    Args:
        model: a copy that may be changed.
        fixed: for each subtree whose graph computes what it does, the arguments that are constant in it.
        paths: sites as :func:`dysurgery.trace.site_nodes` names them, or modules that no graph shows.
        build: makes the layers.
        linear: whether Linear layers are sites too.

    Raises:
        DysurgeryError: if a graph cannot be right in train and eval alike.
    """
    modes = {path: module.training for path, module in model.named_modules()}
    trained, _ = graphs_of.draw(model.train(), fixed, linear=linear)
    evaluated, _ = graphs_of.draw(model.eval(), fixed, linear=linear)
    for path, module in model.named_modules():
        module.training = modes[path]
    nodes = site_nodes({prefix: drawn for prefix, drawn in evaluated.items() if prefix in fixed}, linear)
    for prefix in dict.fromkeys(nodes[path][0] for path in paths if path in nodes):
        if prefix not in trained:
            raise DysurgeryError(f"{prefix or type(model).__name__} can be traced in eval but not in train mode")
        graphs_of.follow_mode(evaluated[prefix], trained[prefix])
        for path in paths:
            if path in nodes and nodes[path][0] == prefix:
                _replace_node(evaluated[prefix], nodes[path][1], path.removeprefix(f"{prefix}."), build, path)
        # Made anew, it holds what its nodes refer to and nothing else.
        drawn = fx.GraphModule(evaluated[prefix], evaluated[prefix].graph, type(model.get_submodule(prefix)).__name__)
        for path, module in drawn.named_modules():
            module.training = modes.get(join(prefix, path), module.training)
        drawn.meta["dysurgery"] = {"fixed": dict(fixed.get(prefix, {})), "linear": linear}
        if prefix == "":
            model = drawn
        else:
            model.set_submodule(prefix, drawn)
    return graft_in_place(model, [path for path in paths if path not in nodes], build)[0]


def _replace_node(drawn: fx.GraphModule, node: fx.Node, name: str, build: Build, path: str) -> None:
    if node.op == "call_module":
        static = drawn.get_submodule(str(node.target))
        layer = build(static, path)
        _carry_over(static, layer, copy.copy)
        drawn.add_submodule(name, layer)
        node.target = name
        return
    arguments = functional_arguments(node)
    drawn.add_submodule(name, build(_as_module(drawn, UNTRANSPOSED[node.target], arguments), path))
    with drawn.graph.inserting_before(node):
        call = drawn.graph.call_module(name, (arguments["input"],))
    node.replace_all_uses_with(call)
    drawn.graph.erase_node(node)
    for parameter in (arguments["weight"], arguments.get("bias")):
        if parameter is not None and not parameter.users:
            drawn.graph.erase_node(parameter)


def _as_module(drawn: fx.GraphModule, kind: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the module of class ``kind`` that computes what the functional call does, on the same parameters."""
    weight: nn.Parameter = attrgetter(str(arguments["weight"].target))(drawn)
    bias = None if arguments.get("bias") is None else attrgetter(str(arguments["bias"].target))(drawn)
    groups = arguments.get("groups", 1)
    module: nn.Module = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        arguments.get("stride", 1),
        arguments.get("padding", 0),
        arguments.get("dilation", 1),
        groups,
        bias=bias is not None,
        device="meta",
    )
    module.weight = weight
    if bias is not None:
        module.bias = bias
    return module.train(drawn.training)


def _check_runs(result: nn.Module, plan: Plan, in_place: bool) -> None:
    silent = sorted({site.path for site in plan.chosen if site.calls} - layers_that_run(result, plan.example))
    if silent:
        why = (
            "the model holds another reference to the original; convert without in_place"
            if in_place
            else "the copy of the model does not hold them (a __deepcopy__ of its own?)"
        )
        raise DysurgeryError(f"{len(silent)} converted layer(s) are never called ({', '.join(silent[:3])}): {why}")
