"""What a probe found, as pictures: figures of matplotlib, to be shown in a notebook or written to a folder."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from dysurgery.drawing import new_figure, png
from dysurgery.errors import DysurgeryError
from dysurgery.files import write_atomically, write_text
from dysurgery.probe import INTERVENTIONS, ProbeReport

REPORT = "probe.json"
COLUMNS = 12
# More rows than this, and figures in the cells of a heat map or names of layers on an axis can no longer be read.
READABLE = 60


def attention_figure(report: ProbeReport) -> Any:
    """Draw the mean of pi over images and its standard deviation, layers x kernels."""
    width = max(layer.k for layer in report.layers)
    figure = new_figure(5 + 0.9 * width, _height(len(report.layers)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, title, colours in (
        (axes[0], "mean", "mean of pi over images", "Blues"),
        (axes[1], "std", "standard deviation of pi over images", "Oranges"),
    ):
        rows = [[*getattr(layer, name), *[np.nan] * (width - layer.k)] for layer in report.layers]
        _heat_map(figure, axis, rows, title, "{:.2f}", cmap=colours, vmin=0)
        axis.set_xticks(range(width), [str(k + 1) for k in range(width)])
        axis.set_xlabel("kernel")
    _name_rows(axes[0], [_label(layer.path) for layer in report.layers])
    axes[0].set_ylabel("layer")
    for axis in axes:
        _separate(axis, [layer.resolution for layer in report.layers])
    figure.suptitle(f"{report.label}: attention of {len(report.layers)} layers, {report.images} images")
    return figure


def entropy_figure(report: ProbeReport) -> Any:
    """Draw the entropy of pi, its spread over images and classes and the distance of the kernels by depth."""
    layers = report.layers
    count = len(layers)
    figure = new_figure(min(max(6.0, 2 + 0.35 * count), 24), 8)
    axes = figure.subplots(3, 1, sharex=True)
    depth = range(count)
    panels: tuple[tuple[Any, str, tuple[tuple[str, str, str], ...]], ...] = (
        (axes[0], "entropy of pi / log K (1 is uniform)", (("entropy", "entropy", "tab:blue"),)),
        (
            axes[1],
            "standard deviation of pi",
            (("spread", "over images", "tab:orange"), ("class_spread", "of the class means", "tab:green")),
        ),
        (axes[2], "distance of the kernels / norm of their mean", (("distance", "distance", "tab:purple"),)),
    )
    for axis, title, lines in panels:
        for name, label, colour in lines:
            values = [getattr(layer, name) for layer in layers]
            if None not in values:
                axis.plot(depth, values, "o-", color=colour, label=label, markersize=4, linewidth=1.2)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=9)
        _separate(axis, [layer.resolution for layer in layers], across=True)
        highest = max(value for line in lines for layer in layers if (value := getattr(layer, line[0])) is not None)
        axis.set_ylim(0, 1.15 if name == "entropy" else 1.1 * highest or 1.0)
    _size_names(axes[0], [layer.resolution for layer in layers])
    step = -(-count // READABLE)
    names = [_label(layer.path) for layer in layers]
    axes[-1].set_xticks(list(depth)[::step], names[::step], rotation=90, fontsize=8)
    axes[-1].set_xlabel("layer")
    axes[-1].set_xlim(-0.6, count - 0.4)
    figure.suptitle(f"{report.label}: attention by depth, {report.images} images")
    return figure


def interventions_figure(report: ProbeReport) -> Any:
    """Draw the accuracy (without labels, the agreement) under each intervention: in all layers, and place by place."""
    measure, learned = report.measure, report.learned
    names = list(INTERVENTIONS)
    places = [(scope, name) for scope, name in report.places if scope != "all"]
    heights = [3.6, _height(len(places))][: 2 if places else 1]
    figure = new_figure(8, sum(heights))
    bars, *rest = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    values = [learned, *(getattr(report.effect(name), measure) for name in names)]
    drawn = bars.bar(["learned", *map(_words, names)], values, color=["tab:orange", *["tab:gray"] * len(names)])
    bars.bar_label(drawn, fmt="%.1f", fontsize=9, padding=2)
    bars.set_ylim(0, 110)
    bars.set_title(f"{measure} in %, replaced in all layers ({report.images} images)", loc="left", fontsize=10)
    bars.tick_params(axis="x", labelsize=9)
    bars.spines[["top", "right"]].set_visible(False)
    for axis in rest:
        # argmax often ruins everything at once: on a linear scale nothing else would have a colour.
        from matplotlib.colors import SymLogNorm

        rows = [[report.difference(name, *place) for name in names] for place in places]
        limit = max(10.0, *(abs(value) for row in rows for value in row))
        norm = SymLogNorm(linthresh=1.0, vmin=-limit, vmax=limit)
        title = f"points against learned, replaced there alone ({report.layer_images} images)"
        ticks = [tick for tick in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if abs(tick) <= limit]
        _heat_map(figure, axis, rows, title, "{:+.1f}", ticks=ticks, cmap="RdBu", norm=norm)
        axis.set_xticks(range(len(names)), [_words(name) for name in names], fontsize=9)
        _name_rows(axis, [_label(name) for _, name in places])
        axis.set_ylabel("resolution, layer" if len(report.resolutions) > 1 else "layer")
        _separate(axis, [scope for scope, _ in places], color="black")
    figure.suptitle(f"{report.label}: {measure} with other weights pi")
    return figure


def images_figure(report: ProbeReport, layer: str | None = None) -> Any:
    """Draw, for each kernel of one layer, the images that give it the largest weight, in falling order.

    Args:
        report: of images that are pictures.
        layer: its path; by default that whose attention varies most.

    Raises:
        UsageError: for a layer that was not looked at.
        DysurgeryError: if there are no pictures.
    """
    found = report.layer(layer)
    if report.thumbnails is None or not len(report.thumbnails):
        raise DysurgeryError("there are no pictures to show: the network was probed without any (layer_images is 0)")
    pictures = report.thumbnails.permute(0, 2, 3, 1).numpy()
    pictures = pictures[..., :3] if pictures.shape[-1] >= 3 else pictures[..., 0]
    pi = report.pi[found.path][: len(pictures)]
    columns = min(COLUMNS, len(pictures))
    figure = new_figure(0.9 * columns + 1.2, 1.15 * found.k + 0.8)
    grid = figure.subplots(found.k, columns, squeeze=False)
    for kernel in range(found.k):
        order = pi[:, kernel].argsort(descending=True, stable=True)[:columns]
        for axis, index in zip(grid[kernel], order.tolist(), strict=True):
            axis.imshow(pictures[index], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{pi[index, kernel]:.2f}", fontsize=8, labelpad=2)
        text = f"kernel {kernel + 1}\nmean {found.mean[kernel]:.2f}\nlargest on\n{found.share[kernel]:.0%}"
        grid[kernel][0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(
        f"{report.label}, {_label(found.path)} ({found.resolution}): images with the largest pi of each kernel, "
        f"among {len(pictures)}",
        fontsize=11,
    )
    return figure


FIGURES: dict[str, Callable[[ProbeReport], Any]] = {
    "attention.png": attention_figure,
    "entropy.png": entropy_figure,
    "interventions.png": interventions_figure,
}
IMAGES = "images.png"


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return ``folder`` as a path if :func:`save_pictures` may write there; nothing is created.

    Raises:
        DysurgeryError: if it is no folder, holds other files by the names of the pictures, or cannot be written.
    """
    target = Path(os.path.abspath(folder))
    nearest = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise DysurgeryError(f"{nearest} is in the way: it exists and is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DysurgeryError(f"cannot write {target}: no permission to write in {nearest}; choose another folder")
    taken = [name for name in (*FIGURES, IMAGES) if os.path.lexists(target / name)]
    if taken and not (target / REPORT).is_file():
        raise DysurgeryError(
            f"{target} holds {taken[0]}, which is of no probe (there is no {REPORT}): choose another folder"
        )
    return target


def save_pictures(report: ProbeReport, folder: str | os.PathLike[str], layer: str | None = None) -> tuple[Path, ...]:
    """Write all pictures and ``probe.json`` to ``folder``, in place of those of an earlier probe.

    All are drawn before the first is written, and each is whole or absent. ``images.png`` is left out where there are
    no pictures to show.

    Args:
        report: of a probe.
        folder: created with its parents.
        layer: see :func:`images_figure`.

    Returns:
        The files.

    Raises:
        UsageError: for a layer that was not looked at.
        DysurgeryError: see :func:`check_folder`.
    """
    target = check_folder(folder)
    figures = {name: draw(report) for name, draw in FIGURES.items()}
    if report.thumbnails is not None and len(report.thumbnails):
        figures[IMAGES] = images_figure(report, layer)
    drawn = {name: png(figure) for name, figure in figures.items()}
    written = [write_text(target / REPORT, json.dumps(report.to_json(), indent=2) + "\n")]
    for name, content in drawn.items():
        written.append(write_atomically(target / name, partial(_put, content)))
    if IMAGES not in drawn:
        (target / IMAGES).unlink(missing_ok=True)  # of the earlier probe
    return tuple(written)


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _height(rows: int) -> float:
    return min(1.8 + 0.24 * rows, 40.0)


def _label(path: str) -> str:
    return path or "(the model)"


def _words(name: str) -> str:
    return name.replace("_", "\n")


def _heat_map(
    figure: Any, axis: Any, rows: Sequence[Sequence[float]], title: str, form: str, ticks: Any = None, **colours: Any
) -> None:
    """Draw ``rows``, with the figure in each cell where there are not too many of them."""
    shown = axis.imshow(np.array(rows, dtype=float), aspect="auto", **colours)
    axis.set_title(title, loc="left", fontsize=10)
    bar = figure.colorbar(shown, ax=axis, fraction=0.05, pad=0.02, ticks=ticks, format="%g")
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    for y, row in enumerate(rows if len(rows) <= 2 * READABLE else ()):
        for x, value in enumerate(row):
            if not np.isnan(value):
                red, green, blue, _ = shown.cmap(shown.norm(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                axis.text(x, y, form.format(value), ha="center", va="center", fontsize=7, color="k" if light else "w")


def _name_rows(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)


def _separate(axis: Any, groups: Sequence[str], across: bool = False, color: str = "0.4") -> None:
    """Draw a line where one group of neighbours ends and the next begins."""
    for index, (one, other) in enumerate(itertools.pairwise(groups)):
        if one != other:
            line = axis.axvline if across else axis.axhline
            line(index + 0.5, color=color, linewidth=0.8, linestyle=":" if across else "-")


def _size_names(axis: Any, resolutions: Sequence[str]) -> None:
    """Write each resolution over the layers that see it, above an entropy of 1."""
    starts = [i for i, size in enumerate(resolutions) if i == 0 or resolutions[i - 1] != size]
    for start, end in zip(starts, [*starts[1:], len(resolutions)], strict=True):
        axis.text((start + end - 1) / 2, 1.04, resolutions[start], ha="center", va="bottom", fontsize=8, color="0.3")
