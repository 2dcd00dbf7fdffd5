"""The command ``prepare``: nothing but parsing and printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastokd.errors import UserError
from fastokd.host.names import counted, on_a_line


def prepare(
    folder: Annotated[
        str,
        typer.Argument(
            help="The folder that holds train/ or the classes; imagenet, in --data-root; or glyphs."
        ),
    ],
    data_root: Annotated[Path | None, typer.Option(help="ImageNet's folder.")] = None,
    val_labels: Annotated[
        Path | None, typer.Option(help="Labels of a flat val/; by default searched for.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the manifest, by default the image folder; of glyphs data/glyphs."
        ),
    ] = None,
    fonts: Annotated[
        Path | None,
        typer.Option(help="Fonts of glyphs, at any depth; by default those of Debian's TeX Live."),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Threads, for glyphs processes; 0: one per core.")
    ] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every image of a folder before training.

    glyphs is a data set that this command draws from installed fonts: 62 letters and digits.
    Files that can't be decoded are quarantined and listed. Mean and deviation are measured.
    imagenet means the data set, unless --data-root is missing and a folder imagenet contains train/.
    """
    if folder == "glyphs":
        if data_root is not None or val_labels is not None:
            raise UserError(
                "glyphs is drawn from fonts: leave --data-root and --val-labels out; a folder of that "
                "name is ./glyphs"
            )
        _draw(fonts, out, workers, json_)
        return
    if fonts is not None:
        raise UserError(f"--fonts is for the data set glyphs, not for {folder}: leave it out")
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


def _draw(fonts: Path | None, out: Path | None, workers: int, json_: bool) -> None:
    from fastokd.data.sets.draw_glyphs import TEXLIVE, draw_glyphs

    made, rejected = draw_glyphs(fonts or TEXLIVE, workers)
    path = made.write(out or Path("data/glyphs"))
    counts = {split: made.count(split) for split in ("train", "val", "test")}
    facts = {
        "path": str(path),
        "fonts": counts,
        "families": len(set(made.families)),
        "sha256": made.sha256,
        "rejected": [{"path": str(font.path), "why": font.why} for font in rejected],
    }
    if json_:
        print(json.dumps(facts))
        return
    fonts_of = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{len(set(made.families)):,} families; fonts: {fonts_of}; 62 images each")
    print(f"rejected: {counted(len(rejected), 'font')} (--json lists them with the reasons)")
    print(on_a_line(f"written to {path}, sha256 {made.sha256}"))
