"""BatchNorm is folded into the convolution before it, static or dynamic: the same function in eval mode, fewer steps.

A dynamic convolution is told too which activation follows, and which dynamic convolution after that, as compiled C can
do their work while it has the output in registers (:mod:`dysurgery.nn.epilogue`).

Where that may be done is read from the graphs of :mod:`dysurgery.trace`: the output of the convolution must go to that
BatchNorm alone. The result is for inference: what the statistics of a batch would do in training is gone. (Weight norm
and pruning, which :mod:`dysurgery.nn.fold` makes plain, are another matter.)
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from dysurgery.errors import DysurgeryError
from dysurgery.example import Example, run, shadow
from dysurgery.graph import join
from dysurgery.nn import FusedActivation, FusedNorm, duplicate
from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.epilogue import ACTIVATIONS
from dysurgery.nn.links import Link, connect
from dysurgery.nn.norm import NORMS, absorb, layer_refusal, norm_refusal, scale_and_shift
from dysurgery.rewrite import graft, graft_in_place
from dysurgery.trace import ConvSite, trace
from dysurgery.verify import largest_difference, layers_differ, outputs, random_batch, rounded, tolerance


@dataclass(frozen=True)
class Fusion:
    """A model whose BatchNorms are folded, and how far its outputs are from the original's on a random batch.

    Attributes:
        model: the result, in eval mode.
        folded: path of each BatchNorm that is gone -> path of the convolution or Linear that took it in.
        left: path of each other BatchNorm -> why it is still there.
        max_abs_diff: largest absolute difference over all output tensors.
        relative_diff: the same relative to the largest output.
        rounding: see :class:`dysurgery.rewrite.Conversion`.
    """

    model: nn.Module
    folded: Mapping[str, str]
    left: Mapping[str, str]
    max_abs_diff: float
    relative_diff: float
    rounding: float

    def reasons(self) -> str:
        """Return why there is no more to fold, with counts, as one phrase."""
        if self.left:
            reasons = Counter(self.left.values()).most_common()
            return ", ".join(f"{n} BatchNorm{'s stay' if n > 1 else ' stays'} because {why}" for why, n in reasons)
        fused = sum(isinstance(module, FusedNorm) for module in self.model.modules())
        if fused == 1:
            return "its BatchNorm is folded already"
        return f"its {fused} BatchNorms are folded already" if fused else "it has no BatchNorm"


def fuse_bn(model: nn.Module, example: Example, *, in_place: bool = False) -> nn.Module:
    """Return ``model`` with its BatchNorms folded into the convolutions and Linear layers before them.

    The K kernels and biases of a dynamic layer are scaled and shifted, or those of a static one; where there was no
    bias there is one afterwards. In eval mode the outputs are what they were. A BatchNorm stays where that cannot be:
    the layer's output goes elsewhere too, either is called more than once or not at all, the weights pi of the gate do
    not sum to one (sigmoid), the kernels are standardised at each call. :func:`fuse` says which, and why.

    A dynamic convolution is told which activation and which dynamic convolution come next, if its output goes there
    alone: where it runs as one call of compiled C it then does their work, see :mod:`dysurgery.nn.epilogue`. The values
    are the same; a hook on such a layer sees the output as it is, and makes it leave the activation alone.

    Args:
        model: any network, static or converted; its running statistics are what counts.
        example: what it is called with. It decides what goes where, so a forward with several ways is taken by this.
        in_place: change ``model`` itself instead of a copy.

    Returns:
        A network of the same class, in eval mode, for inference.

    Raises:
        DysurgeryError: if the model does not run on the example, or the result would compute something else; the
            model is then left as it was.

    Warns:
        UserWarning: if there is nothing to fold.
    """
    done = fuse(model, example, in_place=in_place)
    if not done.folded:
        warnings.warn(f"nothing to fold in {type(model).__name__}: {done.reasons()}", stacklevel=2)
    return done.model


def fuse(model: nn.Module, example: Example, *, in_place: bool = False) -> Fusion:
    """Do what :func:`fuse_bn` says, and return what was done and what was not."""
    folded, left = _pairs(model, example)
    with torch.inference_mode(False), torch.no_grad():
        result = _put_in(duplicate(model) if in_place else model, folded, in_place)
        links = _links(result, example)
        connect(result, links)
        absolute, relative, rounding = _differences(model, result, folded, example)
        if in_place:
            result = _put_in(model, folded, in_place)
            connect(result, links)
    return Fusion(result, folded, left, absolute, relative, rounding)


def _put_in(model: nn.Module, folded: Mapping[str, str], in_place: bool) -> nn.Module:
    changes = {path: scale_and_shift(model.get_submodule(norm)) for norm, path in folded.items()}
    if in_place:
        result, _ = graft_in_place(model, list(folded), lambda norm, path: FusedNorm(norm))
    else:
        result = graft(model, list(folded), lambda norm, path: FusedNorm(duplicate(norm)))
    for path, (scale, shift) in changes.items():
        absorb(result.get_submodule(path), scale, shift)
    return result.eval()


def _differences(
    model: nn.Module, result: nn.Module, folded: Mapping[str, str], example: Example
) -> tuple[float, float, float]:
    """Compare the outputs of both, and if they are choices, each layer; see :func:`dysurgery.rewrite.carry_out`."""
    if not folded:
        return 0.0, 0.0, 0.0
    inputs = random_batch(model, example, seed=0)
    expected = outputs(model, inputs)
    absolute, relative = largest_difference(expected, outputs(result, inputs))
    (dtype, allowed), rounding = tolerance(model), 0.0
    if not relative <= allowed:
        # FusedNorm comes after the layer in both, so that what timm's BatchNorm does beside is compared too.
        layers: dict[str, nn.Module] = {
            path: nn.Sequential(result.get_submodule(path), result.get_submodule(norm)) for norm, path in folded.items()
        }
        then = {path: model.get_submodule(norm) for norm, path in folded.items()}
        if layers_differ(model, layers, inputs, then) <= allowed:
            rounding = largest_difference(expected, [rounded(model, folded.values(), inputs)])[1]
    if not relative <= max(allowed, 10 * rounding):
        raise DysurgeryError(
            f"the {type(model).__name__} with its BatchNorms folded computes something else: its outputs differ by "
            f"{absolute:.2e} ({relative:.2e} of the largest; rounding in {dtype} explains {allowed:.0e}); nothing was "
            "changed"
        )
    return absolute, relative, rounding


def _pairs(model: nn.Module, example: Example) -> tuple[dict[str, str], dict[str, str]]:
    """Return path of each BatchNorm -> path of the layer that can take it in, and of the others -> why not."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, NORMS)}
    if not norms:
        return {}, {}
    graph = trace(model, example, linear=True)
    calls = _calls(model, example)
    first = {id(module): path for path, module in norms.items()}
    known = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in first}
    sites = {name: site for site in graph.sites if site.module is not None for name in site.names}
    nodes = {
        known[path]: (prefix, node)
        for prefix, drawn in graph.graphs.items()
        for node in drawn.graph.find_nodes(op="call_module")
        if (path := join(prefix, str(node.target))) in known
    }
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    folded, left = {}, {}
    for path, norm in norms.items():
        why, site = norm_refusal(norm), None
        if why is None and calls[path] != 1:
            why = f"it is called {calls[path]} times" if calls[path] else "it is not called on the example"
        if why is None:
            site, why = _before(*nodes[path], sites) if path in nodes else (None, "no graph shows what comes before it")
        if why is None and site is not None:
            layer = model.get_submodule(site.path)
            why = site.refusal or layer_refusal(layer) or _misfit(norm, site)
            if why is None and any(owners[id(p)] > 1 for p in layer._parameters.values() if p is not None):
                why = "the weights of the layer before are tied to another module's"
        if why is None and site is not None:
            folded[path] = site.path
        else:
            left[path] = str(why)
    return folded, left


