"""Does conversion work on every architecture? Each model of timm and torchvision that has a convolution is converted.

    python benchmarks/zoo.py run [NAME ...]    # what results.tsv does not hold yet; goes on; see run --help
    python benchmarks/zoo.py table             # puts results.tsv in order and into the tables of README.md
    python benchmarks/zoo.py cost              # time and memory of a conversion, into README.md

Every model has random weights that are nowhere zero, the smallest input that it accepts, and a process of its own with
a bound on time and memory. What ran into a bound was not judged: it goes to unfinished.tsv. A torchvision model is
named ``torchvision:NAME``.
"""

import argparse
import copy
import csv
import fcntl
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import dysurgery
from dysurgery.errors import DysurgeryError, sentence
from dysurgery.example import Example, batch_size, call_arguments, tensors
from dysurgery.models import rebuild
from dysurgery.nn import DynamicLayer
from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.execution import choose_for_any_batch
from dysurgery.plan import Plan
from dysurgery.source import Source

HERE = Path(__file__).parent / "zoo"
RESULTS, UNFINISHED, MODELS = HERE / "results.tsv", HERE / "unfinished.tsv", HERE / "runs" / "models.json"
TASKS = ("classification", "segmentation", "detection", "optical_flow", "video")
SIZES = (64, 96, 128, 160, 192, 224)
FLOAT32, FLOAT64 = 1e-4, 1e-9  # the largest relative differences that are rounding
SHRINKS = 1e-4  # by which a difference that is rounding shrinks from float32 to float64
FORK = multiprocessing.get_context("fork")


class UnfinishedError(Exception):
    """The model cannot be judged within the bounds."""


@dataclass(frozen=True)
class Entry:
    """A model of the zoo, its parameters and whether it has a convolution."""

    name: str
    family: str
    params: int
    has_conv: bool

    @property
    def task(self) -> str:
        return self.family.rpartition("torchvision-")[2] if self.name.startswith("torchvision:") else "timm"

    @property
    def k(self) -> int:
        return 4 if self.params <= 60e6 else 2


@dataclass
class Subject:
    """A static model, its conversion and what they are called with in eval and train mode."""

    entry: Entry
    folder: Path
    args: dict[str, Any]
    shape: tuple[int, ...]
    strength: float
    static: nn.Module
    example: Example
    training: Example
    plan: Plan = field(init=False)
    dynamic: nn.Module = field(init=False)

    @property
    def layers(self) -> dict[str, DynamicLayer]:
        """Every dynamic layer by each of its paths."""
        modules = self.dynamic.named_modules(remove_duplicate=False)
        return {path: module for path, module in modules if isinstance(module, DynamicLayer)}


# The models and what goes into them


def torchvision_names(task: str) -> list[str]:
    module = "torchvision.models" if task == "classification" else f"torchvision.models.{task}"
    return [f"torchvision:{name}" for name in torchvision.models.list_models(importlib.import_module(module))]


def build(name: str, args: dict[str, Any]) -> nn.Module:
    """Build a model with random weights under a fixed seed."""
    torch.manual_seed(0)
    kind, _, short = name.rpartition(":")
    return rebuild(Source(kind, short, args)).train() if kind else timm.create_model(name, **args)


def builds(name: str, args: dict[str, Any]) -> bool:
    """Whether the factory takes these arguments."""
    try:
        with torch.device("meta"):
            build(name, args)
    except Exception:
        return False
    return True


