"""Which of a plan's convolutions become dynamic when not all can be.

A plan, data and a budget come in; out comes the plan whose sites hold the most of the score
(:mod:`dysurgery.score`) that fits into the budget (:mod:`dysurgery.budget`). Called by ``dysurgery plan``.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dysurgery.budget import Budget, best, limit
from dysurgery.errors import UsageError
from dysurgery.models import BuiltModel, described
from dysurgery.plan import Plan, PlannedSite
from dysurgery.planfile import to_json
from dysurgery.score import Labelled, by_gradients, by_shape
from dysurgery.select import Decision
from dysurgery.train.data import Data, open_images, spread_images, val_loader, worker_errors
from dysurgery.train.head import outputs_of
from dysurgery.train.recipe import Recipe

IMAGES = 512
BATCH = 16

CHOSEN, LEFT, WORTHLESS = "chosen under the budget", "left out by the budget", "all images want the same kernel"


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` chose.

    Attributes:
        plan: the narrower plan, for :func:`dysurgery.convert` or a file.
        scores: path -> score of every candidate, as a share of the sum over all of them.
        by: what they come from: ``labels``, the network's own ``predictions``, or ``shape``.
        images: on how many images; 0 by shape.
        budget: the most that the network may have.
    """

    plan: Plan
    scores: dict[str, float]
    by: str
    images: int
    budget: Budget

    @property
    def kept(self) -> float:
        """The share of the score that the chosen sites hold, 0..1."""
        return sum(self.scores[site.path] for site in self.plan.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values, each candidate with its ``score``."""
        data = to_json(self.plan)
        for entry in data["sites"]:
            entry["score"] = self.scores.get(entry["path"])
        budget = dataclasses.asdict(self.budget)
        return {**data, "choice": {"by": self.by, "images": self.images, "budget": budget, "kept": self.kept}}


def choose(
    model: nn.Module | BuiltModel,
    plan: Plan,
    data: str | Data | Tensor | tuple[Tensor, Tensor] | Iterable[Tensor | tuple[Tensor, Tensor]] | None = None,
    *,
    budget_params: str | int | None = None,
    budget_mult_adds: str | int | None = None,
    images: int = IMAGES,
    labels: bool = True,
    batch_size: int = BATCH,
    workers: int = 0,
    recipe: Recipe | None = None,
) -> Choice:
    """Choose, among the sites that ``plan`` makes dynamic, those worth most under a budget. Nothing is touched.

    The largest sum of scores that fits, see :func:`dysurgery.budget.best`: never over the budget, and a larger one
    never gets less. The order of the images does not matter.

    Args:
        model: the network that the plan is of; a classifier, if there are data.
        plan: what could become dynamic, and with which K, from :func:`dysurgery.plan`.
        data: a name or folder as :func:`dysurgery.train.data.open_images` takes it, or what that returns (training
            images, evenly spread); normalised images (N, C, H, W), alone or with their classes (N,); or a loader of
            such batches. None scores by shape, see :func:`dysurgery.score.by_shape`.
        budget_params: the most parameters of the whole network: ``2x`` what it has, ``20M`` in all, ``+3%`` or
            ``+1M`` on top. None is no limit.
        budget_mult_adds: the same of its Mult-Adds per image.
        images: how many images to look at, at most.
        labels: False uses the network's own predictions in place of the labels; that is done anyway where the data
            has none, or another number of classes than the network.
        batch_size: images at a time.
        workers: processes that read images, where ``data`` is a name.
        recipe: how ``data`` is opened, if it is a name.

    Returns:
        The choice. Without any budget the plan is as it was, and only the scores are new.

    Raises:
        UsageError: for a budget that cannot be read or holds no site, a plan that has nothing to choose from or is
            of single calls (``as_graph``), or data that do not fit the model.
        DysurgeryError: if the images cannot be read or run.
    """
    if plan.settings.as_graph:
        raise UsageError("sites are chosen among modules: plan without as_graph")
    if images < 2 or batch_size < 1:
        raise UsageError(f"images is at least 2 and batch_size 1, got {images} and {batch_size}")
    params, mult_adds = plan.params[0], plan.mult_adds[0].total
    budget = Budget(limit(budget_params, params, "parameters"), limit(budget_mult_adds, mult_adds, "Mult-Adds"))
    candidates = [planned for planned in plan.sites if planned.decision.dynamic]
    if not candidates:
        raise UsageError(f"there is nothing to choose from: {plan.reasons()}")
    costs = [added(planned) for planned in candidates]
    room = (
        None if budget.params is None else budget.params - params,
        None if budget.mult_adds is None else budget.mult_adds - mult_adds,
    )
    _check_room(candidates, costs, room, budget)

    sites = [planned.site for planned in candidates]
    if data is None:
        found, by, count = {site.path: by_shape(site) for site in sites}, "shape", 0
    else:
        built = model if isinstance(model, BuiltModel) else described(model)
        pairs = _in_order(_opened(built, data, images, labels, batch_size, workers, recipe), images)
        count, by = len(pairs), "predictions" if any(number is None for _, number in pairs) else "labels"
        found = by_gradients(built.model, sites, _split(pairs, batch_size))
    total = sum(found.values())
    if not total:
        raise UsageError("no site has a score above 0: no gradient reaches them, or all images are the same")
    scores = {path: value / total for path, value in found.items()}
    if room == (None, None):
        return Choice(plan, scores, by, count, budget)
    taken = best([scores[site.path] for site in sites], costs, room)
    paths = {sites[index].path for index in taken}
    if not paths:
        raise UsageError("none of the sites that the budget holds has a score above 0")
    narrowed = tuple(_decided(planned, scores, paths) for planned in plan.sites)
    return Choice(dataclasses.replace(plan, sites=narrowed), scores, by, count, budget)


def added(planned: PlannedSite) -> tuple[int, int]:
    """Return the parameters and Mult-Adds per image that a dynamic site adds."""
    params, mult_adds = planned.params, planned.mult_adds[1]
    return params[1] - params[0], mult_adds.total - mult_adds.base


def _check_room(
    candidates: list[PlannedSite],
    costs: list[tuple[int, int]],
    room: tuple[int | None, int | None],
    budget: Budget,
) -> None:
    """Raise if no site fits."""
    if any(all(size is None or cost <= size for cost, size in zip(entry, room, strict=True)) for entry in costs):
        return
    says = []
    for place, (what, most) in enumerate((("parameters", budget.params), ("Mult-Adds", budget.mult_adds))):
        if most is not None:
            cheapest = min(range(len(costs)), key=lambda index: costs[index][place])
            path, cost = candidates[cheapest].site.path or "the model", costs[cheapest][place]
            says.append(f"of at most {most:,} {what} leaves {room[place]:,}, and the cheapest, {path}, adds {cost:,}")
    raise UsageError(f"the budget holds no site: one {'; one '.join(says)}")


def _decided(planned: PlannedSite, scores: dict[str, float], paths: set[str]) -> PlannedSite:
    site = planned.site
    if not planned.decision.dynamic:
        return planned
    if site.path in paths:
        return dataclasses.replace(planned, decision=Decision(site, True, CHOSEN))
    decision = Decision(site, False, LEFT if scores[site.path] else WORTHLESS)
    return PlannedSite(decision, (planned.params[0],) * 2, (planned.mult_adds[0],) * 2)


def _opened(
    built: BuiltModel, data: Any, images: int, labels: bool, batch_size: int, workers: int, recipe: Recipe | None
) -> Iterator[Labelled]:
    """Yield batches of normalised images, with their classes if these can be used."""
    if isinstance(data, str):
        data = open_images(data, recipe or Recipe(name="plan"))
    if isinstance(data, Data):
        preprocessing = {**built.preprocessing, "input_size": list(built.input_size)}
        like = next(built.model.parameters())
        example = torch.zeros(1, *built.input_size, dtype=like.dtype, device=like.device)
        labels = labels and data.labelled and len(data.classes) in (0, outputs_of(built.model, example))
        chosen = Subset(data.train, list(spread_images(data.train, images)))
        data = val_loader(chosen, preprocessing, batch_size, workers, torch.device("cpu"))
    elif isinstance(data, Tensor) or (isinstance(data, tuple) and len(data) == 2 and data[1].dim() == 1):
        data = (data,)
    elif not isinstance(data, Iterable):
        raise UsageError(f"no data: expected a name, a tensor of images or a loader, got {type(data).__name__}")
    with worker_errors():
        for batch in data:
            match batch:
                case Tensor():
                    yield batch, None
                case [Tensor() as some, Tensor() as classes]:
                    yield some, classes if labels else None
                case _:
                    raise UsageError(f"a batch is images or a pair of images and classes, got {type(batch).__name__}")


def _in_order(batches: Iterator[Labelled], count: int) -> list[Labelled]:
    """Return the first ``count`` images, ordered by what is in them, so that rounding too is the same in any order."""
    found: list[tuple[bytes, int, Labelled]] = []
    for images, classes in batches:
        if classes is not None and len(classes) != len(images):
            raise UsageError(f"{len(images)} images cannot have {len(classes)} classes")
        for index, image in enumerate(images.cpu()[: count - len(found)]):
            key = hashlib.blake2b(image.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
            number = None if classes is None else classes[index].cpu()
            found.append((key, -1 if number is None else int(number), (image, number)))
        if len(found) == count:
            break
    return [pair for *_, pair in sorted(found, key=lambda entry: entry[:2])]


def _split(pairs: list[Labelled], size: int) -> Iterator[Labelled]:
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        numbers = [number for _, number in some if number is not None]
        yield torch.stack([image for image, _ in some]), torch.stack(numbers) if len(numbers) == len(some) else None
