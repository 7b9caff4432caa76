"""DATA becomes batches: folders of classes, whatever timm's ``create_dataset`` takes, or scikit-learn's digits.

Everything random is a pure function of where the run is: the order of images of (seed, epoch), the augmentation of an
image of (seed, epoch, image). A run that was killed in the middle of an epoch goes on with the very same batches, and
two processes see between them what one would. That is why the loader is torch's own around timm's data sets and
transforms: ``timm.data.create_loader`` draws order and augmentation from generators that no file can bring back.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset
from torchvision import transforms

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean, sentence
from dysurgery.train.recipe import Augment, Recipe
from dysurgery.train.shards import Shards

_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")
_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Data:
    """A data set: pairs of a PIL image and a class, without transforms.

    Attributes:
        name: as it was asked for.
        train: what to train on.
        val: what to validate on.
        classes: their names, in the order of the outputs; empty if the data set does not say.
        identity: what a resumed run compares: the name, or for a folder, which may move, a digest of its file names.
        labelled: whether the classes of the validation images are known.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    identity: str = ""
    labelled: bool = True

    def __post_init__(self) -> None:
        if not self.identity:
            object.__setattr__(self, "identity", self.name)


def open_data(name: str, recipe: Recipe) -> Data:
    """Open the data set called ``name``, the part of it that ``recipe`` asks for.

    Args:
        name: a folder with ``train`` and ``val`` in it, each with one folder of images per class; ``digits``; or a
            name of timm's ``create_dataset``: ``torch/cifar10``, ``hfds/...``.
        recipe: its splits, its root folder, its limits.

    Raises:
        UsageError: for a name that is none of these.
        DysurgeryError: if it cannot be opened, a class is empty, or train and val have different classes.
    """
    prefix = name.partition("/")[0].lower()
    if name == "digits":
        data = _digits()
    elif Path(name).is_dir():
        data = _folder(name, labels=recipe.distill is None or recipe.distill.labels)
    elif "/" in name and prefix in _PREFIXES:
        data = _named(name, recipe)
    else:
        raise UsageError(
            f"no data {name!r}: expected a folder with train/ and val/, 'digits', or a data set of timm such as "
            f"torch/cifar10 or hfds/USER/NAME{did_you_mean(name, ('digits',))}"
        )
    train, val = data.train, data.val
    if recipe.train_images:
        _enough(name, train, recipe.train_images)
        count = len(train)  # type: ignore[arg-type]
        train = Subset(train, [i * count // recipe.train_images for i in range(recipe.train_images)])
    if recipe.val_part != "all":
        val = Subset(val, range(VAL_START[recipe.val_part], len(val), 2))  # type: ignore[arg-type]
    return replace(data, train=train, val=val)


VAL_START = {"even": 0, "odd": 1}


def open_images(name: str, recipe: Recipe) -> Data:
    """Open images to look at: what :func:`open_data` opens, or a folder of images alone.

    Args:
        name: as there; or a folder with ``val`` only; or a folder of images, in folders of classes or not (then they
            have no labels), whose images are both ``train`` and ``val``.
        recipe: as there; its limits do not hold for a folder of images alone.

    Raises:
        UsageError: for a name that is none of these.
        DysurgeryError: if it cannot be opened or a class is empty.
    """
    root = Path(name)
    if name == "digits" or not root.is_dir() or any((root / part).is_dir() for part in _TRAIN):
        return open_data(name, recipe)
    folder = next((root / part for part in _VAL if (root / part).is_dir()), root)
    images = _read(folder, folder.name)
    classes = _classes(folder, images, required=False)
    return Data(name, images, images, classes, labelled=bool(classes))


def _enough(name: str, data: Dataset[Any], wanted: int) -> None:
    if (found := len(data)) < wanted:  # type: ignore[arg-type]
        raise UsageError(f"train_images = {wanted}, but {name} has {found}")


class _Digits(Dataset[Any]):
    """Images of 8x8 with 17 levels of grey, as PIL has them."""

    def __init__(self, images: Any, classes: Any) -> None:
        self.images = [Image.fromarray((image.reshape(8, 8) * (255 / 16)).round().astype(np.uint8)) for image in images]
        self.classes = [int(number) for number in classes]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.classes[index]

    def __len__(self) -> int:
        return len(self.images)


def _digits() -> Data:
    """1 197 training and 600 validation images of handwritten digits, always the same split, nothing downloaded."""
    # Imported here: it takes a second, which every other command would wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    split = train_test_split(images, classes, test_size=600, random_state=0, stratify=classes)
    train_x, val_x, train_y, val_y = split
    return Data("digits", _Digits(train_x, train_y), _Digits(val_x, val_y), tuple("0123456789"))


def _folder(name: str, labels: bool) -> Data:
    root = Path(name)
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    parts = []
    for names in (_TRAIN, _VAL):
        part = next((part for part in names if part in found), None)
        if part is None:
            raise DysurgeryError(
                f"{name} has no folder {names[0]}/: expected train/ and val/, each with one folder of images per "
                f"class; found {', '.join(found[:5]) or 'no folder'}"
            )
        parts.append(part)
    sets, classes, digest = [], [], hashlib.sha256()
    for part in parts:
        folder = root / part
        data = _read(folder, part)
        sets.append(data)
        for path, target in data.reader.samples:
            digest.update(f"{Path(path).relative_to(root)} {target}\n".encode())
        classes.append(_classes(folder, data, required=labels or part == parts[1]))
    if classes[0] != classes[1] and (labels or classes[0]):
        lacking = sorted(set(classes[0]) - set(classes[1])), sorted(set(classes[1]) - set(classes[0]))
        says = [f"{', '.join(names[:5])} only in {part}" for names, part in zip(lacking, parts, strict=True) if names]
        raise DysurgeryError(f"the classes of {name} differ: {'; '.join(says)}")
    return Data(name, sets[0], sets[1], classes[1], f"folder {digest.hexdigest()[:16]}")


def _read(folder: Path, part: str) -> Any:
    try:
        data = create_dataset("", root=str(folder), split=part, search_split=False)
    except RuntimeError as error:
        raise DysurgeryError(f"{folder} has no images in it: {sentence(error)}") from error
    data._max_retries = 1  # timm's own way with an image that it cannot read is to take the next one instead
    return data


def _classes(folder: Path, data: Any, required: bool) -> tuple[str, ...]:
    """Return the classes of a folder; a class without an image is an error."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    filled = {Path(path).relative_to(folder).parts[0] for path, _ in data.reader.samples}
    if empty := [name for name in names if name not in filled]:
        raise DysurgeryError(f"{folder / empty[0]} has no image in it: remove the folder or fill it")
    if not names:
        if required:
            raise DysurgeryError(f"{folder} has images but no class folders: put them in {folder}/CLASS/")
        return ()
    return tuple(sorted(data.reader.class_to_idx, key=data.reader.class_to_idx.get))


def _named(name: str, recipe: Recipe) -> Data:
    sets = []
    for split, training in ((recipe.train_split, True), (recipe.val_split, False)):
        try:
            # timm asserts on a name that it does not know.
            data = create_dataset(
                name,
                root=recipe.data_dir,
                split=split,
                is_training=training and not name.startswith("wds/"),  # which would ask for a number of samples
                download=recipe.download,
            )
        except Exception as error:
            raise DysurgeryError(
                f"{name} cannot be opened (split {split!r}, data_dir {recipe.data_dir!r}): {sentence(error)}; "
                "see --set data_dir=FOLDER, --set download=True, --set train_split=NAME, --set val_split=NAME"
            ) from error
        if name.startswith("wds/"):
            reader = data.reader
            data = Shards(reader.root, reader.split_info.filenames, reader.input_key.split(";"))
        if isinstance(data, IterableDataset):
            raise UsageError(
                f"{name} is a stream, in which no run can be resumed exactly: unpack it into a folder of classes, or "
                "use hfds/ in place of hfids/"
            )
        if hasattr(data, "_max_retries"):
            data._max_retries = 1
        sets.append(data)
    classes = getattr(sets[0], "classes", None) or ()
    if not classes and (features := getattr(getattr(sets[0], "reader", None), "dataset", None)) is not None:
        classes = getattr(features.features.get("label"), "names", None) or ()
    return Data(name, sets[0], sets[1], tuple(map(str, classes)))


class Drawn(Dataset[Any]):
    """Images through their transform, which sees generators seeded for this image in this epoch alone."""

    def __init__(self, data: Dataset[Any], transform: Any, channels: int, seed: int | None) -> None:
        self.data, self.transform, self.seed = data, transform, seed
        self.mode = _MODES.get(channels)
        if self.mode is None:
            raise UsageError(f"images have 1, 3 or 4 channels, the model takes {channels}")

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> tuple[Any, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            image, target = self.data[index]
        except (OSError, RuntimeError, SyntaxError, ValueError) as error:
            raise DysurgeryError(f"{self._name(index)} cannot be read as an image: remove or replace it") from error
        if isinstance(image, Image.Image) and image.mode != self.mode:
            image = image.convert(self.mode)
        if self.seed is not None:
            seed_generators(self.seed, epoch, index)
        return self.transform(image), int(target)

    def _name(self, index: int) -> str:
        data: Any = self.data
        while isinstance(data, Subset):
            data, index = data.dataset, data.indices[index]
        named = getattr(data, "filename", None)
        try:
            return str(named(index, absolute=True)) if named else f"image {index}"
        except (NotImplementedError, AttributeError):
            return f"image {index}"


@contextmanager
def worker_errors() -> Iterator[None]:
    """Say of an error that a worker process of a loader raised the sentence alone, without its traceback."""
    try:
        yield
    except DysurgeryError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DysurgeryError(str(error).strip().rpartition("DysurgeryError: ")[2]) from error


class Batches(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch for one process, as a pure function of (seed, epoch); cut where a run goes on.

    A batch of ``batch_size`` is shared among ``world`` processes (every world-th image is one's own) and each share
    cut into ``accumulate`` parts. The images that fill no batch are left out, others in every epoch.
    """

    def __init__(self, size: int, batch_size: int, accumulate: int, seed: int, rank: int, world: int) -> None:
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.start = 0, 0
        if batch_size % (world * accumulate):
            raise UsageError(
                f"a batch of {batch_size} images cannot be shared by {world} process{'es' * (world > 1)} in "
                f"{accumulate} part{'s' * (accumulate > 1)} each: batch_size must be a multiple of {world * accumulate}"
            )
        if size < batch_size:
            raise DysurgeryError(f"{size} training images are fewer than one batch: set a batch_size of at most {size}")

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return self.size // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for step in range(self.start, self.steps):
            mine = order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]
            for part in mine.reshape(self.accumulate, -1):
                yield [(self.epoch, int(index)) for index in part]


def train_loader(
    data: Data, preprocessing: dict[str, Any], augment: Augment, batches: Batches, workers: int, device: torch.device
) -> PrefetchLoader:
    """Return the loader of normalised training batches (B, C, H, W); ``batches`` says where it begins."""
    channels = preprocessing["input_size"][0]
    drawn = Drawn(data.train, train_transform(preprocessing, augment), channels, batches.seed)
    return _normalised(
        DataLoader(
            drawn,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=fast_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        ),
        preprocessing,
        device,
    )


def val_loader(
    data: Dataset[Any],
    preprocessing: dict[str, Any],
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> PrefetchLoader:
    """Return the loader of normalised validation batches, this process's share of them."""
    drawn = Drawn(data, eval_transform(preprocessing), preprocessing["input_size"][0], None)
    sampler = OrderedDistributedSampler(drawn, world, rank) if world > 1 else None
    loader = DataLoader(
        drawn,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    return _normalised(loader, preprocessing, device)


def _normalised(loader: DataLoader[Any], preprocessing: dict[str, Any], device: torch.device) -> PrefetchLoader:
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return PrefetchLoader(loader, mean, std, channels=preprocessing["input_size"][0], device=device)


def eval_transform(preprocessing: dict[str, Any]) -> Any:
    """Return timm's transform of validation images, up to normalisation."""
    keys = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    size = tuple(preprocessing["input_size"])
    return create_transform(size, use_prefetcher=True, **{key: preprocessing[key] for key in keys})


def train_transform(preprocessing: dict[str, Any], augment: Augment) -> Any:
    """Return timm's transform of training images, up to normalisation."""
    size = tuple(preprocessing["input_size"])
    common = {key: preprocessing[key] for key in ("interpolation", "mean", "std")}
    if augment.crop == "none" and not (augment.hflip or augment.vflip or augment.color_jitter or augment.auto_augment):
        return eval_transform(preprocessing)
    first, second, last = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        separate=True,
        train_crop_mode=augment.crop if augment.crop not in ("pad", "none") else None,
        scale=augment.scale or None,
        ratio=augment.ratio or None,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        **common,
    )
    if augment.crop in ("pad", "none"):  # the two that timm does not have
        flips = [step for step in first.transforms if "Flip" in type(step).__name__]
        resize: list[Any] = [transforms.Resize(size[1:], transforms.InterpolationMode(common["interpolation"]))]
        if augment.crop == "pad":
            resize.append(transforms.RandomCrop(size[1:], padding=[size[2] // 8, size[1] // 8]))
        first = transforms.Compose([*resize, *flips])
    return transforms.Compose([first, second, last])


def seed_generators(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU) from ``key``, each key independent of the others."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the state of the global generators back after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def spread_images(data: Dataset[Any], count: int) -> Sequence[int]:
    """Return the indices of ``count`` images, or all there are, evenly spread over the data."""
    size = len(data)  # type: ignore[arg-type]
    count = min(count, size)
    return [math.floor(i * size / count) for i in range(count)]
