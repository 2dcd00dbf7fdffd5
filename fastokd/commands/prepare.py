"""The command ``prepare``: nothing but parsing and printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastokd.errors import UserError
from fastokd.host.names import on_a_line


def prepare(
    folder: Annotated[
        str,
        typer.Argument(
            help="The folder that holds train/ or the classes; or imagenet, in --data-root."
        ),
    ],
    data_root: Annotated[Path | None, typer.Option(help="ImageNet's folder.")] = None,
    val_labels: Annotated[
        Path | None, typer.Option(help="Labels of a flat val/; by default searched for.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the manifest; by default the image folder.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of threads; 0: one per core.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every image of a folder before training.

    Files that can't be decoded are quarantined and listed. Mean and deviation are measured.
    imagenet means the data set, unless --data-root is missing and a folder imagenet contains train/.
    """
    from fastokd.data.disk.prepare import prepare as run

    imagenet, here = folder == "imagenet", Path(folder) / "train"
    if imagenet and data_root is None and here.is_dir():
        imagenet = False
        if not json_:
            print(
                f"the folder {on_a_line(here.parent.resolve())} is meant, since no --data-root is given"
            )
    if imagenet and data_root is None:
        raise UserError("imagenet needs to know where its files are: give --data-root DIR")
    if not imagenet and data_root is not None:
        raise UserError(f"{folder} is the folder: leave --data-root out")
    done = run(
        data_root if imagenet and data_root else Path(folder),
        ground_truth=val_labels,
        out=out,
        imagenet=imagenet,
        workers=workers,
        quiet=json_,
    )
    print(json.dumps(done.to_json()) if json_ else "\n".join(map(on_a_line, done.lines())))
