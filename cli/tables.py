"""Everything that is drawn in a terminal. Standard output carries results, standard error progress."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dysurgery.cost import CostReport, MultAdds
from dysurgery.plan import Plan

# Wide enough for the longest paths: a pipe has no width of its own, and nothing may be cut there.
_PIPE_WIDTH = 200


def console(quiet: bool = False) -> Console:
    """Return the console for results: coloured in a terminal, plain text elsewhere, silent if ``quiet``."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(quiet=quiet, highlight=False, width=width, soft_wrap=False)


@contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """Show a spinner on standard error while the block runs, in a terminal."""
    with Console(stderr=True, quiet=quiet or not sys.stderr.isatty()).status(text):
        yield


def count(value: float) -> str:
    """Format a number of parameters or Mult-Adds with four digits: 576, 36.86k, 11.69M, 1.861G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.99995:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def change(before: float, after: float) -> tuple[str, str]:
    """Return the difference and the percentage, both signed."""
    sign = "+" if after >= before else "-"
    percent = f"{(after - before) / before:+.1%}" if before else "-"
    return f"{sign}{count(abs(after - before))}", percent


def _table(*columns: tuple[str, str], title: str | None = None, plain: bool) -> Table:
    table = Table(title=title, title_justify="left", box=None if plain else box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold", no_wrap=plain)
    return table


def plan_table(out: Console, plan: Plan) -> None:
    """Print every convolution with its decision, its reason and its cost before and after."""
    columns = [("convolution", ""), ("kind", ""), ("map", "right"), ("params", "right"), ("Mult-Adds", "right")]
    table = _table(*columns, ("decision", ""), plain=not out.is_terminal)
    for planned in plan.sites:
        site, dynamic = planned.site, planned.decision.dynamic
        sizes = {"x".join(map(str, call.input_shape[2:])) for call in site.calls}
        arrow = " > " if dynamic else ""
        path = site.path or "(the model)"
        if site.aliases:
            path += f" (+{len(site.aliases)} names)"
        table.add_row(
            path,
            site.kind,
            sizes.pop() if len(sizes) == 1 else "several" if sizes else "-",
            count(planned.params[0]) + (arrow + count(planned.params[1]) if dynamic else ""),
            count(planned.mult_adds[0].total) + (arrow + count(planned.mult_adds[1].total) if dynamic else ""),
            "dynamic" if dynamic else f"static: {planned.decision.reason}",
            style=None if dynamic else "dim",
        )
    out.print(table)
    for note in plan.graph.notes:
        out.print(Text(f"note: {note}", style="dim"))


def totals_table(out: Console, names: Sequence[str], params: Sequence[int], mult_adds: Sequence[MultAdds]) -> None:
    """Print parameters and Mult-Adds of two models, their difference, and what the difference is made of."""
    columns = [("", ""), *((name, "right") for name in names), ("change", "right"), ("", "right")]
    table = _table(*columns, plain=not out.is_terminal)
    table.add_row("parameters", *map(count, params), *change(*params))
    totals = [entry.total for entry in mult_adds]
    table.add_row("Mult-Adds", *map(count, totals), *change(*totals))
    for part in ("pooling", "attention", "aggregation"):
        values = [getattr(entry, part) for entry in mult_adds]
        if any(values):
            table.add_row(f"  {part}", *map(count, values), *change(values[0], values[1]))
    out.print(table)


def basis(out: Console, input_shape: Sequence[int]) -> None:
    """Print what the figures refer to."""
    size = "x".join(map(str, input_shape)) or "the example"
    out.print(f"input {size}, batch 1; 1 Mult-Add = 2 FLOPs; convolutions, Linear layers and matrix products counted")


def plan_report(out: Console, plan: Plan, name: str) -> None:
    """Print the whole plan: sites, totals, basis."""
    chosen, total = len(plan.chosen), len(plan.sites)
    settings = plan.settings
    plan_table(out, plan)
    out.print(
        f"{name}: {chosen} of {total} convolutions become dynamic "
        f"(K={settings.k}, {settings.gate} gate, start {settings.start})"
    )
    totals_table(out, ("static", "dynamic"), plan.params, plan.mult_adds)
    basis(out, plan.before.input_shape)


def cost_table(out: Console, name: str, report: CostReport) -> None:
    """Print the cost of every convolution of one model, and the total."""
    columns = [("convolution", ""), ("kind", ""), ("params", "right"), ("Mult-Adds", "right"), ("share", "right")]
    table = _table(*columns, title=name, plain=not out.is_terminal)
    for site in report.sites:
        kind = f"{site.kind}, dynamic" if site.dynamic else site.kind
        share = site.mult_adds.total / max(report.mult_adds.total, 1)
        table.add_row(site.path, kind, count(site.params), count(site.mult_adds.total), f"{share:.1%}")
    table.add_section()
    table.add_row("the whole model", "", count(report.params), count(report.mult_adds.total), "100.0%")
    out.print(table)
    basis(out, report.input_shape)
