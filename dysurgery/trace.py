"""A model and an example become a :class:`ConvGraph`: every convolution with its shapes, in run order.

A watched run (:mod:`dysurgery.watch`) finds the convolutions, a conv-aware tracer (:mod:`dysurgery.graph`) draws the
graphs around them; here the two are put together into sites. Called by :mod:`dysurgery.plan`; knows nothing of the
operator beyond what it can replace.
"""

import dataclasses
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dysurgery import graph as graphs_of
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.example import Example, batch_size, called, numbers, run, shadow, tensors, undisturbed
from dysurgery.graph import join
from dysurgery.nn import DynamicLayer, folded, handler, refusal
from dysurgery.watch import FUNCTIONAL, Call, Record, is_site, watch


@dataclass(frozen=True)
class ConvSite:
    """One convolution (or Linear) of the model.

    Attributes:
        path: where it stands, and where its dynamic layer will stand. For a functional call, the graph node's name;
            for one of several calls of a module, ``<module>_call<n>``.
        module: path of the module that is called; None for a functional call.
        aliases: the other paths of the same module.
        kind: ``dense``, ``pointwise``, ``depthwise`` or ``linear``.
        operation: class or function name.
        weight_shape: (Cout, Cin/groups, *kernel_size), (Cin, Cout/groups, *kernel_size) if transposed, or (Cout, Cin).
        channels: Cin.
        biases: number of its biases, Cout or 0.
        calls: the calls on the example, in order; empty if it never ran.
        dynamic: whether it is a dynamic layer already.
        refusal: why it cannot be replaced, or None.
        transposed: whether it is a transposed convolution.
        kept: number of its parameters that are neither weight nor bias, and that its dynamic layer keeps.
    """

    path: str
    module: str | None
    aliases: tuple[str, ...]
    kind: str
    operation: str
    weight_shape: tuple[int, ...]
    channels: int
    biases: int
    calls: tuple[Call, ...]
    dynamic: bool = False
    refusal: str | None = None
    transposed: bool = False
    kept: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The path and all aliases."""
        return (self.path, *self.aliases)

    @property
    def sees_one_pixel(self) -> bool:
        """Whether every call has a 1x1 map as its input."""
        axes = len(self.weight_shape) - 2
        return axes > 0 and all(set(call.input_shape[-axes:]) == {1} for call in self.calls)


@dataclass(frozen=True)
class ConvGraph:
    """All convolutions of a model, and the graphs around them.

    Attributes:
        sites: in run order; those that never ran come last.
        graphs: path of a traced subtree ("" is the model) -> its graph, with shapes in ``node.meta["shape"]``.
        fixed: the arguments that those graphs take as constant, see :func:`dysurgery.graph.fixed_arguments`.
        notes: what the tracer could not go through, one sentence each.
        batch: number of images in the example.
    """

    sites: tuple[ConvSite, ...]
    graphs: Mapping[str, fx.GraphModule]
    fixed: graphs_of.Fixed
    notes: tuple[str, ...]
    batch: int


def trace(
    model: nn.Module, example: Example, *, linear: bool = False, as_graph: bool = False, fold: bool = False
) -> ConvGraph:
    """Find every convolution of ``model``, with its shapes on ``example``.

    The model, its mode, its buffers and the random state are left as they were.

    Args:
        model: any network; it runs in eval mode, and once in train mode to see who reads its weights.
        example: what it is called with.
        linear: whether Linear layers are sites too.
        as_graph: whether each call of a shared module, and each functional convolution, is a site of its own:
            only a graph can replace those.
        fold: whether reparametrised modules may be folded, see :func:`dysurgery.nn.folded`.

    Raises:
        UsageError: for an example of the wrong type, or a model that is compiled, scripted or wrapped.
        DysurgeryError: if the model does not run on the example, or cannot be copied.
    """
    _check_traceable(model)
    copied = shadow(model)
    with called() as ran:
        record = watch(copied, example, linear)
    if stray := [path or type(module).__name__ for path, module in model.named_modules() if id(module) in ran]:
        raise DysurgeryError(
            f"a copy of {type(model).__name__} still calls the original ({', '.join(stray[:3])}), through a lambda, a "
            "closure or a method set on the instance: make that an ordinary method"
        )
    record.read_elsewhere |= {id(copied.get_submodule(path)) for path in _read_in_training(model, example, linear)}
    arguments = record.arguments
    fixed = graphs_of.fixed_arguments(copied, arguments)
    # Drawn with another seed than it runs with: a random number that became a constant then shows as a difference.
    with undisturbed(copied, seed=1):
        graphs, notes = graphs_of.draw(copied, fixed, linear=linear)
    for path, drawn in list(graphs.items()):
        try:
            if path in arguments:
                graphs_of.measure(drawn, arguments[path])
            if path == "" and not _same_outputs(run(drawn, example), record.output):
                raise DysurgeryError("it takes another way than the model (control flow on its inputs)")
        except DysurgeryError as error:
            del graphs[path]
            notes.append(f"the graph of {path or 'the model'} cannot be used: {error}")
    functional = list(_functional_nodes(graphs))
    if record.functional_calls > len(functional):
        hidden = record.functional_calls - len(functional)
        notes.append(f"{hidden} call(s) of a functional convolution are inside modules that are called as a whole")
    sites = _module_sites(copied, record, graphs, linear, as_graph, fold)
    for path, prefix, node in functional:
        _insert(sites, _functional_site(path, graphs[prefix], node, as_graph), node, prefix)
    kept = {path: fixed.get(path, {}) for path in graphs}
    return ConvGraph(tuple(sites), graphs, kept, tuple(notes), batch_size(model, example))


def _check_traceable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("the model is scripted (torch.jit): convert the Python model, then script it")
    if "_orig_mod" in model._modules:
        raise UsageError("the model is compiled: convert model._orig_mod, then compile the result")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UsageError(f"the model is wrapped in {type(model).__name__}: convert model.module, then wrap the result")


def _read_in_training(model: nn.Module, example: Example, linear: bool) -> set[str]:
    """Return the sites whose weight is read outside their own call in train mode."""
    copied = shadow(model).train()
    try:
        record = watch(copied, example, linear)
    except DysurgeryError:  # detectors want targets then
        return set()
    return {path for path, module in copied.named_modules() if id(module) in record.read_elsewhere}


def _same_outputs(a: Any, b: Any) -> bool:
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(
        x.shape == y.shape
        and (x.is_meta or torch.allclose(numbers(x), numbers(y), rtol=1e-3, atol=1e-3, equal_nan=True))
        for x, y in zip(left, right, strict=True)
    )


UNTRANSPOSED: dict[Any, type[nn.Module]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
"""The functional convolutions that a graph can replace, and the module that computes the same."""


def site_nodes(graphs: Mapping[str, fx.GraphModule], linear: bool) -> dict[str, tuple[str, fx.Node]]:
    """Return, in graph order, path of a site with ``as_graph`` -> (path of its graph, its node)."""
    found: dict[str, tuple[str, fx.Node]] = {}
    for prefix, drawn in graphs.items():
        modules = dict(drawn.named_modules(remove_duplicate=False))
        nodes = [n for n in drawn.graph.find_nodes(op="call_module") if is_site(modules[str(n.target)], linear)]
        times = Counter(id(modules[str(node.target)]) for node in nodes)
        seen: Counter[int] = Counter()
        for node in nodes:
            identity, path = id(modules[str(node.target)]), join(prefix, str(node.target))
            seen[identity] += 1
            found[path if times[identity] == 1 else f"{path}_call{seen[identity]}"] = (prefix, node)
    return found | {path: (prefix, node) for path, prefix, node in _functional_nodes(graphs)}


def functional_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a functional convolution's node by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _functional_nodes(graphs: Mapping[str, fx.GraphModule]) -> Iterator[tuple[str, str, fx.Node]]:
    for prefix, drawn in graphs.items():
        for node in drawn.graph.nodes:
            if node.op == "call_function" and node.target in FUNCTIONAL:
                yield join(prefix, node.name), prefix, node


def _module_sites(
    model: nn.Module, record: Record, graphs: Mapping[str, fx.GraphModule], linear: bool, as_graph: bool, fold: bool
) -> list[ConvSite]:
    names: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    dynamic = [module for module in model.modules() if isinstance(module, DynamicLayer)]
    inner = {id(part) for layer in dynamic for part in layer.modules() if part is not layer}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_site(module, linear) and id(module) not in inner:
            names[id(module)].append(path)
            modules[id(module)] = module
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    nodes_of: dict[str, list[str]] = defaultdict(list)
    if as_graph:
        for path, (prefix, node) in site_nodes(graphs, linear).items():
            if node.op == "call_module":
                nodes_of[join(prefix, str(node.target))].append(path)

    sites: list[ConvSite] = []
    ran = {identity: position for position, identity in enumerate(record.calls)}
    for identity in sorted(modules, key=lambda identity: ran.get(identity, len(ran))):
        module, paths, calls = modules[identity], names[identity], record.calls.get(identity, [])
        site = ConvSite(
            path=paths[0],
            module=paths[0],
            aliases=tuple(paths[1:]),
            kind=kind_of(module),
            operation=type(module).__name__,
            weight_shape=_weight_shape(module),
            channels=_channels(module),
            biases=_biases(module),
            calls=tuple(calls),
            dynamic=isinstance(module, DynamicLayer),
            refusal=_refusal(module, fold, identity in record.read_elsewhere, owners),
            transposed=bool(getattr(module, "transposed", False)),
            kept=sum(module.get_parameter(name).numel() for name in _kept(module)),
        )
        call_paths = [path for name in paths for path in nodes_of[name]]
        if len(call_paths) == len(calls) > 1:
            sites += [
                dataclasses.replace(site, path=path, aliases=(), calls=(call,))
                for path, call in zip(call_paths, calls, strict=True)
            ]
        else:
            sites.append(site)
    return sites


def _refusal(module: nn.Module, fold: bool, read_elsewhere: bool, owners: Counter[int]) -> str | None:
    if isinstance(module, DynamicLayer):
        return None
    plain = folded(module) if fold else module
    why = refusal(plain)
    if why is None and read_elsewhere:
        why = "its weight or bias is read outside its own call"
    if why is None and any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
        why = "its weight or bias is tied to another module's"
    known = {"weight", "bias", *_kept(plain)}
    if why is None and (plain._modules or plain._buffers or plain._parameters.keys() - known):
        why = "it holds parameters, buffers or modules beside its weight and bias"
    if why is None and (plain._state_dict_hooks or plain._load_state_dict_pre_hooks):
        why = "it has state_dict hooks, which are about the keys of its weight and bias"
    return why


def _kept(module: nn.Module) -> tuple[str, ...]:
    counterpart = handler(module)
    return () if counterpart is None else counterpart.kept


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, DynamicLayer):
        return module.weight_shape
    weight: Any = module.weight
    return () if isinstance(weight, nn.parameter.UninitializedParameter) else tuple(weight.shape)


def _channels(module: nn.Module) -> int:
    return int(getattr(module, "in_channels", getattr(module, "in_features", 0)))


def _biases(module: nn.Module) -> int:
    if isinstance(module, DynamicLayer):
        return 0 if module.bias_bank is None else module.out_channels
    bias = getattr(module, "bias", None)
    return 0 if bias is None else int(getattr(module, "out_channels", getattr(module, "out_features", 0)))


def kind_of(module: nn.Module) -> str:
    """Return ``linear``, ``depthwise`` (one input channel per group), ``pointwise`` (1x1) or ``dense`` (the rest)."""
    return _kind(_weight_shape(module), getattr(module, "groups", 1), _channels(module))


def _kind(weight_shape: tuple[int, ...], groups: int, channels: int) -> str:
    if len(weight_shape) == 2:
        return "linear"
    if groups == channels > 1:
        return "depthwise"
    return "pointwise" if set(weight_shape[2:]) == {1} else "dense"


def _functional_site(path: str, drawn: fx.GraphModule, node: fx.Node, as_graph: bool) -> ConvSite:
    arguments = functional_arguments(node)
    weight, bias = arguments["weight"], arguments.get("bias")
    shape = weight.meta.get("shape", ()) if isinstance(weight, fx.Node) else ()
    source = arguments["input"].meta.get("shape", ())
    channels = source[1] if len(source) > 1 else 0
    why = None
    if node.target not in UNTRANSPOSED:
        why = f"no handler for torch.nn.functional.{getattr(node.target, '__name__', node.target)}"
    elif not (_is_parameter(drawn, weight) and (bias is None or _is_parameter(drawn, bias))):
        why = "its weight is computed in forward, or no parameter"
    elif len(weight.users) > 1:
        why = "its weight is read outside its own call"
    elif not as_graph:
        why = "functional call: only a graph can replace it (as_graph=True)"
    biases = shape[0] if shape and bias is not None else 0
    calls = (Call(source, node.meta["shape"]),) if source and "shape" in node.meta else ()
    kind = _kind(shape, arguments.get("groups", 1), channels)
    return ConvSite(path, None, (), kind, "functional", shape, channels, biases, calls, refusal=why)


def _is_parameter(drawn: fx.GraphModule, node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    return isinstance(operator.attrgetter(str(node.target))(drawn), nn.Parameter)


def _insert(sites: list[ConvSite], site: ConvSite, node: fx.Node, prefix: str) -> None:
    """Insert a functional site after the last site that stands before it in the graph."""
    earlier = list(itertools.takewhile(lambda n: n is not node, node.graph.nodes))
    before = {join(prefix, str(n.target) if n.op == "call_module" else n.name) for n in earlier}
    places = [i for i, s in enumerate(sites) if s.calls and (s.module in before or s.path in before)]
    sites.insert(places[-1] + 1 if places else 0, site)
