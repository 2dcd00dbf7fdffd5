"""The commands that read a finished run: report, compare, evaluate and export it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands.options import DataRoot, Json, run_options
from fastokd.host.names import counted, on_a_line
from fastokd.run.options import RunOptions

Student = Annotated[
    int | None, typer.Option(help="Number of the student, from 0; by default the kept one.")
]
Best = Annotated[bool, typer.Option(help="Use the best epoch instead of the last.")]


@run_options("data_root", "device")
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders with runs at any depth.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; by default report.html.")
    ] = None,
    options: Any = None,
) -> None:
    """Write a page about runs, with their plots.

    Of a single run it measures what each student says on every test image, and the cost of a step by its
    parts, unless the run's folder has them. The plots (PNG, SVG) and tables (Markdown, LaTeX, CSV) are written beside the page.
    """
    from fastokd.report.page import report as write
    from fastokd.report.tables import files_of

    page = write(runs, out, options=options)
    print(on_a_line(f"the page is {page}"))
    print(on_a_line(f"its table is in {files_of(page.with_name(f'{page.stem}-results'))}"))


def diff(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another run folder.")],
    json_: Json = False,
) -> None:
    """List the differences between two runs."""
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
        str,
        typer.Option(help="safetensors, torchvision, timm, onnx, onnx-int8, torch-export or hub."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder; by default SOURCE/export/FORMAT.")
    ] = None,
    student: Student = None,
    best: Best = False,
    uint8: Annotated[
        bool,
        typer.Option(
            "--uint8",
            help="Export a model that takes uint8 NHWC images (onnx, onnx-int8, torch-export).",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Measure accuracy by class and latency, for the card (a minute)."
        ),
    ] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Pictures or a folder that calibrate onnx-int8; by default training images."
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="How many images calibrate onnx-int8 (256).")
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="cpu, or cuda to measure a GPU's latency, too; auto: if there is one."),
    ] = "auto",
    data_root: Annotated[
        Path | None, typer.Option(help="The folder that holds the run's data set.")
    ] = None,
) -> None:
    """Export a student to another library and check it.

    Beside the file are a card (README.md, card.json) and a program that classifies pictures.
    """
    from fastokd.export import export as turn

    done = turn(
        source,
        to,
        out,
        student=student,
        best=best,
        uint8=uint8,
        measure=measure,
        calibrate=calibrate or (),
        calibration_images=calibration_images,
        options=RunOptions(data_root=data_root, device=device),
    )
    _print_lines([*done.lines, f"the export is in {done.folder}"])


@run_options("device")
def predict(
    student: Annotated[Path, typer.Argument(help="A run, an export or a student.safetensors.")],
    images: Annotated[
        list[str], typer.Argument(help="Pictures, folders of pictures, or patterns in quotes.")
    ],
    options: RunOptions,
    top: Annotated[int, typer.Option(help="Number of classes to print.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Pictures per forward pass.")] = 64,
    csv: Annotated[
        Path | None, typer.Option(help="Write one row per picture to this .csv file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Classify your own pictures.

    A folder stands for all pictures in it and in its subfolders. A picture that can't be read is
    reported and left out, and the exit code is 2.
    """
    from fastokd.commands.predictions import check_csv, classify, write_csv

    if csv is not None:
        check_csv(csv)
    printed = not json_ and csv is None
    device = options.device
    done = classify(student, images, printed=printed, top=top, batch_size=batch_size, device=device)
    if csv is not None and done.found:
        write_csv(csv, done.found)
    if json_:
        print(json.dumps(done.to_json()))
    elif csv is not None and done.found:
        print(on_a_line(f"{counted(len(done.found), 'prediction')} written to {csv}"))
    done.complain()


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
    """Evaluate a run or an author's checkpoint."""
    from fastokd.evaluate import evaluate as score

    results = score(run, dataset=dataset, model=model, options=options)
    if json_:
        print(json.dumps(results))
        return
    for split, metrics in results.items():
        for name, value in metrics.items():
            if value is None:  # of a leader, without one
                continue
            print(f"{split} {name}: {_rounded(value)}")
    for line in _imbalance(run):
        print(line)


def _imbalance(run: Path) -> list[str]:
    """What a run's data.json says of its class counts; nothing of an author's file."""
    from fastokd.data.balance import sentences
    from fastokd.run.facts import RunFacts

    if run.is_file():
        return []
    return sentences(RunFacts(run if (run / "checkpoints").is_dir() else run.parents[1]).data())


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
    """Convert the authors' checkpoints to students, or back."""
    from fastokd.student.convert import convert as turn

    done = turn(
        source, out, model=model, student=student, paper=paper, dataset=dataset, data_root=data_root
    )
    _print_lines(done)


def _print_lines(lines: Iterable[str]) -> None:
    print("\n".join(map(on_a_line, lines)))
