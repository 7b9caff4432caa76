"""``dysurgery finetune``."""

import click


@click.command()
def finetune() -> None:
    """Fine-tune."""
    raise click.ClickException("not yet")