def _before(prefix: str, node: fx.Node, sites: Mapping[str, ConvSite]) -> tuple[ConvSite | None, str | None]:
    """Return the layer whose output goes into this BatchNorm and nowhere else, or why there is none."""
    (source, *others) = node.all_input_nodes
    site = sites.get(join(prefix, str(source.target))) if source.op == "call_module" else None
    if site is None or others:
        return None, "what comes before it is no convolution"
    if list(source.users) != [node]:
        return None, "the output of the layer before goes elsewhere too"
    if len(site.calls) != 1:
        return None, f"the layer before is called {len(site.calls)} times"
    return site, None


def _misfit(norm: nn.Module, site: ConvSite) -> str | None:
    """BatchNorm1d takes axis 1 for the channels, also of a sequence (B, N, C) or of a sample without a batch."""
    shape = site.calls[0].output_shape
    if len(shape) != len(site.weight_shape) or shape[1] != len(norm.get_buffer("running_mean")):
        return f"the layer before returns {'x'.join(map(str, shape))}, of which axis 1 is not its channels"
    return None


def _links(model: nn.Module, example: Example) -> list[Link]:
    """Return what follows each dynamic convolution whose output goes that way alone."""
    if not any(isinstance(module, DynamicConvNd) for module in model.modules()):
        return []
    graph = trace(model, example)
    layers = {site.path for site in graph.sites if len(site.calls) == 1 and _is_layer(model, site)}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    links: dict[str, Link] = {}
    for prefix, drawn in graph.graphs.items():
        for node in drawn.graph.find_nodes(op="call_module"):
            path = join(prefix, str(node.target))
            act, reader = _next(model, prefix, node, layers, names) if path in layers else (None, None)
            if act is not None or reader is not None:
                links.setdefault(act or path, Link(path, act, reader))  # an activation can know one layer
    return list(links.values())


