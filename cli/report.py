"""``dysurgery report``: everything that is known about a network, on one page."""

import click
from dysurgery.cli import tables

from dysurgery.errors import UsageError
from dysurgery.page import report
from dysurgery.report import is_saved


@click.command(name="report")
@click.argument("folder", metavar="FOLDER|RUN")
@click.option("--html", metavar="FILE", required=True, help="Where to write the page.")
@click.option("--probe", metavar="DIR", help="Of dysurgery probe --out; by default one that is inside the folder.")
@click.option("--export", "exports", multiple=True, metavar="FILE", help="Of dysurgery export --json; may be repeated.")
@click.option("--bench", metavar="FILE", help="Of dysurgery bench --json.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def report_command(
    folder: str, html: str, probe: str | None, exports: tuple[str, ...], bench: str | None, quiet: bool
) -> None:
    """Write one self-contained HTML page about a saved network or a run of finetune.

    What was converted and what it costs, accuracies and curves of a run, pictures of a probe, latencies, in torch
    and of exported files, and how to load and make it again. The page needs no network.
    """
    if not is_saved(folder):
        raise UsageError(f"{folder} is neither a saved network nor a run of dysurgery finetune")
    with tables.working(f"reading {folder}", quiet):
        path = report(folder, html, probe=probe, exports=exports, bench=bench)
    tables.console(quiet).print(f"Saved to {path}", soft_wrap=True)
