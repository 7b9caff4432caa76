"""A dynamic network beside its static counterpart and beside the grouped trick: time, memory and Mult-Adds.

The grouped trick is what others do for kernels per sample: one convolution with ``batch * groups`` groups, and for one
image an ordinary one. All three are measured in turns (:mod:`dysurgery.latency`), each in its best memory layout.
"""

import itertools
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dysurgery.autotune import autotune as tune
from dysurgery.autotune import check_compiled
from dysurgery.cost import cost
from dysurgery.demote import freeze
from dysurgery.errors import DysurgeryError, UsageError, did_you_mean, sentence
from dysurgery.fuse import fuse
from dysurgery.latency import check_seconds, in_turns, no_collection, wait
from dysurgery.layerwise import LAYOUTS, layer_calls, measured_step, twin_of
from dysurgery.nn import DynamicLayer, duplicate
from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.execution import Geometry

BATCHES = (1, 8, 32)
FORMS = ("static", "dynamic", "grouped")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
SLOWEST = 10


@dataclass(frozen=True)
class Measurement:
    """What one step of a network took.

    Attributes:
        layout: a name in :data:`LAYOUTS`.
        ms: the median, in milliseconds.
        quartiles: the first and the third, in milliseconds.
        mb: what must be in memory at once, in MB of 10^6 bytes: parameters, buffers, and what the step allocates at
            its peak, so activations, mixed kernels, gradients and the scratch space that torch hands out. Not what
            libraries take from the system themselves, nor the images.
    """

    layout: str
    ms: float
    quartiles: tuple[float, float]
    mb: float


@dataclass(frozen=True)
class Row:
    """The three forms of a network, measured in turns.

    Attributes:
        mode: ``infer`` or ``train``.
        batch: images at once.
        layout: that all three have, or ``best``: the one that each is fastest in.
        static: the static counterpart.
        dynamic: the dynamic network.
        grouped: the same network with the grouped trick.
    """

    mode: str
    batch: int
    layout: str
    static: Measurement
    dynamic: Measurement
    grouped: Measurement

    @property
    def ratio(self) -> float:
        """Time of the dynamic network relative to the static one."""
        return self.dynamic.ms / self.static.ms

    @property
    def ratio_grouped(self) -> float:
        """Time of the grouped trick relative to the static network."""
        return self.grouped.ms / self.static.ms


@dataclass(frozen=True)
class LayerTime:
    """One dynamic layer alone, on random inputs of the shapes and layout that it sees in the dynamic network.

    Attributes:
        path: of the layer.
        mode: ``infer`` (forward) or ``train`` (forward and backward).
        batch: images at once.
        layout: of its input, a name in :data:`LAYOUTS`.
        way: a name in :data:`dysurgery.nn.execution.WAYS`; empty for a Linear layer.
        static_ms: median in milliseconds of a static layer in its place.
        dynamic_ms: of the layer.
        grouped_ms: of the layer with the grouped trick; None for a Linear layer, which has none.
    """

    path: str
    mode: str
    batch: int
    layout: str
    way: str
    static_ms: float
    dynamic_ms: float
    grouped_ms: float | None


@dataclass(frozen=True)
class Bench:
    """What :func:`bench` found.

    Attributes:
        rows: for each mode and batch.
        layers: the :data:`SLOWEST` of each mode, those that cost most beyond a static one first.
        mult_adds: per image, of the static counterpart and of the dynamic network.
        input_size: (C, H, W) of an image.
        machine: what it was measured on and with: ``device``, its ``name``, ``threads``, ``torch``, ``dtype``,
            ``compile``, ``autotune``.
        notes: what a reader of the figures should know.
    """

    rows: tuple[Row, ...]
    layers: tuple[LayerTime, ...]
    mult_adds: tuple[int, int]
    input_size: tuple[int, ...]
    machine: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the figures as plain values; ``name`` is the network's."""
        mult_adds_ratio = self.mult_adds[1] / max(self.mult_adds[0], 1)
        rows = []
        for row in self.rows:
            found: dict[str, Any] = {"model": name, "mode": row.mode, "batch": row.batch, "layout": row.layout}
            for form in FORMS:
                measured: Measurement = getattr(row, form)
                found |= {
                    f"{form}_ms": measured.ms,
                    f"{form}_quartiles_ms": list(measured.quartiles),
                    f"{form}_layout": measured.layout,
                    f"{form}_mb": measured.mb,
                }
            ratios = {"ratio": row.ratio, "ratio_grouped": row.ratio_grouped, "mult_adds_ratio": mult_adds_ratio}
            rows.append(found | ratios)
        return {
            "model": name,
            "input_size": list(self.input_size),
            "mult_adds": {"static": self.mult_adds[0], "dynamic": self.mult_adds[1]},
            "rows": rows,
            "layers": [asdict(layer) for layer in self.layers],
            "machine": dict(self.machine),
            "notes": list(self.notes),
        }


