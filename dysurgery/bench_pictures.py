"""What a bench found, as pictures: bars of each measurement, and the accuracy of a run against what it costs.

Both are drawn from plain values, as JSON holds them: of :meth:`dysurgery.bench.Bench.to_json`, of ``result.json`` and
of ``dysurgery export --json``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dysurgery.bench import FORMS
from dysurgery.drawing import new_figure, png
from dysurgery.figures import count

_COLOURS = {"static": "tab:gray", "control": "tab:blue", "dynamic": "tab:orange", "grouped": "tab:red"}
_MARKERS = {"torch": "o", "torch, grouped": "x", "onnxruntime": "s", "torch.export": "^"}


def bars(figures: Mapping[str, Any]) -> bytes:
    """Draw the milliseconds of static, dynamic and grouped for each mode and batch; return a PNG.

    Each panel has a scale of its own; the whiskers are the quartiles, the figures above the time relative to static.
    Where each network has a best layout, the others are left to the table.

    Args:
        figures: of :meth:`dysurgery.bench.Bench.to_json`.
    """
    rows = [row for row in figures["rows"] if row["layout"] == "best"] or figures["rows"]
    batches = sorted({row["batch"] for row in rows})
    kinds = list(dict.fromkeys((row["mode"], row["layout"]) for row in rows))
    figure = new_figure(max(5.0, 1 + 2.4 * len(batches)), 0.8 + 2.7 * len(kinds))
    axes = figure.subplots(len(kinds), len(batches), squeeze=False)
    for row in rows:
        line, column = kinds.index((row["mode"], row["layout"])), batches.index(row["batch"])
        axis = axes[line][column]
        axis.set_title(f"{row['mode']}, {row['batch']} image{'s' * (row['batch'] > 1)}, {row['layout']}", fontsize=9)
        for place, form in enumerate(FORMS):
            middle, (low, high) = row[f"{form}_ms"], row[f"{form}_quartiles_ms"]
            whiskers = [[middle - low], [high - middle]]
            axis.bar(place, middle, yerr=whiskers, capsize=3, width=0.7, color=_COLOURS[form], error_kw={"alpha": 0.6})
            text = f"{middle / row['static_ms']:.2f}x"
            axis.annotate(text, (place, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
        axis.set_xticks(range(len(FORMS)), FORMS, fontsize=9)
        axis.margins(y=0.2)
        axis.set_ylim(bottom=0)
        if column == 0:
            axis.set_ylabel("milliseconds")
    machine = figures["machine"]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if machine["device"] == "cpu" else ""
    figure.suptitle(f"{figures['model']} on {machine['name']}{threads}, {machine['dtype']}", fontsize=10)
    return png(figure)


@dataclass(frozen=True)
class _Point:
    """A trained network and how it runs; ``mult_adds`` or ``ms`` is None where nobody knows."""

    network: str
    runtime: str
    accuracy: float
    spread: float | None
    mult_adds: float | None
    ms: float | None


def tradeoff(
    result: Mapping[str, Any], bench: Mapping[str, Any] | None = None, exports: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """Draw accuracy against Mult-Adds and against milliseconds: static, control and dynamic; return a PNG.

    Static and control have the same architecture, and so the same time.

    Args:
        result: ``result.json`` of a run of finetune.
        bench: of :meth:`dysurgery.bench.Bench.to_json`, whose times for its smallest batch take the place of the run's,
            with the grouped trick beside them.
        exports: of ``dysurgery export --json``: the files that were measured with as many images are drawn, too.
    """
    images, points = _points(result, bench, exports)
    figure = new_figure(10, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for point in points:
        # Red, as it often lies on what it is compared with.
        colour = _COLOURS["grouped" if point.runtime.endswith("grouped") else point.network]
        look = {"fmt": _MARKERS[point.runtime], "color": colour, "capsize": 3, "markersize": 7}
        # In the left panel the runtimes would lie on top of each other.
        if point.mult_adds is not None and point.runtime == "torch":
            axes[0].errorbar(point.mult_adds, point.accuracy, yerr=point.spread, **look)
        if point.ms is not None:
            axes[1].errorbar(point.ms, point.accuracy, yerr=point.spread, **look)
    axes[0].set_ylabel("validation accuracy, %")
    for axis, label in zip(axes, ("Mult-Adds", f"milliseconds for {images} image{'s' * (images > 1)}"), strict=True):
        axis.set_xlabel(label)
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    axes[0].xaxis.set_major_formatter(lambda value, place: count(value))
    # A legend beside the panels, as labels at points that lie near each other would cover them.
    kinds = [*_legend("network", dict.fromkeys(point.network for point in points))]
    runtimes = dict.fromkeys(point.runtime for point in points if point.ms is not None)
    figure.legend(handles=[*kinds, *_legend("runtime", runtimes)], loc="outside right upper", fontsize=9)
    return png(figure)


def _legend(what: str, names: Iterable[str]) -> Iterator[Any]:
    from matplotlib.lines import Line2D

    for name in names:
        if what == "network":
            yield Line2D([], [], linestyle="", marker="o", color=_COLOURS[name], label=name)
        else:
            colour = _COLOURS["grouped"] if name.endswith("grouped") else "black"
            yield Line2D([], [], linestyle="", marker=_MARKERS[name], color=colour, fillstyle="none", label=name)


def _points(
    result: Mapping[str, Any], bench: Mapping[str, Any] | None, exports: Sequence[Mapping[str, Any]]
) -> tuple[int, list[_Point]]:
    """Return the number of images that the times are for, and the points."""
    images, times = 1, {("static", "torch"): result["latency_ms"].get("static")}
    times["dynamic", "torch"] = result["latency_ms"].get("dynamic")
    if bench is not None:
        row = min((row for row in bench["rows"] if row["mode"] == "infer"), key=lambda row: row["batch"])
        images = row["batch"]
        times = {(form, "torch"): row[f"{form}_ms"] for form in ("static", "dynamic")}
        times["dynamic", "torch, grouped"] = row["grouped_ms"]
    for timing in (timing for export in exports for timing in export["latency"]):
        if timing["images"] == images and timing["runtime"] != "torch":
            times[timing["network"], timing["runtime"]] = timing["milliseconds"]
    points = []
    for network, key, form in (
        ("static", "before", "static"),
        ("control", "control", "static"),
        ("dynamic", "dynamic", "dynamic"),
    ):
        if result["accuracy"][key] is None or result["mult_adds"][form] is None:
            continue
        for (of, runtime), ms in times.items():
            if of == form:
                accuracy, spread = result["accuracy"][key], result["accuracy_std"][key]
                points.append(_Point(network, runtime, accuracy, spread, result["mult_adds"][form], ms))
    return images, points
