"""A report as one self-contained HTML page: no script, no network, every picture inside."""

import base64
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from dysurgery.bench_pictures import bars, tradeoff
from dysurgery.figures import change, count
from dysurgery.files import write_text
from dysurgery.report import Report, gather


def report(
    folder: str | os.PathLike[str],
    html: str | os.PathLike[str],
    *,
    probe: str | os.PathLike[str] | None = None,
    exports: Sequence[str | os.PathLike[str]] = (),
    bench: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
) -> Path:
    """Write one page about a saved network or a run of finetune to ``html``; arguments as of :func:`gather`.

    Raises:
        DysurgeryError: as :func:`gather`, or if the file cannot be written.
    """
    return write_text(html, page(gather(folder, probe=probe, exports=exports, bench=bench, model=model)))


def page(report: Report) -> str:
    """Return the page; whatever the files say is escaped."""
    pictures = dict(report.pictures)
    if report.result is not None:
        pictures["tradeoff.png"] = tradeoff(report.result, report.bench, report.exports)
    if report.bench is not None:
        pictures["bench.png"] = bars(report.bench)
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