def bench(
    model: nn.Module,
    input_size: tuple[int, ...],
    *,
    static: nn.Module | None = None,
    batches: Sequence[int] = BATCHES,
    train: bool = False,
    layouts: Sequence[str] = tuple(LAYOUTS),
    same_layout: bool = False,
    layers: bool = True,
    compile: bool = False,
    autotune: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    seconds: float = 3.0,
) -> Bench:
    """Measure a dynamic network, its static counterpart and the grouped trick in turns.

    Inference is in eval mode with every BatchNorm folded that can be, in all three; what :mod:`dysurgery.fuse` does
    beside, to let dynamic layers activate their output, is in the dynamic one alone. A training
    step is forward, backward of the sum of the outputs, and the gradients cleared, without an optimizer. The networks
    are copied, and the copies share the banks; the caller's, the random state and the number of threads stay as they
    were.

    Args:
        model: a converted network that takes one tensor of images.
        input_size: (C, H, W) of an image.
        static: its counterpart; None is ``model`` with every dynamic layer frozen to its mean kernel.
        batches: numbers of images at once.
        train: measure training steps after inference.
        layouts: names in :data:`LAYOUTS`, from which each network may take its best.
        same_layout: also a row for each layout with all three in it.
        layers: also measure each dynamic layer alone, at the largest batch; not with ``compile``, as what is compiled
            for a layer alone is not what runs in the network.
        compile: ``torch.compile`` all of them, anew for each batch.
        autotune: let each dynamic convolution go the way that is fastest here (:func:`dysurgery.autotune`), measured
            first for each mode, batch and layout, in ``seconds`` each; on a CPU not with ``compile``.
        device: where; None is where ``model`` is.
        dtype: to which networks and images are converted, batch statistics and all; None is that of ``model``.
        threads: that torch computes with on a CPU; None is as many as it has.
        seconds: to spend on each mode and batch, and as long on the layers of a mode; at least five rounds.

    Raises:
        UsageError: for a model without dynamic layers, or an option out of range.
        DysurgeryError: if a network does not run like that, or does not fit into memory.
    """
    _check(batches, layouts, threads, seconds)
    layouts = tuple(dict.fromkeys(layouts))
    if not any(isinstance(module, DynamicLayer) for module in model.modules()):
        raise UsageError("the model has no dynamic layer to measure: convert it first (dysurgery.convert)")
    if train and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("there is nothing to train: no parameter of the model requires a gradient")
    like = next(itertools.chain(model.parameters(), model.buffers()))
    setting = _Setting(torch.device(device or like.device), dtype or like.dtype, compile, autotune, seconds)
    check_compiled(setting.device, autotune, compile)
    example = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    static = freeze(model) if static is None else static
    mult_adds = (cost(static, example).mult_adds.total, cost(model, example).mult_adds.total)
    rows: list[Row] = []
    times: list[LayerTime] = []
    notes: list[str] = []
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[setting.device] if setting.device.type == "cuda" else []):
        torch.set_num_threads(threads or before)
        machine = setting.machine()
        try:
            for mode in ("infer", "train") if train else ("infer",):
                pair = {"static": static, "dynamic": model}
                networks = _networks(pair, mode, layouts, setting, example, notes)
                for batch in sorted(set(batches)):
                    with no_collection():
                        found = _measure(networks, mode, _images(batch, input_size, setting), setting)
                    best = {form: min((found[form, each] for each in layouts), key=lambda m: m.ms) for form in FORMS}
                    if len(layouts) > 1:
                        rows.append(Row(mode, batch, "best", **best))
                    if same_layout or len(layouts) == 1:
                        rows += [Row(mode, batch, each, **{f: found[f, each] for f in FORMS}) for each in layouts]
                if layers and not compile:
                    layout = best["dynamic"].layout
                    images = _images(batch, input_size, setting).contiguous(memory_format=LAYOUTS[layout])
                    with no_collection():
                        times += _layer_times(networks["dynamic", layout], mode, images, setting)[:SLOWEST]
                del networks
        finally:
            torch.set_num_threads(before)
    return Bench(tuple(rows), tuple(times), mult_adds, tuple(input_size), machine, tuple(notes))