def _next(
    model: nn.Module, prefix: str, node: fx.Node, layers: Collection[str], names: Mapping[int, int]
) -> tuple[str | None, str | None]:
    """Return the paths of the activation behind a layer and of the dynamic convolution behind that, or None.

    ``names`` is how many paths lead to a module, by its identity.
    """
    act = None
    for following in _following(node):
        path = join(prefix, str(following.target))
        parts = _parts(model.get_submodule(path), path)
        if any(part._forward_hooks or part._forward_pre_hooks or names[id(part)] > 1 for part in parts.values()):
            break
        if path in layers:
            return act, path
        for where, part in parts.items():
            if type(part) in (nn.Identity, FusedNorm):
                continue
            if act is not None or type(part) not in (*ACTIVATIONS, FusedActivation):
                return act, None
            act = where
    return act, None


def _is_layer(model: nn.Module, site: ConvSite) -> bool:
    return site.module == site.path and isinstance(model.get_submodule(site.path), DynamicConvNd)


def _following(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the modules that the output of ``node`` goes through, one after the other and nowhere else."""
    while True:
        (*others, following) = node.users or [None]
        if others or following is None or following.op != "call_module" or following.args != (node,):
            return
        yield following
        node = following


def _parts(module: nn.Module, path: str) -> dict[str, nn.Module]:
    """Return what ``module`` is made of, by path: itself, of a :class:`FusedNorm` its drop and activation too."""
    parts = {path: module}
    if isinstance(module, FusedNorm):
        parts |= {join(path, name): child for name, child in module.named_children()}
    return parts


def _calls(model: nn.Module, example: Example) -> Counter[str]:
    """Count how often each BatchNorm is called on the example."""
    copied, found = shadow(model), Counter[str]()
    for path, module in copied.named_modules():
        if isinstance(module, NORMS):
            module.register_forward_pre_hook(lambda module, args, path=path: found.update([path]))
    run(copied, example)
    return found
