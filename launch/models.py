"""`anabranch models`: what is known by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from anabranch.model.known import known_models
from launch.report import reported
from launch.show import out


@reported
def models(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the models that are known by name.

    Beside these, `model:` in a topology file takes any Hugging Face folder or GGUF file of a supported
    architecture.

    \b
    Examples:
      anabranch models
      anabranch models --json"""
    known = known_models()
    if as_json:
        rows = [
            {
                "name": model.name,
                "description": model.description,
                "licence": model.licence,
                "origin": model.origin,
                "available": model.available,
            }
            for model in known
        ]
        print(json.dumps(rows))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "what it is", "licence", "from", "here"):
        table.add_column(column)
    for model in known:
        here = "yes" if model.available else f"no: {model.remedy}"
        table.add_row(model.name, model.description, model.licence, model.origin, here)
    out.print(table)