def choose_grouped(x: Tensor, geometry: Geometry, train: bool = False) -> str:
    """Return the way that is the grouped trick, see :data:`dysurgery.nn.execution.Chooser`."""
    return "single" if x.shape[0] == 1 else "grouped"


@dataclass(frozen=True)
class _Setting:
    """What all measurements have in common."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    autotune: bool
    seconds: float

    def machine(self) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        return {
            "device": str(self.device),
            "name": torch.cuda.get_device_name(self.device) if gpu else _cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": self.compile,
            "autotune": self.autotune,
        }


def _check(batches: Sequence[int], layouts: Sequence[str], threads: int | None, seconds: float) -> None:
    if not batches or min(batches) < 1:
        raise UsageError(f"a batch is 1 image or more, got {', '.join(map(str, batches)) or 'none'}")
    for layout in layouts:
        if layout not in LAYOUTS:
            hint = did_you_mean(layout, LAYOUTS)
            raise UsageError(f"there is no layout {layout!r}{hint}: expected {' or '.join(LAYOUTS)}")
    if not layouts:
        raise UsageError(f"no layout was given: expected {' or '.join(LAYOUTS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"the number of threads is 1 or more, got {threads}")
    check_seconds(seconds)


def _images(batch: int, input_size: tuple[int, ...], setting: _Setting) -> Tensor:
    images = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0))
    return images.to(setting.device, setting.dtype)


def _networks(
    pair: Mapping[str, nn.Module], mode: str, layouts: Sequence[str], setting: _Setting, example: Tensor,
    notes: list[str],
) -> dict[tuple[str, str], nn.Module]:  # fmt: skip
    """Return (form, layout) -> a network of its own whose parameters are shared where they can be."""
    networks: dict[tuple[str, str], nn.Module] = {}
    for form, original in pair.items():
        network = _folded(form, original, example, notes) if mode == "infer" else duplicate(original)
        with _attempt(f"the {form} network", "choose a smaller network"):
            network = network.to(setting.device, setting.dtype).train(mode == "train")
            for layout in layouts:
                # Only weights with four axes have a layout: a bank has two, and all copies share it.
                copied = network if layout == layouts[0] else twin_of(network, lambda tensor: tensor.dim() != 4)
                networks[form, layout] = copied
            for layout in layouts:
                networks[form, layout].to(memory_format=LAYOUTS[layout])
    for layout in layouts:
        networks["grouped", layout] = _with_grouped(networks["dynamic", layout])
    return networks


def _folded(form: str, network: nn.Module, example: Tensor, notes: list[str]) -> nn.Module:
    """Return a copy with its BatchNorms folded, or with those that cannot be, and then with a note."""
    try:
        done = fuse(network, example)
    except DysurgeryError as error:
        notes.append(f"the BatchNorms of the {form} network are measured as they are: {error}")
        return duplicate(network)
    if done.left:
        notes.append(f"in the {form} network {done.reasons()}")
    return done.model


def _with_grouped(network: nn.Module) -> nn.Module:
    twin = twin_of(network)
    for module in twin.modules():
        if isinstance(module, DynamicConvNd):
            module.chooser = choose_grouped
    return twin


def _measure(
    networks: Mapping[tuple[str, str], nn.Module], mode: str, images: Tensor, setting: _Setting
) -> dict[tuple[str, str], Measurement]:
    """Measure one step of every network in turns."""
    if setting.compile:
        torch.compiler.reset()
    steps, memory = {}, {}
    inputs = {layout: images.contiguous(memory_format=LAYOUTS[layout]) for _, layout in networks}
    for layout in inputs if setting.autotune else ():
        tune(networks["dynamic", layout], inputs[layout], train=mode == "train", seconds=setting.seconds)
    for (form, layout), network in networks.items():
        count = f"{len(images)} image{'s' * (len(images) > 1)}"
        what = f"the {form} network ({mode}, {count}, {layout}, {setting.dtype}{', compiled' * setting.compile})"
        # Their classes are the same, and with them the code whose compiled forms would get into each other's way.
        compiler: Any = torch.compile  # whose overloads lack isolate_recompiles
        run = compiler(network, dynamic=False, isolate_recompiles=True) if setting.compile else network
        step = measured_step(mode, network, run, [inputs[layout]])
        with _attempt(what, "choose fewer images (--batch) or a smaller network"):
            step()
            memory[form, layout] = (_held(network) + _peak(step, setting.device)) / 1e6
        steps[form, layout] = step
    times = in_turns(steps, setting.device, seconds=setting.seconds)
    return {
        (form, layout): Measurement(layout, median(found), _quartiles(found), memory[form, layout])
        for (form, layout), found in times.items()
    }


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    first, _, third = quantiles(times, n=4, method="inclusive")
    return first, third


def _held(network: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared ones once."""
    held = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    return sum(tensor.nbytes for tensor in held.values())


