"""To the Hugging Face hub and back: a saved folder with a model card, through huggingface_hub.

A repository holds ``config.json`` and ``model.safetensors`` of :func:`dysurgery.save` and a ``README.md`` made of what
is known about the network. ``hf-hub:user/repo[@revision]`` opens one wherever a model is named; what timm pushed is
opened by timm. Nothing of a repository is run as code.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils._validators import validate_repo_id
from torch import nn

from dysurgery import checkpoint
from dysurgery._version import __version__
from dysurgery.errors import DysurgeryError, UsageError, sentence
from dysurgery.models import is_configured, preprocessing_of
from dysurgery.page import render
from dysurgery.report import Report, gather, without_places
from dysurgery.source import Source
from dysurgery.train.experiment import dynamic_folder

CARD = "README.md"


def push_to_hub(
    model: nn.Module | str | os.PathLike[str],
    repo: str,
    *,
    source: Source | None = None,
    input_size: tuple[int, int, int] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Add the network",
) -> str:
    """Upload a network to the Hugging Face hub with a model card, and return the address of the repository.

    Paths of this machine are left out. A network whose source is a file of one's own is uploaded without it: whoever
    loads it passes the static network, ``dysurgery.load("hf-hub:user/repo", model=...)``.

    Args:
        model: a network; or a saved folder or a run of finetune, which know the rest and fill the card.
        repo: ``user/name``; it is created if it does not exist.
        source: of a network, as :func:`dysurgery.save` takes it.
        input_size: of a network, (C, H, W); None takes what the network says of itself.
        preprocessing: of a network; likewise.
        classes: of a network: names of the outputs.
        license: for the card, by its name on the hub. None says nothing.
        private: whether a new repository is private; None leaves it to the account.
        token: of the hub; None takes the one that ``hf auth login`` keeps.
        revision: branch; None is the main one.
        message: of the commit.

    Raises:
        UsageError: if options are given that the folder says itself, or ``repo`` is no name of a repository.
        DysurgeryError: if the network cannot be saved, or the hub refuses.
    """
    try:
        validate_repo_id(repo)
    except huggingface_hub.errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no repository of the hub, such as user/name: {sentence(error)}") from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo.rpartition("/")[2]
        if isinstance(model, nn.Module):
            if is_configured(model):
                size, usual = preprocessing_of(model, input_size)
                input_size, preprocessing = size, usual if preprocessing is None else preprocessing
            report = {"classes": list(classes)} if classes else {}
            checkpoint.save(
                model,
                folder,
                source=_published(source),
                input_size=input_size,
                preprocessing=preprocessing or {},
                report=report,
            )
            known_of = gather(folder)
        else:
            if source or input_size or preprocessing or classes:
                raise UsageError(f"{model} is a folder, which says its own source, size, preprocessing and classes")
            known_of = replace(gather(model), label=folder.name)
            _copy(dynamic_folder(model), folder)
        (folder / CARD).write_text(card(known_of, repo, license), encoding="utf-8")
        api = huggingface_hub.HfApi(token=token, library_name="dysurgery", library_version=__version__)
        try:
            where = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=where.repo_id, folder_path=folder, revision=revision, commit_message=message)
        except Exception as error:
            raise DysurgeryError(f"{repo} cannot be uploaded: {sentence(error)}") from error
    return str(where)


def card(report: Report, repo: str, license: str | None = None) -> str:
    """Return a model card for ``repo``: what the network is, its figures, how to load it."""
    report = without_places(report)
    source = report.config.source
    data = huggingface_hub.ModelCardData(
        library_name="dysurgery",
        pipeline_tag="image-classification" if report.config.report.get("classes") else None,
        license=license,
        tags=["dynamic-convolution", *(["timm"] if source is not None and source.kind == "timm" else [])],
    )
    own = _published(source) is None
    text = render("card.md", escape=False, report=report, repo=repo, own=own)
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _copy(place: Path, folder: Path) -> None:
    """Save the network in ``place`` again, as it is to be published."""
    config = checkpoint.read_config(place)
    folder.mkdir()
    (folder / checkpoint.WEIGHTS).symlink_to((place / checkpoint.WEIGHTS).resolve())
    leave = ("history", "out", "plan", "weights")
    report = {key: value for key, value in config.report.items() if key not in leave}
    checkpoint.write_config(replace(config, source=_published(config.source), report=report), folder)


def _published(source: Source | None) -> Source | None:
    """Return where a network comes from if others can have it too: a file of one's own they have not."""
    return None if source is not None and source.kind == "file" else source
