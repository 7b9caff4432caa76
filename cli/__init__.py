"""The command line: the only place that knows click and rich. One file per command, one for the tables.

An error of the library becomes one sentence on standard error and an exit code: 1 could not, 2 wrong usage.
"""

from typing import Any

import click
from dysurgery.cli.bench import bench_command
from dysurgery.cli.convert import convert
from dysurgery.cli.cost import cost
from dysurgery.cli.export import export
from dysurgery.cli.finetune import finetune_command
from dysurgery.cli.fold import fold
from dysurgery.cli.plan import plan
from dysurgery.cli.probe import probe_command
from dysurgery.cli.recipes import recipes
from dysurgery.cli.report import report_command

import dysurgery


class _Failure(click.ClickException):
    def __init__(self, error: dysurgery.DysurgeryError) -> None:
        super().__init__(str(error))
        self.exit_code = 2 if isinstance(error, dysurgery.UsageError) else 1


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except dysurgery.DysurgeryError as error:
            raise _Failure(error) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(dysurgery.__version__, package_name="dysurgery")
def main() -> None:
    """Turn a pretrained CNN into a dynamic-convolution network that computes exactly what it did."""


for command in (
    convert,
    plan,
    cost,
    finetune_command,
    probe_command,
    fold,
    export,
    bench_command,
    report_command,
    recipes,
):
    main.add_command(command)
