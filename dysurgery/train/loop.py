"""One training run: a model, its data and how to train it; out comes its accuracy after every epoch.

The parts are timm's: task, optimizer, schedule, moving average, mixup, gradient scaling and clipping, evaluator. What
is here is their order, and that the run can stop between any two steps and go on. All that is random in a step is
seeded by the step's number, and tau is a function of it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import Subset

from dysurgery.autotune import autotune, set_ways, ways_of
from dysurgery.errors import DysurgeryError, UsageError, sentence
from dysurgery.nn import DynamicLayer, set_temperature
from dysurgery.train.attention import attention_statistics
from dysurgery.train.data import Batches, Data, seed_generators, spread_images, train_loader, val_loader, worker_errors
from dysurgery.train.groups import BankRates, freeze, parameter_groups
from dysurgery.train.head import outputs_of
from dysurgery.train.processes import Processes
from dysurgery.train.recipe import Augment, Distill, Temperature, Training
from dysurgery.train.state import read_state, write_state

VAL_BATCH = 256
STATISTICS_IMAGES = 512


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        phase: which of the runs of an experiment.
        seed: of the run.
        number: from 1 to ``of``.
        of: number of epochs.
        loss: mean training loss over its steps.
        accuracy: on the validation images, percent; of the moving average if there is one.
        val_loss: cross-entropy on them, nats.
        lr: learning rate of its last step, of the parameters without a factor.
        tau: temperature of its last step; None for a static network.
        entropy: of pi, mean over layers, see :class:`dysurgery.train.attention.AttentionStatistics`; None if static.
        spread: of pi over images, mean over layers; None if static.
        seconds: that the epoch took.
        images_per_second: of training.
    """

    phase: str
    seed: int
    number: int
    of: int
    loss: float
    accuracy: float
    val_loss: float
    lr: float
    tau: float | None
    entropy: float | None
    spread: float | None
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Step:
    """Where a run is, after an optimizer step.

    Attributes:
        phase, seed: of the run.
        number: of the step, from 1 to ``of``.
        of: steps of the whole run.
        epoch: the epoch that it belongs to, from 1.
        loss: of this step.
        accuracy: after the last epoch, percent; None before the first.
        lr, tau: of this step.
        images_per_second: so far in this epoch.
    """

    phase: str
    seed: int
    number: int
    of: int
    epoch: int
    loss: float
    accuracy: float | None
    lr: float
    tau: float | None
    images_per_second: float


class Observer:
    """Is told how a run goes on; what it does with it is its own business. Only the first process tells."""

    def on_start(self, phase: str, seed: int, done: Sequence[Epoch], steps: int) -> None:
        """When a phase begins or goes on, after the epochs ``done`` of it; ``steps`` is how many the whole has."""

    def on_step(self, step: Step) -> None:
        """After every optimizer step."""

    def on_epoch(self, epoch: Epoch) -> None:
        """After every epoch and its validation."""


class Interrupted(DysurgeryError):  # noqa: N818
    """The run was asked to stop, and has saved its state if it has a folder."""


@dataclass
class Job:
    """One training run to be done.

    Attributes:
        model: is trained in place; on ``processes.device`` afterwards.
        data: what on.
        preprocessing: of images, as timm understands it.
        how: epochs, optimizer and so on.
        augment: of the training images.
        phase: a name for its epochs.
        seed: of order, augmentation, dropout; two models with the same seed see the same batches.
        temperature: sets tau before every step; None leaves it alone.
        distill: with ``teacher``, adds timm's logit distillation.
        teacher: the network to learn from.
        processes: of which this is one.
        folder: for its state; None keeps none.
        save_seconds: between states within an epoch; 0 saves after every step.
        asked_to_stop: is called between steps.
        observer: is told how it goes.
    """

    model: nn.Module
    data: Data
    preprocessing: dict[str, Any]
    how: Training
    augment: Augment
    phase: str
    seed: int
    temperature: Temperature | None = None
    distill: Distill | None = None
    teacher: nn.Module | None = None
    processes: Processes = field(default_factory=lambda: Processes(torch.device("cpu")))
    folder: Path | None = None
    save_seconds: float = 300.0
    asked_to_stop: Callable[[], bool] = lambda: False
    observer: Observer = field(default_factory=Observer)


