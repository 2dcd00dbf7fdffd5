"""The commands that read a finished run: report, compare, evaluate and export it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands.options import DataRoot, Json, run_options
from fastokd.host.names import on_a_line
from fastokd.run.options import RunOptions

Student = Annotated[
    int | None, typer.Option(help="Number of the student, from 0; by default the kept one.")
]
Best = Annotated[bool, typer.Option(help="The best epoch in place of the last.")]


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders with runs at any depth.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; by default report.html.")
    ] = None,
) -> None:
    """Write a page about one run or several.

    Its plots (PNG, SVG) and its tables (Markdown, LaTeX, CSV) are written beside it.
    """
    from fastokd.report.page import report as write
    from fastokd.report.tables import files_of

    page = write(runs, out)
    print(on_a_line(f"the page is {page}"))
    print(on_a_line(f"its table is in {files_of(page.with_name(f'{page.stem}-results'))}"))


def diff(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another run folder.")],
    json_: Json = False,
) -> None:
    """List the differences of two runs: recipe, versions, results."""
    from fastokd.report.difference import diff_runs

    found = diff_runs(first, second)
    if json_:
        print(json.dumps(found))
        return
    for part, values in found.items():
        print(f"{part}:" if values else f"{part}: the same")
        for name, (ours, theirs) in values.items():
            print(on_a_line(f"  {name}: {ours} | {theirs}"))


def export(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint or a student.safetensors.")],
    to: Annotated[
        str, typer.Option(help="safetensors, torchvision, timm, onnx, torch-export or hub.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder; by default SOURCE/export/FORMAT.")
    ] = None,
    student: Student = None,
    best: Best = False,
    data_root: Annotated[Path | None, typer.Option(help="Where the run's data set lies.")] = None,
) -> None:
    """Turn a run's student into a file of another library, and check it there."""
    from fastokd.export import export as turn

    done = turn(
        source, to, out, student=student, best=best, options=RunOptions(data_root=data_root)
    )
    _print_lines([*done.lines, f"the export is in {done.folder}"])


def predict(
    student: Annotated[Path, typer.Argument(help="A run, an export or a student.safetensors.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(help="Number of classes to print.")] = 5,
    json_: Json = False,
) -> None:
    """Classify your own images with a student."""
    from fastokd.student.predict import predict as look

    found = look(student, images, top=top)
    if json_:
        rows = [
            {"image": str(p.image), "classes": p.classes, "probabilities": p.probabilities}
            for p in found
        ]
        print(json.dumps(rows))
        return
    for prediction in found:
        print(on_a_line(prediction.image))
        for name, share in zip(prediction.classes, prediction.probabilities, strict=True):
            print(f"  {100 * share:5.1f} %  {on_a_line(name)}")


@run_options("data_root", "device", "precision", "loader", "workers")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run, a checkpoint, or an author's .pth.")],
    options: RunOptions,
    dataset: Annotated[str | None, typer.Option(help="The data set for a .pth.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model of a .pth; by default found from its keys.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score the students, the leader and the ensemble of a run, or of an author's checkpoint."""
    from fastokd.evaluate import evaluate as score

    results = score(run, dataset=dataset, model=model, options=options)
    if json_:
        print(json.dumps(results))
        return
    for split, metrics in results.items():
        for name, value in metrics.items():
            print(f"{split} {name}: {_rounded(value)}")


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


def convert(
    source: Annotated[
        Path, typer.Argument(help="An author's .pth, or a run or student to convert back.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The new file; by default beside the source.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model of a .pth; by default found from its keys.")
    ] = None,
    student: Annotated[
        int | None, typer.Option(help="Number of the student; by default the leader.")
    ] = None,
    paper: Annotated[
        str, typer.Option(help="The format to convert back to: FFSD or OKDDip.")
    ] = "FFSD",
    dataset: Annotated[
        str | None, typer.Option(help="The data set of a .pth; by default found from its classes.")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Convert a checkpoint of the papers' authors to a fastokd student, or a student to theirs."""
    from fastokd.student.convert import convert as turn

    done = turn(
        source, out, model=model, student=student, paper=paper, dataset=dataset, data_root=data_root
    )
    _print_lines(done)


def _print_lines(lines: Iterable[str]) -> None:
    print("\n".join(map(on_a_line, lines)))
