"""Figures of matplotlib without a display, and as PNG."""

import io
from typing import Any

DPI = 110


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of this size in inches."""
    # Imported here: it takes a second, and only drawing needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Return the picture of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