def _peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that ``step`` has allocated at once; garbage of before must not be collected meanwhile."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak: int = max(itertools.accumulate((event.nbytes() for event in events), initial=0))
    return peak


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Keep the profiler from telling standard error that it starts and stops."""
    name, most = "KINETO_LOG_LEVEL", "6"  # one above its highest
    before = os.environ.get(name)
    os.environ[name] = before or most
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _layer_times(network: nn.Module, mode: str, images: Tensor, setting: _Setting) -> list[LayerTime]:
    """Measure every dynamic layer alone, its static twin and the grouped trick in turns; the costliest come first."""
    calls = layer_calls(network, measured_step(mode, network, network, [images]))
    found = []
    for path, seen in calls.items():
        layer = network.get_submodule(path)
        assert isinstance(layer, DynamicLayer)
        inputs = [call.inputs() for call in seen]
        layout = seen[0].layout
        forms: dict[str, nn.Module] = {"static": layer.to_static(), "dynamic": layer}
        forms["static"].train(mode == "train").to(memory_format=LAYOUTS[layout])
        if isinstance(layer, DynamicConvNd):
            forms["grouped"] = _with_grouped(layer)
        with _attempt(f"{path} alone", "choose fewer images (--batch) or a smaller network"):
            way = _way(layer, mode, inputs)
            steps = {form: measured_step(mode, twin, twin, inputs) for form, twin in forms.items()}
            times = in_turns(steps, setting.device, seconds=setting.seconds / len(calls))
        each = {form: median(taken) for form, taken in times.items()}
        medians = (each["static"], each["dynamic"], each.get("grouped"))
        found.append(LayerTime(path, mode, len(images), layout, way, *medians))
    return sorted(found, key=lambda layer: layer.static_ms - layer.dynamic_ms)


def _way(layer: DynamicLayer, mode: str, inputs: Sequence[Tensor]) -> str:
    """Return the way that ``layer`` goes for the first input."""
    if not isinstance(layer, DynamicConvNd):
        return ""
    ways, twin, chooser = [], twin_of(layer), layer.chooser

    def note(x: Tensor, geometry: Geometry, train: bool = False) -> str:
        ways.append(chooser(x, geometry, train))
        return ways[-1]

    assert isinstance(twin, DynamicConvNd)
    twin.chooser = note
    measured_step(mode, twin, twin, inputs[:1])()
    return ways[0]


@contextmanager
def _attempt(what: str, smaller: str) -> Iterator[None]:
    """Turn whatever a network raises into one sentence."""
    try:
        yield
    except DysurgeryError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
            raise DysurgeryError(f"{what} does not fit into memory: {smaller}") from error
        raise DysurgeryError(f"{what} cannot be measured: {sentence(error)}") from error


def _cpu_name() -> str:
    """Return the model of the processor, as far as the system tells."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
