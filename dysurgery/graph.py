"""torch.fx graphs of a model: drawn around its convolutions, measured, and right in train and eval alike.

:class:`ConvTracer` enters every module that holds a convolution and calls everything else as a whole; what raises
while it is traced becomes a leaf, and its children are traced one by one. Called by :mod:`dysurgery.trace` to read
a model, and by :mod:`dysurgery.rewrite` to make a GraphModule.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import timm.layers
from torch import Tensor, fx, nn

from dysurgery.errors import DysurgeryError, sentence
from dysurgery.example import undisturbed
from dysurgery.watch import Arguments, has_site, is_site

Fixed = Mapping[str, Mapping[str, Any]]
"""Path of a module -> the arguments of its forward that are constants in its graph."""


class ConvTracer(fx.Tracer):
    """Goes through every module that holds a site; everything else is a leaf, and so is what raises while traced.

    timm's functions and modules that are registered as not traceable are leaves too.
    """

    def __init__(self, linear: bool = False) -> None:
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self.linear = linear
        self.auto_leaves: dict[str, str] = {}
        self._not_traceable = tuple(timm.layers.get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_site(m, self.linear) or not has_site(m, self.linear):
            return True
        if isinstance(m, self._not_traceable):
            self.auto_leaves[module_qualified_name] = "registered with timm as not traceable"
            return True
        return False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = len(self.graph.nodes), list(self.module_stack.items())
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            # Undo what this module added, and call it as a whole instead: everything outside it stays traced.
            path = self.path_of_module(m)
            self.auto_leaves[path] = sentence(error)
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return self.create_proxy("call_module", path, args, kwargs)


def fixed_arguments(model: nn.Module, arguments: Mapping[str, Arguments]) -> dict[str, dict[str, Any]]:
    """Return, for every module in ``arguments`` by path, the arguments of its forward that its graph takes as constant.

    Those left at their defaults, and those given as plain Python values: on a Proxy, ``mask is not None`` is True.
    """
    fixed = {}
    for path, called in arguments.items():
        module = model.get_submodule(path)
        signature = inspect.signature(type(module).forward)
        bound = signature.bind_partial(module, *called.args, **called.kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        fixed[path] = {
            name: value
            for name, value in list(bound.arguments.items())[1:]
            if signature.parameters[name].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            and (value is None or isinstance(value, bool | int | float | str) or name not in given)
        }
    return fixed


def draw(model: nn.Module, fixed: Fixed, *, linear: bool = False) -> tuple[dict[str, fx.GraphModule], list[str]]:
    """Trace ``model``, and the parts that it hides, into graphs.

    Where the model, or a module in it, cannot be traced, its children are traced one by one ("descent").

    Args:
        model: a copy that may be disturbed (tracing adds constants to it), in the mode that the graph is for.
        fixed: see :func:`fixed_arguments`.
        linear: whether Linear layers are sites too.

    Returns:
        Path of a traced subtree ("" is the model) -> its graph; and a sentence for each module not gone through.
    """
    graphs: dict[str, fx.GraphModule] = {}
    notes: list[str] = []

    def enter(path: str) -> None:
        module, tracer = model.get_submodule(path), ConvTracer(linear)
        if path in graphs or is_site(module, linear) or not has_site(module, linear):
            return
        if type(module).forward is nn.Module.forward:  # a ModuleList or the like is no code to trace
            descend(path)
            return
        try:
            graphs[path] = _trace(tracer, module, fixed.get(path, {}))
        except Exception as error:
            notes.append(f"{path or 'the model'} ({type(module).__name__}) is not traced: {sentence(error)}")
            descend(path)
            return
        for leaf, why in tracer.auto_leaves.items():
            full = join(path, leaf)
            notes.append(f"{full} ({type(model.get_submodule(full)).__name__}) is called as a whole: {why}")
            descend(full)

    def descend(path: str) -> None:
        for name, _ in model.get_submodule(path).named_children():
            enter(join(path, name))

    enter("")
    return graphs, notes


def _trace(tracer: ConvTracer, module: nn.Module, fixed: Mapping[str, Any]) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the constants in ``fixed``, which are meant
        graph = tracer.trace(module, dict(fixed) or None)
        # fx renames a parameter that it has made constant (mask -> mask_1): give callers the name they know.
        for node in graph.find_nodes(op="placeholder"):
            name = str(node.target).rpartition("_")[0]
            if name in fixed:
                node.target = name
        drawn = fx.GraphModule(module, graph, type(module).__name__)
    # The containers between the root and the leaves are new: give them the mode of those they stand for.
    for path, inner in drawn.named_modules():
        inner.training = module.get_submodule(path).training
    return drawn


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def measure(drawn: fx.GraphModule, arguments: Arguments) -> None:
    """Run the graph once, on zeros, and note every tensor's shape in ``node.meta["shape"]``.

    Raises:
        DysurgeryError: if the graph does not run: it is not the model's.
    """
    args, kwargs = arguments.zeros()
    names = [str(node.target) for node in drawn.graph.find_nodes(op="placeholder")]
    try:
        with undisturbed(drawn):
            _Shapes(drawn).run(*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
    except Exception as error:
        raise DysurgeryError(sentence(error)) from error


def by_mode(training: bool, if_training: Any, otherwise: Any) -> Any:
    """Return one of two constants; a graph's node where forward reads ``self.training``."""
    return if_training if training else otherwise


