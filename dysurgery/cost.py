"""What a model costs: parameters, and Mult-Adds per image (1 Mult-Add = 2 FLOPs), counted while it runs once.

Convolutions, Linear layers, matrix products and scaled dot-product attention are counted as torch's own formulas count
them, wherever they are called from. A dynamic layer is counted by its own formula, whichever way it runs, and its
extra is split into pooling, attention and aggregation (Chen et al., CVPR 2020, section 3). Normalisation, activations
and element-wise arithmetic are not counted.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dysurgery.example import Example, batch_size, first_batch, run, shadow
from dysurgery.nn import DynamicLayer
from dysurgery.trace import kind_of
from dysurgery.watch import Call, is_site


@dataclass(frozen=True)
class MultAdds:
    """Mult-Adds per image.

    Attributes:
        base: what the static network does too: convolutions, Linear layers, matrix products.
        pooling: the mean over each dynamic layer's input, H * W * Cin.
        attention: FC1 and FC2, Cin * hidden + hidden * K.
        aggregation: mixing the bank, K * (weights + biases of one kernel).
    """

    base: int = 0
    pooling: int = 0
    attention: int = 0
    aggregation: int = 0

    @property
    def total(self) -> int:
        """All four."""
        return self.base + self.pooling + self.attention + self.aggregation

    def __add__(self, other: "MultAdds") -> "MultAdds":
        return MultAdds(
            self.base + other.base,
            self.pooling + other.pooling,
            self.attention + other.attention,
            self.aggregation + other.aggregation,
        )

    def __floordiv__(self, count: int) -> "MultAdds":
        return MultAdds(self.base // count, self.pooling // count, self.attention // count, self.aggregation // count)


@dataclass(frozen=True)
class SiteCost:
    """The cost of one convolution: its parameters (once, however often it is called) and Mult-Adds per image."""

    path: str
    kind: str
    dynamic: bool
    params: int
    mult_adds: MultAdds


@dataclass(frozen=True)
class CostReport:
    """The cost of a model.

    Attributes:
        params: number of parameters, shared ones once.
        mult_adds: per image.
        sites: every convolution that ran, in run order.
        input_shape: shape of one image, batch left out; empty if the example holds no batch.
    """

    params: int
    mult_adds: MultAdds
    sites: tuple[SiteCost, ...]
    input_shape: tuple[int, ...]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of ``model``, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def gate_parameters(channels: int, hidden: int, k: int) -> int:
    """Return the parameters of a gate: FC1 and FC2 with their biases."""
    return channels * hidden + hidden + hidden * k + k


def static_mult_adds(weight_shape: tuple[int, ...], calls: Iterable[Call], transposed: bool = False) -> int:
    """Return the Mult-Adds of the calls of a static layer, batch included: positions times weights.

    The positions are those of the output, or of the input if ``transposed``.
    """
    weights = math.prod(weight_shape)
    shapes = [call.input_shape if transposed else call.output_shape for call in calls]
    return sum(math.prod(shape) // weight_shape[0] * weights for shape in shapes)


def dynamic_mult_adds(
    weight_shape: tuple[int, ...],
    biases: int,
    calls: Iterable[Call],
    *,
    channels: int,
    k: int,
    hidden: int,
    transposed: bool = False,
) -> MultAdds:
    """Return the Mult-Adds of the calls of a dynamic layer, batch included.

    Args:
        weight_shape: shape of one kernel.
        biases: number of biases beside one kernel.
        calls: the calls.
        channels: Cin, the width of the pooled descriptor.
        k: number of kernels K.
        hidden: hidden width of the attention.
        transposed: whether it is a transposed convolution.
    """
    calls = tuple(calls)
    per_kernel = math.prod(weight_shape) + biases
    # An input without a batch dimension is one sample; a Linear on (B, Cin) has nothing to pool.
    dims = len(weight_shape)
    samples = sum(call.input_shape[0] if len(call.input_shape) >= dims else 1 for call in calls)
    pooled = sum(math.prod(call.input_shape) for call in calls if dims > 2 or len(call.input_shape) > 2)
    return MultAdds(
        base=static_mult_adds(weight_shape, calls, transposed),
        pooling=pooled,
        attention=samples * (channels * hidden + hidden * k),
        aggregation=samples * k * per_kernel,
    )


def cost(model: nn.Module, example: Example) -> CostReport:
    """Count the parameters of ``model`` and the Mult-Adds of one image, by running it once on ``example``.

    The model is left as it was.

    Raises:
        DysurgeryError: if the model does not run on the example.
    """
    copied = shadow(model)
    counter = _Counter()
    handles = []
    for module in copied.modules():
        if isinstance(module, DynamicLayer) or is_site(module, linear=False):
            handles.append(module.register_forward_pre_hook(counter.enter))
            handles.append(module.register_forward_hook(counter.leave))
    with counter, _plain_attention():
        run(copied, example)
    for handle in handles:
        handle.remove()

    batch = batch_size(model, example)
    total, sites, paths = MultAdds(base=counter.elsewhere), [], {id(m): path for path, m in copied.named_modules()}
    for module, mult_adds in counter.sites.values():
        total += mult_adds
        dynamic = isinstance(module, DynamicLayer)
        params = count_parameters(module)
        sites.append(SiteCost(paths[id(module)], kind_of(module), dynamic, params, mult_adds // batch))
    images = first_batch(model, example)
    shape = () if images is None else tuple(images.shape[1:])
    return CostReport(count_parameters(model), total // batch, tuple(sites), shape)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention from its one operation for inference, for which torch has no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own flop formulas; inside a dynamic layer it holds still and uses the layer's formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elsewhere = 0
        self.sites: dict[int, tuple[nn.Module, MultAdds]] = {}
        self._inside: list[nn.Module] = []
        self._counted: dict[int, int] = defaultdict(int)

    def enter(self, module: nn.Module, args: Any) -> None:
        self._inside.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()
        if isinstance(module, DynamicLayer):
            call = Call(tuple(args[0].shape), tuple(output.shape))
            mult_adds = dynamic_mult_adds(
                module.weight_shape,
                0 if module.bias_bank is None else module.out_channels,
                (call,),
                channels=module.gate.fc1.in_features,
                k=module.k,
                hidden=module.gate.fc1.out_features,
                transposed=module.transposed,
            )
        else:
            mult_adds = MultAdds(base=self._counted.pop(id(module), 0))
        before = self.sites.get(id(module), (module, MultAdds()))[1]
        self.sites[id(module)] = (module, before + mult_adds)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            mult_adds = formula(*args, **kwargs, out_val=output) // 2
            if not self._inside:
                self.elsewhere += mult_adds
            else:
                self._counted[id(self._inside[-1])] += mult_adds
        return output
