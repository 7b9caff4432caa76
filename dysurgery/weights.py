"""Weight files: found in a cache, downloaded, or named by a person; loaded strictly and never unpickled.

A pretrained file is looked for in the cache first; only then is the network asked, after one short request whether it
is there. Called by :mod:`dysurgery.models`.
"""

import re
import threading
import urllib.error
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import timm.data
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from dysurgery.errors import DysurgeryError, sentence

PATIENCE = 3.0
"""Seconds that the one request may take which asks whether the network is there."""


class FetchError(Exception):
    """Why a file is neither in the cache nor to be downloaded."""


def load_weights(model: nn.Module, label: str, file: Path) -> None:
    """Load a file's state dict, which must fit key by key and shape by shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a TorchScript archive is none of ours, which the error says
            state = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        if _holds_objects(file):
            raise DysurgeryError(
                f"{file} holds pickled Python objects, which are not read because they can run code: "
                "save model.state_dict() alone, with safetensors or torch.save"
            ) from error
        known = isinstance(error, OSError | SafetensorError)
        why = sentence(error) if known else "it is no checkpoint of torch.save that holds a dict of tensors"
        raise DysurgeryError(f"{file} cannot be read as a state dict: {why}") from error
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise DysurgeryError(f"{file} is no state dict: it holds {_few(map(str, state)) or 'nothing'}, and no tensor")
    own = model.state_dict()
    shapes, kinds = [], []
    for key in own.keys() & state.keys():
        mine, theirs = own[key], state[key]
        if not isinstance(mine, Tensor) or nn.parameter.is_lazy(mine) or not isinstance(theirs, Tensor):
            continue
        if mine.shape != theirs.shape:
            shapes.append(key)
        elif mine.is_floating_point() and not theirs.is_floating_point():
            kinds.append(f"{key} {theirs.dtype}")
    if kinds:
        raise DysurgeryError(f"{file} is quantised ({_few(sorted(kinds))}): dequantise it to floating point first")
    try:
        fitting = {key: value for key, value in state.items() if key not in shapes}
        found = model.load_state_dict(with_metadata(fitting, model), strict=False)
    except RuntimeError as error:
        raise DysurgeryError(f"{file} does not fit {label}: {sentence(error)}") from error
    shapes.sort(key=list(own).index)
    missing = [key for key in found.missing_keys if key not in shapes]
    differing = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes]
    problems = [
        f"{len(keys)} {what} ({_few(keys)})"
        for keys, what in ((missing, "missing"), (found.unexpected_keys, "unexpected"), (differing, "of another shape"))
        if keys
    ]
    if problems:
        hint, classes = "", {state[k].shape[0] for k in shapes if state[k].shape[1:] == own[k].shape[1:]}
        if len(problems) == len(classes) == 1 and len({key.rpartition(".")[0] for key in shapes}) == 1:
            (count,) = classes
            hint = f"; for its {count} classes give --model-arg num_classes={count}"
        raise DysurgeryError(f"{file} does not fit {label}: {', '.join(problems)}{hint}")


def _holds_objects(file: Path) -> bool:
    """Whether a file that could not be read is a checkpoint which holds more than tensors."""
    try:
        return bool(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # it is no checkpoint at all
        return False


def _few(items: Iterable[str], count: int = 3) -> str:
    names = list(items)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def had(fetch: Callable[..., Path], *args: Any, **kwargs: Any) -> tuple[Path | None, str]:
    """Return a fetched file, or why it cannot be had."""
    try:
        return fetch(*args, **kwargs), ""
    except FetchError as reason:
        return None, str(reason)


def timm_weights(cfg: Any) -> Path:
    """Return the weight file of a timm configuration, from the cache or downloaded."""
    if cfg.file:
        return Path(cfg.file)
    if cfg.hf_hub_id:
        name = cfg.hf_hub_filename or "pytorch_model.bin"
        safe = re.sub(r"pytorch_model(?=\.bin$)", "model", name).removesuffix(".bin") + ".safetensors"
        return hub_file(cfg.hf_hub_id, [safe, name] if name.endswith(".bin") else [name])
    if cfg.url:
        url, filename = (cfg.url, None) if isinstance(cfg.url, str) else cfg.url
        return url_file(url, filename)
    raise FetchError(f"timm {timm.__version__} has none")


def hub_file(repository: str, filenames: list[str]) -> Path:
    """Return the first of ``filenames`` that the cache has, else that the hub has, of ``user/repo[@revision]``."""
    repository, _, revision = repository.partition("@")
    fetch = partial(huggingface_hub.hf_hub_download, repository, revision=revision or None)
    try:
        for filename in filenames:
            with suppress(LocalEntryNotFoundError):
                return Path(fetch(filename=filename, local_files_only=True))
        _check_reachable(
            lambda: get_session().head(constants.ENDPOINT, timeout=PATIENCE), constants.ENDPOINT,
            f"{repository} is not in the cache {constants.HF_HUB_CACHE}", "HF_HUB_CACHE",
        )  # fmt: skip
        for filename in filenames:
            try:
                with _no_progress_bars():
                    return Path(fetch(filename=filename))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # the connection broke
                    raise
    except FetchError:
        raise
    except Exception as error:
        raise FetchError(f"{repository}: {sentence(error)}") from error
    raise FetchError(f"{repository} has no {' or '.join(filenames)}")


def with_metadata(tensors: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a state dict with the metadata of the model's own, which files of tensors lack.

    Some modules refuse one without the version in it (torchvision's MNASNet). A BatchNorm whose number of batches is
    not in the file gets none: torch then takes 0 for it, as for every file of that time.
    """
    state = OrderedDict(tensors)
    own = model.state_dict(keep_vars=True)
    metadata: dict[str, dict[str, Any]] = own._metadata  # type: ignore[attr-defined]
    for name in own:
        path, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked" and name not in state:
            metadata[path].pop("version", None)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def url_file(url: str, filename: str | None = None, check_hash: bool = False) -> Path:
    """Return the file behind ``url`` from torch's cache, downloaded if it is not there yet."""
    filename = filename or url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", filename)
    if path.exists():
        return path

    def ask() -> None:
        with suppress(urllib.error.HTTPError):  # an answer too
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()

    _check_reachable(ask, url, f"{filename} is not in the cache {path.parent}", "TORCH_HOME")
    expected = torch.hub.HASH_REGEX.search(filename) if check_hash else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), expected[1] if expected else None, progress=False)
    except Exception as error:
        raise FetchError(f"{url}: {sentence(error)}") from error
    return path


def _check_reachable(ask: Callable[[], object], where: str, absent: str, variable: str) -> None:
    """Raise FetchError unless ``ask`` returns in time; resolving a host name heeds no timeout, hence the thread."""
    answer = [f"no answer within {PATIENCE:g} s"]

    def attempt() -> None:
        try:
            ask()
            answer[0] = ""
        except Exception as error:
            answer[0] = sentence(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
    if answer[0]:
        raise FetchError(
            f"{absent}, and {where} cannot be reached ({answer[0]}); run once where it can be, or point {variable} at "
            "a cache that has them"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