def follow_mode(evaluated: fx.GraphModule, trained: fx.GraphModule) -> None:
    """Make ``evaluated`` right in both modes, in place: ``self.training`` is a constant to the tracer.

    Where the two graphs of the same module, traced in eval and in train mode, have different constants, a node
    chooses by the ``training`` flag of the module that the code belongs to.

    Raises:
        DysurgeryError: if they differ in more than constants.
    """
    nodes, others = list(evaluated.graph.nodes), list(trained.graph.nodes)
    if [(n.op, n.target) for n in nodes] != [(n.op, n.target) for n in others]:
        raise DysurgeryError(
            f"{type(evaluated).__name__} does other things in train than in eval mode, which one graph cannot express: "
            "convert it without as_graph"
        )
    for node, other in zip(nodes, others, strict=True):
        node.args = tuple(_choose(evaluated, node, a, b) for a, b in zip(node.args, other.args, strict=True))
        node.kwargs = {key: _choose(evaluated, node, node.kwargs[key], other.kwargs[key]) for key in node.kwargs}
    evaluated.recompile()


def _choose(drawn: fx.GraphModule, node: fx.Node, otherwise: Any, if_training: Any) -> Any:
    if isinstance(otherwise, tuple | list) and len(otherwise) == len(if_training):
        pairs = zip(otherwise, if_training, strict=True)
        return type(otherwise)(_choose(drawn, node, a, b) for a, b in pairs)
    if isinstance(otherwise, fx.Node) or otherwise == if_training:
        return otherwise
    stack = list(node.meta.get("nn_module_stack", {}).values())
    owner = stack[-1][0] if stack else ""
    with drawn.graph.inserting_before(node), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # get_attr of something that is no tensor
        flag = drawn.graph.get_attr(join(owner, "training"))
        return drawn.graph.call_function(by_mode, (flag, if_training, otherwise))


def is_global_pool(node: fx.Node) -> bool:
    """Whether ``node`` turns a map (B, C, H, W) into one value per channel: (B, C) or (B, C, 1, 1)."""
    shape, inputs = node.meta.get("shape", ()), node.all_input_nodes
    source: tuple[int, ...] = inputs[0].meta.get("shape", ()) if len(inputs) == 1 else ()
    if len(source) != 4 or source[2] * source[3] == 1 or shape[:2] != source[:2]:
        return False
    return all(size == 1 for size in shape[2:])


def join(prefix: str, name: str) -> str:
    """Return the path of ``name`` in the module at ``prefix``."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
