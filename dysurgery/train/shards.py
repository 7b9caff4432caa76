"""WebDataset shards as images by their number, so that a run over them can be resumed exactly like any other.

timm finds the shards of a split; its own reader streams and shuffles them, in an order that no file can bring back.
Here the tar files are listed once, and every image is then read from its place in them.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from dysurgery.errors import DysurgeryError, UsageError


class Shards(Dataset[Any]):
    """Pairs of an image and a class out of local tar files, ``KEY.jpg`` (or png, webp) beside ``KEY.cls``.

    Args:
        root: the folder that file names are relative to.
        files: names of the tar files.
        extensions: of images.

    Raises:
        UsageError: for shards on the network.
        DysurgeryError: if a shard cannot be read, or an image has no class.
    """

    def __init__(self, root: str, files: Sequence[str], extensions: Sequence[str]) -> None:
        self.extensions = (*extensions, "jpeg")
        self.paths = [os.path.join(root, name) for name in files]
        self.samples: list[tuple[int, str, int, int, int]] = []  # shard, key, offset and size of the image, class
        for number, path in enumerate(self.paths):
            if "://" in path or path.startswith("pipe:"):
                raise UsageError(f"{path} is on the network: copy the shards to a local folder")
            try:
                self._list(number, path)
            except (OSError, tarfile.TarError) as error:
                reason = getattr(error, "strerror", None) or error
                raise DysurgeryError(f"the shard {path} cannot be read: {reason}") from error

    def _list(self, number: int, path: str) -> None:
        images: dict[str, tuple[int, int]] = {}
        classes: dict[str, int] = {}
        with tarfile.open(path) as shard, open(path, "rb") as content:
            for member in shard:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key = os.path.join(folder, stem)
                if extension.lower() in self.extensions:
                    images[key] = (member.offset_data, member.size)
                elif extension.lower() == "cls":
                    content.seek(member.offset_data)
                    try:
                        classes[key] = int(content.read(member.size))
                    except ValueError as error:
                        raise DysurgeryError(f"{path}: {member.name} is no number of a class") from error
        for key, (offset, size) in images.items():
            if key not in classes:
                raise DysurgeryError(f"{path}: the image {key} has no class ({key}.cls)")
            self.samples.append((number, key, offset, size, classes[key]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number, _, offset, size, target = self.samples[index]
        with open(self.paths[number], "rb") as content:
            content.seek(offset)
            image = Image.open(io.BytesIO(content.read(size)))
        image.load()
        return image, target

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return where an image is, for messages; timm's data sets have the same method."""
        number, key, *_ = self.samples[index]
        return f"{self.paths[number] if absolute else os.path.basename(self.paths[number])}: {key}"