def train(job: Job) -> tuple[list[Epoch], nn.Module]:
    """Carry out ``job``, from its last state if its folder holds one.

    Returns:
        Every epoch, and the trained network in eval mode: ``job.model``, or its moving average.

    Raises:
        DysurgeryError: if the loss is not finite (it names the step, lr and tau), memory is short, or an image cannot
            be read; the last state is kept.
        Interrupted: if it was asked to stop.
    """
    return _Run(job).finish()


class _Run:
    """The moving parts of a job, built once, and the state that they are in."""

    def __init__(self, job: Job) -> None:
        self.job = job
        how, processes = job.how, job.processes
        size = len(job.data.train)  # type: ignore[arg-type]
        self.batches = Batches(size, how.batch_size, how.accumulate, job.seed, processes.rank, processes.world)
        self.steps = self.batches.steps
        self.loader = train_loader(
            job.data, job.preprocessing, job.augment, self.batches, how.workers, processes.device
        )
        self.val = val_loader(
            job.data.val, job.preprocessing, VAL_BATCH, how.workers, processes.device, processes.rank, processes.world
        )
        self.amp = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[how.amp]
        self.layout = torch.channels_last if how.channels_last else torch.contiguous_format
        self.model = job.model.to(processes.device).to(memory_format=self.layout)
        freeze(self.model, how.train)
        groups = parameter_groups(
            self.model, how.opt, how.lr, how.weight_decay, bank_lr=how.bank_lr, attention_lr=how.attention_lr,
            attention_weight_decay=how.attention_weight_decay,
        )  # fmt: skip
        self.optimizer = _optimizer(groups, how)
        self.bank_rates = BankRates(self.model, self.optimizer, processes.sum)
        self.factor = groups[0]["lr"] / how.lr if how.lr else 1.0
        self.scheduler = _scheduler(self.optimizer, how, self.steps)
        self.scaler = NativeScaler(device=processes.device.type) if how.amp == "fp16" else None
        erase = job.augment.random_erasing
        self.erase = RandomErasing(erase, mode="pixel", device=processes.device) if erase else None
        self.classes = _outputs(self.model, job, self.layout)
        self.mixup = _mixup(job.augment, how, self.classes)
        self.task = self._task()
        self.dynamic = any(isinstance(module, DynamicLayer) for module in self.model.modules())

        self.step = 0
        self.loss_sum = 0.0
        self.epoch_seconds = 0.0
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None  # tensors of the best epoch, if that is the one to keep
        self.saved_at = time.monotonic()

    def _task(self) -> Any:
        job, how, processes = self.job, self.job.how, self.job.processes
        many = processes.world > 1
        if many and processes.device.type != "cpu":  # torch has no SyncBatchNorm for CPUs
            self.model = convert_sync_batchnorm(self.model)
        loss = {"smoothing": how.label_smoothing} if self.mixup is None else {"soft_targets": True}
        common = {"criterion_kwargs": loss, "device": processes.device, "verbose": False}
        if job.distill is not None and job.teacher is not None:
            teacher = job.teacher.to(processes.device).to(memory_format=self.layout).requires_grad_(False)
            network: Any
            for network in (self.model, teacher):  # timm's task reads these off its own models
                cfg = getattr(network, "pretrained_cfg", None)
                mean, std = tuple(job.preprocessing["mean"]), tuple(job.preprocessing["std"])
                network.pretrained_cfg = {**(cfg if isinstance(cfg, dict) else {}), "mean": mean, "std": std}
                network.num_classes, network.in_chans = self.classes, job.preprocessing["input_size"][0]
            task = LogitDistillationTask(
                self.model,
                teacher,
                distill_loss_weight=job.distill.weight,
                task_loss_weight=job.distill.task_weight if job.distill.labels else 0.0,
                temperature=job.distill.temperature,
                **common,
            )
        else:
            task = ClassificationTask(self.model, **common)
        if how.ema_decay:
            task.setup_ema(decay=how.ema_decay, use_warmup=how.ema_warmup)
        if how.compile:
            task.compile()
        if many:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            task.prepare_distributed(device_ids=ids)
        return task

    def finish(self) -> tuple[list[Epoch], nn.Module]:
        """Go on from the last state to the last epoch."""
        job = self.job
        if job.folder is not None and (state := read_state(job.folder)) is not None:
            self._load(state, job.folder)
        else:
            if job.how.autotune and self.dynamic:
                self._autotune()
            if job.folder is not None:
                self._save()
        if job.processes.first:
            job.observer.on_start(job.phase, job.seed, tuple(self.history), job.how.epochs * self.steps)
        try:
            with _sentences(job):
                while len(self.history) < job.how.epochs:
                    self._epoch()
        finally:
            self.bank_rates.close()
        if self.best is not None:
            self._kept().load_state_dict(self.best)
        return self.history, self._kept().eval()

    def _autotune(self) -> None:
        """Find the fastest ways for a part of a batch; the state keeps them, as rounding depends on them."""
        how, processes = self.job.how, self.job.processes
        count = how.batch_size // (how.accumulate * processes.world)
        images = torch.zeros(count, *self.job.preprocessing["input_size"], device=processes.device)
        with torch.autocast(processes.device.type, self.amp, enabled=self.amp is not None):
            autotune(self.model, images.contiguous(memory_format=self.layout), train=True)

    def _kept(self) -> nn.Module:
        """Return the network that is validated and saved."""
        kept: nn.Module = self.task.trainable_module_ema.module if self.job.how.ema_decay else self.model
        return kept

    def _epoch(self) -> None:
        """Do what is left of the current epoch, validate, and save."""
        job, number = self.job, len(self.history)
        self.batches.epoch, self.batches.start = number, self.step - number * self.steps
        began, spent, first = time.monotonic(), self.epoch_seconds, self.step
        self.task.train()
        parts = iter(self.loader) if self.batches.start < self.steps else iter(())
        while self.step < (number + 1) * self.steps:
            loss, lr, tau, stop = self._optimizer_step(parts)
            self.loss_sum += loss
            self.step += 1
            elapsed = time.monotonic() - began
            self.epoch_seconds = spent + elapsed
            if job.processes.first:
                job.observer.on_step(
                    Step(
                        job.phase,
                        job.seed,
                        self.step,
                        job.how.epochs * self.steps,
                        number + 1,
                        loss,
                        self.history[-1].accuracy if self.history else None,
                        lr,
                        tau,
                        (self.step - first) * job.how.batch_size / max(elapsed, 1e-9),
                    )
                )
            if stop:
                self._stop()
            due = time.monotonic() - self.saved_at >= job.save_seconds
            if due and self.step < (number + 1) * self.steps:
                self._save()
        self._validate(number, (self.step - first) * job.how.batch_size / max(time.monotonic() - began, 1e-9))

    def _optimizer_step(self, parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float | None, bool]:
        """Take one optimizer step; return its loss over all processes, lr, tau, and whether one of them was stopped."""
        job, how, processes = self.job, self.job.how, self.job.processes
        tau, lr = self._set_tau(self.step), self._rate()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=processes.device)
        for part in range(how.accumulate - 1):
            with self.task.no_sync():
                loss = self._loss(*next(parts), part)
                total += loss.detach()
                self._backward(loss)
        loss = self._loss(*next(parts), how.accumulate - 1)
        value = float(total + loss.detach())
        bad = not math.isfinite(value)
        # Whatever the processes have to agree on, once a step.
        value, bad_somewhere, stop = processes.sum(0.0 if bad else value, bad, job.asked_to_stop())
        if bad_somewhere:
            raise DysurgeryError(
                f"the loss is not finite at step {self.step + 1} (epoch {len(self.history) + 1}, lr {lr:.3g}, "
                f"tau {'-' if tau is None else f'{tau:.3g}'}): lower finetune.lr, or bound the gradient with "
                "finetune.clip_grad=1; the last good state is kept"
            )
        with self.bank_rates.applied():
            self._update(loss)
        if self.scheduler is not None and how.sched_on == "step":
            self.scheduler.step_update(self.step + 1)
        if how.ema_decay:
            self.task.update_ema(step=self.step)
        return value / processes.world, lr, tau, bool(stop)

    def _loss(self, images: Tensor, classes: Tensor, part: int) -> Tensor:
        """Return the loss of one part of a batch, its share of the whole."""
        job, how, device = self.job, self.job.how, self.job.processes.device
        seed_generators(job.seed, self.step, part, job.processes.rank)
        if device.type == "cuda":
            torch.cuda.manual_seed(int(torch.randint(2**62, ())))
        if self.erase is not None:
            images = self.erase(images)
        if job.distill is not None and not job.distill.labels:
            classes = torch.zeros_like(classes)
        if self.mixup is not None:
            images, classes = self.mixup(images, classes)
        images = images.contiguous(memory_format=self.layout)
        with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
            loss: Tensor = self.task(images, classes)["loss"] / how.accumulate
        return loss

    def _backward(self, loss: Tensor) -> None:
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.scaler(loss, self.optimizer, need_update=False)

    def _update(self, loss: Tensor) -> None:
        how = self.job.how
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        clip = how.clip_grad or None
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=clip, clip_mode=how.clip_mode, parameters=trainable)
            return
        self._backward(loss)
        if clip is not None:
            dispatch_clip_grad(trainable, clip, mode=how.clip_mode)
        self.optimizer.step()

    def _rate(self) -> float:
        """Return the learning rate of a parameter that has no factor."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        return rate / self.factor if self.factor else rate

    def _set_tau(self, step: int) -> float | None:
        """Set tau for the step that follows ``step`` others."""
        temperature = self.job.temperature
        if temperature is None or not self.dynamic:
            return None
        tau = temperature(step // self.steps if temperature.per == "epoch" else step / self.steps)
        set_temperature(self.model, tau)
        return tau

    def _validate(self, number: int, rate: float) -> None:
        job = self.job
        tau = self._set_tau(self.step)
        raw = self._kept()
        if tau is not None and job.how.ema_decay:
            set_temperature(raw, tau)
        network = self.task.get_eval_model(ema=bool(job.how.ema_decay))
        began = time.monotonic()
        figures = evaluate(
            network if job.processes.world == 1 else raw, self.val, job.processes, self.amp, self.layout,
            job.asked_to_stop if job.processes.world == 1 else lambda: False, self._stop,
        )  # fmt: skip
        statistics = self._statistics(raw) if self.dynamic else ()
        if self.scheduler is not None and job.how.sched_on == "epoch":
            self.scheduler.step(number + 1, figures["top1"])
        self.epoch_seconds += time.monotonic() - began
        last_tau = None if job.temperature is None or not self.dynamic else tau
        epoch = Epoch(
            phase=job.phase,
            seed=job.seed,
            number=number + 1,
            of=job.how.epochs,
            loss=self.loss_sum / self.steps,
            accuracy=figures["top1"],
            val_loss=figures["loss"],
            lr=self._rate(),
            tau=last_tau,
            entropy=_mean([entry.entropy for entry in statistics]),
            spread=_mean([entry.spread for entry in statistics]),
            seconds=self.epoch_seconds,
            images_per_second=rate,
        )
        if job.how.keep == "best" and all(epoch.accuracy > other.accuracy for other in self.history):
            self.best = {name: tensor.detach().clone() for name, tensor in raw.state_dict().items()}
        self.history.append(epoch)
        self.loss_sum, self.epoch_seconds = 0.0, 0.0
        if job.folder is not None:
            self._save()
        if job.processes.first:
            job.observer.on_epoch(epoch)

    def _statistics(self, network: nn.Module) -> Any:
        job = self.job
        some = Subset(job.data.val, spread_images(job.data.val, STATISTICS_IMAGES))
        loader = val_loader(some, job.preprocessing, VAL_BATCH, 0, job.processes.device)
        return attention_statistics(network, (images.contiguous(memory_format=self.layout) for images, _ in loader))

    def _stop(self) -> None:
        job = self.job
        if job.folder is None:
            raise Interrupted(f"stopped in step {self.step} of {job.phase}; nothing was kept (no folder was given)")
        self._save()
        raise Interrupted(f"stopped after step {self.step} of {job.phase}; the state is saved in {job.folder}")

    def _save(self) -> None:
        job = self.job
        self.saved_at = time.monotonic()
        if job.folder is None or not job.processes.first:
            return
        write_state(
            job.folder,
            {
                "phase": job.phase,
                "seed": job.seed,
                "step": self.step,
                "steps_per_epoch": self.steps,
                "loss_sum": self.loss_sum,
                "epoch_seconds": self.epoch_seconds,
                "history": [asdict(epoch) for epoch in self.history],
                "model": self.model.state_dict(),
                "ways": ways_of(self.model),
                "best": self.best,
                "ema": self.task.trainable_module_ema.module.state_dict() if job.how.ema_decay else None,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
            },
        )

    def _load(self, state: dict[str, Any], folder: Path) -> None:
        job = self.job
        found = {key: state[key] for key in ("phase", "seed", "steps_per_epoch")}
        wanted = {"phase": job.phase, "seed": job.seed, "steps_per_epoch": self.steps}
        if found != wanted:
            raise UsageError(f"the state in {folder} is of another run: it has {found}, this one is {wanted}")
        try:
            self.model.load_state_dict(state["model"])
            set_ways(self.model, state["ways"])
            if job.how.ema_decay:
                self.task.trainable_module_ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"the state in {folder} does not fit this model and recipe: {sentence(error)}") from error
        self.best = state["best"]
        self.step, self.loss_sum = state["step"], state["loss_sum"]
        self.epoch_seconds = state["epoch_seconds"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]


def evaluate(
    model: nn.Module,
    loader: Any,
    processes: Processes,
    amp: torch.dtype | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    asked_to_stop: Callable[[], bool] = lambda: False,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return ``loss`` (cross-entropy, nats), ``top1`` and ``top5`` (percent) of ``model`` over all processes.

    The model is left in eval mode.
    """
    model.eval()
    evaluator = ClassificationEvaluator(processes.device, max_samples=evaluation_sample_limit(loader))
    with torch.no_grad():
        for images, classes in loader:
            if asked_to_stop():
                stop()
            with torch.autocast(processes.device.type, amp, enabled=amp is not None):
                output = model(images.contiguous(memory_format=layout))
            evaluator.update(output, classes)
    return dict(evaluator.compute(distributed=processes.world > 1))


