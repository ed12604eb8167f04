"""The options of `python -m analysis` and `fedara report`."""

from pathlib import Path
from typing import Annotated

import typer

Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="Folder with records, at any depth below it.", show_default=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Where to write; if not given DIR/figures, with --compare B/figures.",
        show_default=False,
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--compare",
        metavar="A B",
        help="Instead of DIR: what changed from campaign A to campaign B, and whether by more "
        "than noise.",
        show_default=False,
    ),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        help="TOML with alpha_seconds and beta_seconds_per_byte of another machine, for the "
        "scaling model; if not given they are fitted to the records.",
        show_default=False,
    ),
]
