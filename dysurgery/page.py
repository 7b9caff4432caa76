"""A report as one self-contained HTML page: no script, no network, every picture inside."""

import base64
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from dysurgery.drawing import new_figure, png
from dysurgery.figures import change, count
from dysurgery.files import write_text
from dysurgery.report import Report, gather

_COLOURS = {"static": "tab:gray", "control": "tab:blue", "dynamic": "tab:orange"}


def report(
    folder: str | os.PathLike[str],
    html: str | os.PathLike[str],
    *,
    probe: str | os.PathLike[str] | None = None,
    exports: Sequence[str | os.PathLike[str]] = (),
    model: nn.Module | None = None,
) -> Path:
    """Write one page about a saved network or a run of finetune to ``html``; arguments as of :func:`gather`.

    Raises:
        DysurgeryError: as :func:`gather`, or if the file cannot be written.
    """
    return write_text(html, page(gather(folder, probe=probe, exports=exports, model=model)))


def page(report: Report) -> str:
    """Return the page; whatever the files say is escaped."""
    pictures = dict(report.pictures)
    if report.result is not None:
        pictures["tradeoff.png"] = tradeoff(report)
    return render("report.html", escape=True, report=report, pictures=pictures)


def render(template: str, *, escape: bool, **values: Any) -> str:
    """Fill one of ``dysurgery/templates``."""
    import jinja2  # torch brings it

    text = resources.files("dysurgery").joinpath("templates", template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=escape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": count,
        "change": lambda pair: " ".join(change(*pair)),
        "inline": lambda data: f"data:image/png;base64,{base64.b64encode(data).decode()}",
    }
    return environment.from_string(text).render(**values)


def tradeoff(report: Report) -> bytes:
    """Draw accuracy against Mult-Adds and against milliseconds: static, control and dynamic; return a PNG."""
    assert report.result is not None
    result = report.result
    points = [
        (name, key, form)
        for name, key, form in (
            ("static", "before", "static"),
            ("control", "control", "static"),
            ("dynamic", "dynamic", "dynamic"),
        )
        if result["accuracy"][key] is not None and result["mult_adds"][form] is not None
    ]
    figure = new_figure(9, 3.6)
    for axis, measure, label in zip(
        figure.subplots(1, 2, sharey=True), ("mult_adds", "latency_ms"), ("Mult-Adds", "milliseconds for one image"),
        strict=True,
    ):  # fmt: skip
        for name, key, form in points:
            if (x := result[measure].get(form)) is None:
                continue
            spread = result["accuracy_std"][key]
            axis.errorbar(x, result["accuracy"][key], yerr=spread, fmt="o", color=_COLOURS[name], capsize=3)
            axis.annotate(name, (x, result["accuracy"][key]), xytext=(7, 5), textcoords="offset points", fontsize=9)
        axis.set_xlabel(label)
        axis.margins(0.25)
        axis.grid(alpha=0.3)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        if measure == "mult_adds":
            axis.set_ylabel("validation accuracy, %")
    return png(figure)