def _optimizer(groups: list[dict[str, Any]], how: Training) -> Any:
    try:
        return create_optimizer_v2(groups, opt=how.opt, lr=how.lr, weight_decay=0.0, momentum=how.momentum)
    except (ValueError, AssertionError, TypeError) as error:
        raise UsageError(f"optimizer {how.opt!r}: {sentence(error)}") from error


def _scheduler(optimizer: Any, how: Training, steps: int) -> Any:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=how.sched,
        num_epochs=how.epochs,
        warmup_epochs=how.warmup_epochs,
        warmup_lr=0.0,
        min_lr=how.min_lr,
        decay_epochs=how.decay_epochs,
        decay_rate=how.decay_rate,
        decay_milestones=list(how.milestones),
        step_on_epochs=how.sched_on == "epoch",
        updates_per_epoch=steps,
    )
    return scheduler


def _mixup(augment: Augment, how: Training, classes: int) -> Any:
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch,
        label_smoothing=how.label_smoothing,
        num_classes=classes,
    )


def _outputs(model: nn.Module, job: Job, layout: torch.memory_format) -> int:
    parameter = next(model.parameters())
    images = torch.zeros(1, *job.preprocessing["input_size"], device=parameter.device, dtype=parameter.dtype)
    return outputs_of(model, images.contiguous(memory_format=layout))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@contextmanager
def _sentences(job: Job) -> Iterator[None]:
    """Say in one sentence what torch says in many."""
    try:
        with worker_errors():
            yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _short_of_memory(job) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error).lower():
            raise _short_of_memory(job) from error
        raise


def _short_of_memory(job: Job) -> DysurgeryError:
    share = job.how.batch_size // (job.processes.world * job.how.accumulate)
    return DysurgeryError(
        f"out of memory on {job.processes.device} with {share} images at a time: compute the batch in more parts with "
        f"finetune.accumulate={2 * job.how.accumulate} (the same training), or set a smaller finetune.batch_size; the "
        "last state is kept"
    )
