"""The curves of a run as a picture: loss, accuracy, tau and the entropy of the attention, over the epochs."""

from collections.abc import Sequence
from pathlib import Path

from dysurgery.drawing import new_figure, png
from dysurgery.files import write_atomically
from dysurgery.train.loop import Epoch

COLOURS = {"before": "tab:gray", "control": "tab:blue", "dynamic": "tab:orange"}


def draw_curves(history: Sequence[Epoch], path: Path, title: str) -> None:
    """Draw ``history`` into a PNG at ``path``; one line for each phase and seed, one colour for each phase.

    Raises:
        DysurgeryError: if it cannot be written.
    """
    # Imported here: it takes a second, and only this needs it.
    from matplotlib.ticker import MaxNLocator

    runs: dict[tuple[str, int], list[Epoch]] = {}
    for epoch in history:
        runs.setdefault((epoch.phase, epoch.seed), []).append(epoch)
    figure = new_figure(10, 6.5)
    axes = figure.subplots(2, 2, sharex=True)
    panels = (
        (axes[0][0], "loss", "training loss"),
        (axes[0][1], "accuracy", "validation accuracy, %"),
        (axes[1][0], "tau", "temperature tau"),
        (axes[1][1], "entropy", "entropy of the attention (1 = uniform)"),
    )
    for axis, name, label in panels:
        named = set()
        for (phase, _), epochs in runs.items():
            points = [(epoch.number, getattr(epoch, name)) for epoch in epochs if getattr(epoch, name) is not None]
            if not points:
                continue
            legend = None if phase in named else phase
            named.add(phase)
            marker = "o" if len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), color=COLOURS.get(phase), label=legend, marker=marker, linewidth=1.5)
        if name == "tau":
            axis.set_ylim(bottom=0)
        axis.set_title(label, fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if named:
            axis.legend(frameon=False, fontsize=9)
        else:
            axis.text(0.5, 0.5, "no dynamic network yet", ha="center", va="center", transform=axis.transAxes)
    axes[1][1].set_ylim(-0.02, 1.02)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    figure.suptitle(title, x=0.01, ha="left")
    write_atomically(path, lambda file: file.write(png(figure)))
