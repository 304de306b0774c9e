"""The `anabranch` command: its options and subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from anabranch import __version__
from launch.doctor import doctor
from launch.generate import generate
from launch.models import models
from launch.up import up
from launch.verify import verify

app = typer.Typer(
    name="anabranch",
    help=(
        "Serve large language models with prefill and decode on separate workers.\n\n"
        "Start with `anabranch up`, then in another terminal: `anabranch generate --chat 'Hello!'`"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"anabranch {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("up")(up)
app.command("generate")(generate)
app.command("verify")(verify)
app.command("doctor")(doctor)
app.command("models")(models)


if __name__ == "__main__":
    from launch.main import main

    main()
