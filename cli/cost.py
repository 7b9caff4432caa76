"""``dysurgery cost``: parameters and Mult-Adds of one model, or of two beside each other."""

import dataclasses
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import example_of, model_options, open_for_figures, output_options, write_json

from dysurgery.cost import CostReport
from dysurgery.cost import cost as count_cost


@click.command()
@model_options()
@click.argument("other", metavar="[OTHER]", required=False)
@output_options
def cost(model: str, other: str | None, json_file: str | None, quiet: bool, **options: Any) -> None:
    """Count the parameters and Mult-Adds of MODEL, or of MODEL and OTHER with their difference.

    Each is a timm name, torchvision:NAME, FILE.py:FACTORY or a saved folder. No weights are needed.
    """
    reports: list[tuple[str, CostReport]] = []
    with tables.working("counting", quiet):
        for spec in filter(None, (model, other)):
            built = open_for_figures(spec, options)
            reports.append((built.label, count_cost(built.model, example_of(built))))
    out = tables.console(quiet or json_file == "-")
    if len(reports) == 1:
        tables.cost_table(out, *reports[0])
    else:
        (name, a), (other_name, b) = reports
        names = (name, other_name) if name != other_name else (str(model), str(other))
        tables.totals_table(out, names, (a.params, b.params), (a.mult_adds, b.mult_adds))
        tables.basis(out, a.input_shape)
        if a.input_shape != b.input_shape:
            tables.basis(out, b.input_shape)
    write_json({"models": [{"model": label, **_as_json(report)} for label, report in reports]}, json_file)


def _as_json(report: CostReport) -> dict[str, Any]:
    def mult_adds(entry: Any) -> dict[str, int]:
        return {**dataclasses.asdict(entry.mult_adds), "total": entry.mult_adds.total}

    return {
        "input_shape": list(report.input_shape),
        "params": report.params,
        "mult_adds": mult_adds(report),
        "sites": [{**dataclasses.asdict(site), "mult_adds": mult_adds(site)} for site in report.sites],
    }
