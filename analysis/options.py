"""The options of `python -m analysis` and `fedara report`."""

from pathlib import Path
from typing import Annotated

import typer

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder with records, at any depth below it.")
]
Out = Annotated[
    Path | None, typer.Option(help="Where to write.  [default: DIR/figures]", show_default=False)
]
Costs = Annotated[
    Path | None,
    typer.Option(
        help="TOML with alpha_seconds and beta_seconds_per_byte of another machine, for the "
        "scaling model.  [default: fitted to the records]",
        show_default=False,
    ),
]