def count_parameters() -> list[tuple[str, str, int, bool]]:
    """Return the fields of every :class:`Entry`."""
    modules = {name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    families = {name: module.rpartition(".")[2] for name, module in modules.items() if module.startswith("timm.")}
    families |= {name: f"torchvision-{task}" for task in TASKS for name in torchvision_names(task)}
    found = []
    for name, family in families.items():
        try:
            with torch.device("meta"):
                model = build(name, {})
        except Exception:  # it computes while it is built
            model = build(name, {})
        has_conv = any(isinstance(module, _ConvNd) for module in model.modules())
        found.append((name, family, sum(parameter.numel() for parameter in model.parameters()), has_conv))
    return found


def zoo() -> list[Entry]:
    """Return every model, by parameters; they are counted once."""
    versions = [timm.__version__, torchvision.__version__]
    known = json.loads(MODELS.read_text()) if MODELS.exists() else {}
    if known.get("versions") != versions:
        print("counting parameters, which takes minutes", flush=True)
        known = {"versions": versions, "models": bounded(3600, 16, count_parameters)}
        MODELS.parent.mkdir(exist_ok=True)
        MODELS.write_text(json.dumps(known))
    return sorted((Entry(*values) for values in known["models"]), key=lambda entry: entry.params)


def choices(entry: Entry) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Yield arguments of the factory with the shape of an image, the small ones first."""
    accepted = partial(builds, entry.name)
    if entry.task == "timm":
        cfg = timm.get_pretrained_cfg(entry.name) or timm.models.PretrainedCfg()
        channels, default = cfg.input_size[0], cfg.input_size[-1]
        rates = {"drop_rate": 0.1, "drop_path_rate": 0.1}
        drop = next(d for d in (rates, *({key: rates[key]} for key in rates), {}) if not d or accepted(d))
        if cfg.fixed_input_size:
            for size in SIZES:
                if size < default and accepted(args := {**drop, "img_size": size}):
                    yield args, (channels, size, size)
        for size in dict.fromkeys((*SIZES, default)):
            yield drop, (channels, size, size)
    elif entry.task == "detection":
        for threshold, small in itertools.product(("box_score_thresh", "score_thresh"), (True, False)):
            args = {threshold: 0.0} | ({"min_size": 128, "max_size": 192} if small else {})
            if accepted(args):
                yield args, (3, 128, 128)
    elif entry.task == "video":
        yield from (({}, (3, frames, size, size)) for frames, size in ((8, 64), (16, 64), (16, 112), (16, 224)))
    else:
        fixed = {"vit": "image_size", "maxvit": "input_size"}.get(entry.name.split(":")[1].split("_")[0])
        if fixed:
            for size in SIZES:
                if accepted(args := {fixed: [size, size] if fixed == "input_size" else size}):
                    yield args, (3, size, size)
        initialised = {"init_weights": True} if re.search("googlenet|inception", entry.name) else {}
        yield from ((initialised, (3, size, size)) for size in (*SIZES, 299))


def inputs(entry: Entry, shape: tuple[int, ...], seed: int) -> tuple[Example, Example]:
    """Return a random batch of two for eval, and for train mode."""
    generator = torch.Generator().manual_seed(seed)
    if entry.task == "detection":
        _, height, width = shape
        images = [torch.rand(3, height, w, generator=generator) for w in (width, 3 * width // 4)]
        masks, keypoints = torch.zeros(2, height, width, dtype=torch.uint8), torch.ones(2, 17, 3)
        masks[:, 24:64, 32:48] = 1
        keypoints[..., :2] = 32 + 16 * torch.rand(2, 17, 2, generator=generator)
        boxes = torch.tensor([[8.0, 8.0, 56.0, 72.0], [30.0, 20.0, 90.0, 100.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 1]), "keypoints": keypoints}
        return (images,), (images, [{**target, "masks": masks[..., : image.shape[-1]]} for image in images])
    batch = torch.randn(2, *shape, generator=generator)
    example = (batch, batch.flip(0)) if entry.task == "optical_flow" else batch
    return example, example


def perturb(model: nn.Module, strength: float, example: Example) -> nn.Module:
    """Make nothing trivial: fill what is zero or nearly so, and move the statistics of ``example`` a little."""
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.abs().max() < 1e-3:  # such as a layer scale of 1e-6
            last, vector = name.rpartition(".")[2], parameter.dim() == 1
            if not parameter.dim() or re.search("gamma|gain|scale|alpha", last) or (vector and last == "weight"):
                parameter.uniform_(0.5, 1.5).mul_(max(strength, 0.1))
            else:
                parameter.normal_(0, 0.1 * max(strength, 0.1))
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    momenta = [getattr(norm, "momentum", None) for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
        if norm.weight is not None:
            norm.weight.uniform_(1 - 0.5 * strength, 1 + 0.5 * strength)
            norm.bias.normal_(0, 0.1 * strength)
    args, kwargs = call_arguments(example)
    model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        # A channel that hardly varies over two images would be blown up in eval mode.
        norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())
        norm.running_mean += 0.1 * strength * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(1 - 0.5 * strength, 1 + 0.5 * strength)
    return model.eval()


def check_telling(static: nn.Module, example: Example, training: Example) -> None:
    """Raise if the outputs of the static model could not show a difference, or would show any rounding."""
    outputs, trained = call(static, example), call(static, training, train=True)
    found = [tensor for tensor in tensors(outputs) if tensor.is_floating_point() and tensor.numel()]
    batches = [tensor for tensor in found if tensor.dim() > 1 and tensor.shape[0] == 2]
    if not all(tensor.isfinite().all() for tensor in (*found, *tensors(trained))):
        raise FloatingPointError("its output is not finite")
    if all(tensor.max() == tensor.min() for tensor in found):
        raise FloatingPointError("its output is constant")
    if batches and all((t[0] - t[1]).abs().max() <= 1e-2 * t.abs().max() for t in batches):
        raise FloatingPointError("its output does not depend on the input")
    if isinstance(example, Tensor):
        near = example * (1 + 1e-6)
        if max(apart(outputs, call(static, near)), apart(trained, call(static, near, train=True))) > 1e-2:
            raise FloatingPointError("its output hangs on the rounding of the input")


def settle(entry: Entry, folder: Path) -> Subject:
    """Return the static model with the smallest input on which it runs in eval and train mode."""
    why = "no input fits"
    for args, shape in choices(entry):
        for strength in (1.0, 0.3, 0.0):
            try:
                example, training = inputs(entry, shape, seed=0)
                static = perturb(build(entry.name, args), strength, example)
                check_telling(static, example, training)
                return Subject(entry, folder, args, shape, strength, static, example, training)
            except FloatingPointError as error:
                why = f"{error} ({shape[-1]} px)"
            except Exception as error:
                why = why if "px)" in why else sentence(error)
                break
    raise UnfinishedError(f"the static model tells nothing: {why}")


# Running and comparing


class LogicalDropout(TorchFunctionMode):
    """Dropout whose mask does not depend on the memory layout, which is torch's choice and not part of the function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.dropout:
            return func(*args, **kwargs)
        x, p, training, *_ = (
            *args,
            *(kwargs[key] for key in ("p", "training", "inplace")[len(args) - 1 :] if key in kwargs),
        )
        return x * torch.empty(x.shape).bernoulli_(1 - p).to(x.dtype) / (1 - p) if training and p else x


def call(model: nn.Module, example: Example, *, train: bool = False) -> Any:
    """Run the model under a fixed seed; its buffers stay as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    args, kwargs = call_arguments(example)
    torch.manual_seed(0)
    try:
        with LogicalDropout():
            return model.train(train)(*args, **kwargs)
    finally:
        for buffer, value in before:
            buffer.copy_(value)
        model.eval()


def apart(expected: Any, found: Any) -> float:
    """Return the largest difference over all tensors, each relative to its largest value; infinite if no number."""
    left, right = tensors(expected), tensors(found)
    if not left or [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.numel() and not torch.equal(a, b):
            difference = (a.double() - b.double()).abs().max() / a.double().abs().max()
            worst = max(worst, difference.item() if difference.isfinite() else float("inf"))
    return worst


def widened(path: tuple[Any, ...], leaf: Any) -> Any:
    """Return a leaf of an example in float64, except the keypoints, which torchvision takes in float32 only."""
    keypoints = any(getattr(key, "key", None) == "keypoints" for key in path)
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() and not keypoints else leaf


def agree(static: nn.Module, dynamic: nn.Module, use: Callable[[nn.Module, Example], Any], example: Example) -> str:
    """Compare what both give, in float64 too if rounding may explain the difference in float32."""
    relative = apart(use(static, example), use(dynamic, example))
    if relative <= FLOAT32:
        return "ok"
    wide = pytree.tree_map_with_path(widened, example)
    try:
        expected = use(copy.deepcopy(static).double(), wide)
    except Exception as error:
        return f"{relative:.0e} in float32; the static model does not run in float64: {sentence(error)}"
    exact = apart(expected, use(copy.deepcopy(dynamic).double(), wide))
    if exact <= max(FLOAT64, SHRINKS * relative):  # what is wrong is as wrong in float64
        return f"ok ({exact:.0e} in float64; {relative:.0e} in float32)"
    # Mixing K equal kernels rounds each weight once, which a deep network with random weights may amplify as much.
    rounded = copy.deepcopy(static).double()
    for parameter in rounded.parameters():
        parameter *= 1 + 2**-52
    swing = apart(expected, use(rounded, wide))
    if exact <= 10 * swing:
        return f"ok ({exact:.0e} in float64; {swing:.0e} in the static model when its weights are rounded once)"
    return f"{exact:.0e} in float64, {relative:.0e} in float32, {swing:.0e} if weights are rounded once"


# The checks: each returns "ok", "-" where it does not apply, or what is wrong


def check_eval(subject: Subject) -> str:
    """In eval mode the outputs are the same, on an input that the conversion has not seen."""
    return agree(subject.static, subject.dynamic, call, subject.example)


def check_train(subject: Subject) -> str:
    """So they are in train mode, with dropout and drop path, and with the losses of a detector."""
    return agree(subject.static, subject.dynamic, partial(call, train=True), subject.training)


def check_keys(subject: Subject) -> str:
    """Every other key of the state dict has kept its name, place and value; the new ones lie under converted paths."""
    static, dynamic = subject.static.state_dict(), subject.dynamic.state_dict()
    inside = tuple(f"{path}." if path else "" for path in subject.layers)
    kept = [key for key in static if not key.startswith(inside)]
    if [key for key in dynamic if not key.startswith(inside)] != kept:
        return "other keys, or in another order"
    changed = [key for key in kept if not torch.equal(static[key], dynamic[key])]
    return f"changed: {', '.join(changed[:3])}" if changed else "ok"


def check_twice(subject: Subject) -> str:
    """A second conversion finds nothing to do and says so."""
    plan = dysurgery.plan(subject.dynamic, subject.example, k=subject.entry.k, layers="all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dysurgery.convert(subject.dynamic, plan=plan)
    if plan.chosen:
        return f"{len(plan.chosen)} layers chosen again: {plan.chosen[0].path}"
    return "ok" if any("nothing to convert" in str(warning.message) for warning in caught) else "no warning"


def check_saved(subject: Subject) -> str:
    """A deep copy of it is saved; :func:`load_saved` loads it in a fresh process."""
    source = None
    if subject.entry.task != "timm":
        source = Source("torchvision", subject.entry.name.partition(":")[2], subject.args)
    dysurgery.save(copy.deepcopy(subject.dynamic), subject.folder / "model", source=source)
    expected = tensors(call(subject.dynamic, subject.example))
    torch.save((subject.args, subject.example, expected), subject.folder / "expected.pt")
    return "saved"


def load_saved(name: str, folder: Path) -> str:
    """Load what :func:`check_saved` wrote, and compare."""
    args, example, expected = torch.load(folder / "expected.pt")
    alone = json.loads((folder / "model" / "config.json").read_text())["source"] is not None
    model = dysurgery.load(folder / "model", None if alone else build(name, args))
    difference = apart(expected, tensors(call(model, example)))
    if difference > 1e-6:
        return f"{difference:.0e} after loading"
    return "ok" if alone else "ok (built by hand: its source is not known)"


def check_methods(subject: Subject) -> str:
    """The methods of a timm model do what they did, and its features_only variant converts too."""
    if subject.entry.task != "timm":
        return "-"

    def reset(model: nn.Module, x: Tensor) -> Any:
        copied = copy.deepcopy(model)
        torch.manual_seed(0)
        copied.reset_classifier(7)
        output = call(copied.to(x.dtype), x)
        assert 7 in tensors(output)[0].shape
        return output

    def classifier(model: nn.Module, x: Tensor) -> Tensor:
        """Return the place of the classifier among the paths of the static model."""
        paths = [path for path, module in model.named_modules() if module is model.get_classifier()]
        return torch.tensor([path in paths for path, _ in subject.static.named_modules()])

    uses: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        "forward_features": lambda model, x: model.forward_features(x),
        "forward_head": lambda model, x: model.forward_head(model.forward_features(x)),
        "get_classifier": classifier,
        "reset_classifier": reset,
    }
    lacking, verdicts = [], {}
    for name, use in uses.items():
        try:
            use(subject.static, subject.example)
        except Exception:  # the static model has no such method
            lacking.append(name)
            continue
        verdicts[name] = agree(subject.static, subject.dynamic, use, subject.example)
    try:
        features = build(subject.entry.name, {**subject.args, "features_only": True})
        call(perturb(features, subject.strength, subject.example), subject.example)
    except Exception:  # not for this family
        lacking.append("features_only")
    else:
        dynamic = dysurgery.convert(features, subject.example, layers="all", k=subject.entry.k)
        verdicts["features_only"] = agree(features, dynamic, call, subject.example)
    if wrong := [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.startswith("ok")]:
        return "; ".join(wrong)
    return "ok" + (f" (without {', '.join(lacking)})" if lacking else "")


def check_count(subject: Subject) -> str:
    """The report's Mult-Adds, without the pooling, are half of what torch counts."""
    report = dysurgery.cost(subject.dynamic, subject.example).mult_adds
    copied = copy.deepcopy(subject.dynamic).requires_grad_(False)  # torch's counter would look for gradients
    for layer in copied.modules():
        if isinstance(layer, DynamicConvNd):
            layer.chooser = choose_for_any_batch  # plain operations: torch's counter does not see into compiled C
    with FlopCounterMode(display=False) as counter:
        call(copied, subject.example)
    counted = counter.get_total_flops() // 2 // batch_size(subject.dynamic, subject.example)
    ours = report.total - report.pooling
    return "ok" if ours == counted else f"{ours} instead of {counted}"


def check_trains(subject: Subject) -> str:
    """In three steps every parameter of a dynamic layer moves; the first only tells the equal kernels apart."""
    layers = {layer: path for path, layer in subject.layers.items()}
    awake, moved = set[DynamicLayer](), set[nn.Parameter]()
    for layer in layers:

        def listen(_: nn.Module, args: Any, hidden: Tensor, layer: DynamicLayer = layer) -> None:
            if (hidden > 0).any():
                awake.add(layer)

        layer.gate.fc1.register_forward_hook(listen)
    for step in range(3):
        backward(subject.dynamic, subject.training, seed=step)
        for parameter in subject.dynamic.parameters():
            if parameter.grad is None or not parameter.grad.any():
                continue
            if not parameter.grad.isfinite().all():
                return f"a gradient is not finite at step {step + 1}"
            before = parameter.clone()
            # Relative to its own size: a step by sign, such as Adam's, would leave the equal kernels nearly equal.
            size = parameter.grad.double().norm()  # of tiny gradients it would be zero in float32
            parameter -= (1e-3 * (parameter.norm() + 0.1) / size * parameter.grad).to(parameter.dtype)
            if not torch.equal(before, parameter):
                moved.add(parameter)
    backward(subject.static, subject.training, seed=0)
    excuses: Counter[str] = Counter()
    for layer, path in layers.items():
        static = subject.static.get_submodule(path)
        for name, parameter in layer.named_parameters():
            if parameter in moved:
                continue
            own = static.bias if name == "bias_bank" else static.weight
            if own.grad is None or not own.grad.any():
                excuses["without a gradient in the static model"] += 1
            elif name in ("gate.fc1.weight", "gate.fc1.bias", "gate.fc2.weight") and layer not in awake:
                excuses["behind a ReLU that is dead at the start"] += 1
            else:
                return f"{path}.{name} has not moved"
    return "ok" + (f" ({', '.join(f'{count} tensors {why}' for why, count in excuses.items())})" if excuses else "")


def backward(model: nn.Module, example: Example, seed: int) -> None:
    """Leave the gradients of a random projection of the outputs in train mode."""
    model.zero_grad()
    args, kwargs = call_arguments(example)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        outputs = [output for output in tensors(model.train()(*args, **kwargs)) if output.requires_grad]
        torch.stack([(o * torch.randn(o.shape, generator=generator)).sum() for o in outputs]).sum().backward()
    model.eval()


CHECKS: dict[str, Callable[[Subject], str]] = {
    "eval": check_eval,
    "train": check_train,
    "keys": check_keys,
    "twice": check_twice,
    "saved": check_saved,
    "methods": check_methods,
    "count": check_count,
    "trains": check_trains,
}
COLUMNS = ("name", "family", "status", "convs", "converted", "reason", *CHECKS, "params", "input", "k", "seconds")


def examine(
    entry: Entry, folder: Path, tell: Callable[[str], None], checks: Iterable[str] = tuple(CHECKS)
) -> dict[str, Any]:
    """Convert one model and return its row; ``saved`` is still open."""
    tell("building")
    subject = settle(entry, folder)
    convs = sum(isinstance(module, _ConvNd) for module in subject.static.modules())
    text = "x".join(map(str, (2, *subject.shape))) + (
        "" if subject.strength == 1 else f", filled by {subject.strength}"
    )
    row = {"convs": convs, "converted": 0, "reason": "", "params": entry.params, "input": text, "k": entry.k}
    tell("converting")
    try:
        subject.plan = dysurgery.plan(subject.static, subject.example, k=entry.k, layers="all")
        subject.dynamic = dysurgery.convert(subject.static, plan=subject.plan)
    except DysurgeryError as error:
        return row | {"status": "refused", "reason": str(error)}
    except Exception as error:
        return row | {"status": "wrong", "reason": f"convert raised {sentence(error)}"}
    row |= {"status": "ok", "convs": len(subject.plan.sites), "converted": len(subject.plan.chosen)}
    if row["converted"] < row["convs"]:
        row["reason"] = f"static: {subject.plan.reasons()}"
    subject.example, subject.training = inputs(entry, subject.shape, seed=1)
    for name in checks:
        tell(name)
        try:
            row[name] = CHECKS[name](subject)
        except Exception as error:
            row[name] = sentence(error)
    return row


# What a conversion costs

WEIGHED = ("resnet18", "resnet50", "convnext_tiny", "efficientnet_l2")


def weigh(name: str) -> str:
    """Return a row of the table: time and memory of building a model, and of converting it."""

    def peak(work: Callable[[], Any]) -> tuple[Any, float, int]:
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        began = time.process_time()
        result = work()
        return result, time.process_time() - began, memory("VmHWM") - before

    def memory(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    def size(model: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in model.parameters())

    small = timm.create_model("test_resnet").eval()  # the first of everything imports a lot
    dysurgery.convert(small, torch.randn(1, 3, 64, 64))
    model, building, _ = peak(partial(timm.create_model, name))
    example = torch.randn(1, 3, 224, 224)
    model.eval()(example)
    began = time.process_time()
    model(example)
    forward = time.process_time() - began
    dynamic, converting, most = peak(partial(dysurgery.convert, model, example))
    before, after = size(model), size(dynamic)
    return (
        f"| {name} | {before / 2**20:.0f} | {after / 2**20:.0f} | {building:.2f} | {forward:.2f} | {converting:.2f} | "
        f"{converting / building:.1f} | {most / after:.2f} |"
    )


def cost() -> None:
    """Rewrite the table of README.md that says what a conversion costs."""
    columns = ("model", "static, MiB", "dynamic, MiB", "building, CPU s", "a forward, CPU s", "converting, CPU s")
    columns += ("times building", "peak memory, times the dynamic model")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name in WEIGHED:
        lines.append(bounded(3600, 20, weigh, name))
        print(lines[-1], flush=True)
    rewrite("cost", lines)


# Processes, files and tables


def child(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        tell = (lambda stage: sender.send(("stage", stage)),) if function is examine else ()
        with torch.no_grad():
            sender.send(("result", function(*args, *tell)))
    except Exception as error:
        sender.send(("unfinished", str(error)) if isinstance(error, UnfinishedError) else ("error", sentence(error)))


def bounded(timeout: float, memory: float, function: Callable[..., Any], *args: Any) -> Any:
    """Return what the function returns in a process of its own, within so many seconds and GiB.

    Raises:
        UnfinishedError: if it ran into a bound.
        RuntimeError: if it raised, or died.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(sender, function, args))
    process.start()
    sender.close()
    deadline, stage, page = time.monotonic() + timeout, "starting", os.sysconf("SC_PAGE_SIZE")
    try:
        while True:
            if receiver.poll(0.05):
                kind, value = receiver.recv()
                if kind == "result":
                    return value
                if kind == "unfinished":
                    raise UnfinishedError(value)
                if kind == "error":
                    raise RuntimeError(f"{value} while {stage}")
                stage = value
            if time.monotonic() > deadline:
                raise UnfinishedError(f"more than {timeout:g} s (reached: {stage})")
            resident = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
            if int(resident) * page > memory * 2**30:
                raise UnfinishedError(f"more than {memory:g} GiB (reached: {stage})")
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise UnfinishedError(f"killed by the system (reached: {stage})") from None
        raise RuntimeError(f"the process died with exit code {process.exitcode} while {stage}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def attempt(entry: Entry, timeout: float, memory: float) -> dict[str, str]:
    """Return the row of one model.

    Raises:
        UnfinishedError: if it ran into a bound.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = bounded(timeout, memory, examine, entry, Path(folder))
        except RuntimeError as error:
            row = {"status": "wrong", "reason": str(error), "params": entry.params, "k": entry.k}
        if row.get("saved") == "saved":
            try:
                row["saved"] = bounded(timeout, memory, load_saved, entry.name, Path(folder))
            except RuntimeError as error:
                row["saved"] = str(error)
    if wrong := [f"{name}: {row[name]}" for name in CHECKS if not re.match(r"(ok\b|-$)", row.get(name, "-"))]:
        row |= {"status": "wrong", "reason": "; ".join(filter(None, (*wrong, row["reason"])))}
    row |= {"name": entry.name, "family": entry.family, "seconds": f"{time.monotonic() - began:.0f}"}
    return {key: str(value).replace(folder, "FOLDER") for key, value in (dict.fromkeys(CHECKS, "-") | row).items()}


def append(path: Path, row: dict[str, Any], columns: tuple[str, ...]) -> None:
    """Append a row in one piece; of several rows of one model the last counts."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        values = [" ".join(str(row.get(column, "")).split()) for column in columns]
        file.seek(0, os.SEEK_END)
        file.write(("" if file.tell() else "\t".join(columns) + "\n") + "\t".join(values) + "\n")


def read(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


def run(options: argparse.Namespace) -> None:
    """Try the smallest model of each family, then all others by parameters."""
    entries = [entry for entry in zoo() if entry.has_conv and entry.params <= options.max_params * 1e6]
    if unknown := set(options.names) - {entry.name for entry in entries}:
        raise SystemExit(f"unknown, without a convolution or too large: {', '.join(sorted(unknown))}")
    firsts = {entry.family: entry for entry in reversed(entries)}
    entries.sort(key=lambda entry: firsts[entry.family] is not entry)
    entries = [e for e in entries if re.search(options.only, e.name) and e.name in (options.names or [e.name])]
    part, parts = map(int, options.shard.split("/"))
    status = {name: "unfinished" for name in read(UNFINISHED)} | {n: row["status"] for n, row in read(RESULTS).items()}
    todo = [entry for entry in entries[part % parts :: parts] if status.get(entry.name) in (None, options.redo)]
    for number, entry in enumerate(todo, 1):
        try:
            row = attempt(entry, options.timeout, options.memory)
            append(RESULTS, row, COLUMNS)
        except UnfinishedError as error:
            row = {"name": entry.name, "family": entry.family, "params": str(entry.params), "reason": str(error)}
            append(UNFINISHED, row, tuple(row))
        shown = " ".join(row.get(key, "") for key in ("converted", "convs", "input", "seconds", "reason"))
        print(f"{number}/{len(todo)} {entry.name} {row.get('status', 'unfinished')} {shown}", flush=True)


def table() -> None:
    """Put the rows in order, and rewrite the tables of README.md."""
    everything, results = zoo(), read(RESULTS)
    entries = [entry for entry in everything if entry.has_conv]
    rows = {entry.name: results[entry.name] for entry in entries if entry.name in results}
    unfinished = {name: row for name, row in read(UNFINISHED).items() if name not in rows}
    for path, kept in ((RESULTS, rows), (UNFINISHED, unfinished)):
        path.unlink(missing_ok=True)
        for row in kept.values():
            append(path, row, tuple(row))
    families: dict[str, Counter[str]] = {entry.family: Counter() for entry in sorted(entries, key=lambda e: e.family)}
    for entry, name in itertools.product(entries, ("**all**", "")):
        found, row = families.setdefault(name or entry.family, Counter()), rows.get(entry.name)
        found["models"] += 1
        if row:
            found.update({row["status"]: 1, **{key: int(row[key] or 0) for key in ("convs", "converted")}})
        found["unfinished" if entry.name in unfinished else "not tried"] += row is None
    figures = ("models", "ok", "refused", "wrong", "unfinished", "not tried", "convs", "converted")
    lines = [f"| family | {' | '.join(figures)} |", "|" + "---|" * (1 + len(figures))]
    lines += [f"| {name} | {' | '.join(str(found[key]) for key in figures)} |" for name, found in families.items()]
    lines.append(f"\n{len(everything) - len(entries)} more models have no convolution.")
    titles = {"wrong": "Wrong", "refused": "Refused", "unfinished": "Unfinished, so not judged"}
    titles |= {"ok": "Right, with some convolutions left static"}
    for status, title in titles.items():
        names: dict[str, list[str]] = defaultdict(list)
        for name, row in (rows | unfinished).items():
            if row.get("status", "unfinished") == status and row["reason"]:
                names[row["reason"]].append(name)
        if names:
            lines += [f"\n### {title}\n", *(f"- {reason}: {', '.join(each)}" for reason, each in names.items())]
    rewrite("table", lines)


def rewrite(name: str, lines: list[str]) -> None:
    """Put these lines between the marks of that name in README.md."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = (HERE / "README.md").read_text().partition(begin)
    (HERE / "README.md").write_text(before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("names", nargs="*", metavar="NAME")
    runs.add_argument("--max-params", type=float, default=100, help="in millions")
    runs.add_argument("--shard", default="0/1", metavar="I/N", help="every Nth model, from the Ith")
    runs.add_argument("--only", default="", metavar="REGEX")
    runs.add_argument("--timeout", type=float, default=600, help="seconds for one model")
    runs.add_argument("--memory", type=float, default=12, help="GiB for one model")
    runs.add_argument("--redo", metavar="STATUS", help="take these again: ok, refused, wrong or unfinished")
    actions.add_parser("table")
    actions.add_parser("cost")
    options = parser.parse_args()
    match options.action:
        case "run":
            run(options)
        case "table":
            table()
        case "cost":
            cost()


if __name__ == "__main__":
    main()
