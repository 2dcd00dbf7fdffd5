"""The commands ``bench`` and ``plan``: parsing and printing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands.facts import print_facts
from fastokd.commands.options import Json
from fastokd.errors import UserError

Students = Annotated[int | None, typer.Option(help="Number of networks, leader included.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]

bench = typer.Typer(
    rich_markup_mode=None,
    epilog="Example: fastokd bench --only okddip_branch",
)


@bench.callback(invoke_without_command=True)
def claims(
    context: typer.Context,
    only: Annotated[str, typer.Option(help="Only claims whose name contains this.")] = "",
    steps: Annotated[int | None, typer.Option(help="Rounds of each claim.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpu_report: Annotated[
        Path | None,
        typer.Option(help="Run bench/gpu_first.py of the checkout and write its report here."),
    ] = None,
    json_: Json = False,
) -> None:
    """Time training steps against the published loops.

    Without a command, all claims are measured.

    Each pair is checked for equal results first. Use an idle machine.
    """
    if context.invoked_subcommand is not None:
        return
    if gpu_report is not None:
        if only or steps is not None or device != "auto" or json_:
            raise UserError(
                "--gpu-report runs every section of its own: leave --only, --steps, --device and "
                "--json out"
            )
        raise typer.Exit(_gpu_report(gpu_report))
    from fastokd.benchmark import claims as known
    from fastokd.device import pick_device
    from fastokd.errors import unknown_name

    if steps is not None and steps < 1:
        raise UserError(f"steps is {steps}: it must be at least 1")
    pick_device(device)
    chosen = [claim for claim in known.CLAIMS.values() if only in claim.name]
    if not chosen:
        raise unknown_name("claim", only, known.CLAIMS)
    outcomes = [
        known.measure(claim, known.rounds(steps or claim.steps), device=device) for claim in chosen
    ]
    if json_:
        print(json.dumps([outcome.to_json() for outcome in outcomes]))
    else:
        print(known.table(outcomes))
        print(outcomes[0].ours.to_json()["how"])


def _gpu_report(path: Path) -> int:
    """Runs ``bench/gpu_first.py`` of the checkout that holds this package; returns its exit code."""
    if not path.parent.is_dir():
        raise UserError(f"{path} can't be written: there is no folder {path.parent}")
    program = Path(__file__).resolve().parents[2] / "bench" / "gpu_first.py"
    if not program.exists():
        raise UserError(
            "--gpu-report runs bench/gpu_first.py, which an installed package doesn't have: run "
            "`python bench/gpu_first.py` in a clone of the repository"
        )
    command = [sys.executable, str(program), "--report", str(path)]
    return subprocess.run(command, check=False).returncode


@bench.command(
    epilog="Example: fastokd bench step ffsd/resnet32/cifar100 --batch-size 128 --json",
)
def step(
    recipe: Annotated[str, typer.Argument(help="METHOD/MODEL/DATASET; `fastokd list recipes`.")],
    batch_size: BatchSize = None,
    steps: Annotated[int, typer.Option(help="Number of timed steps.")] = 20,
    students: Students = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16, tf32 or fp32.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="How the students run; auto measures and chooses.")
    ] = "auto",
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Use torch.compile; auto tries it on GPUs."),
    ] = None,
    capture: Annotated[
        bool | None, typer.Option(help="Run the step as a CUDA graph; by default as in a run.")
    ] = None,
    impl: Annotated[
        str, typer.Option(help="Implementation of the ops: auto, torch, cpp or triton.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default all cores.")] = None,
    reference: Annotated[
        bool,
        typer.Option(help="Time the published loop instead: fp32 unless --precision bf16."),
    ] = False,
    json_: Json = False,
) -> None:
    """Time a recipe's training step on random images."""
    from fastokd.benchmark.step import time_steps
    from fastokd.benchmark.worker import Spec

    spec = Spec(
        _resolved(recipe, batch_size=batch_size, students=students),
        "reference" if reference else "fastokd",
        device=device,
        precision=precision,
        engine=engine,
        compile=compile_,
        capture=capture,
        impl=impl,
        threads=threads,
    )
    (timing,) = time_steps([spec], steps)
    print_facts(timing.to_json(), json_)


def plan(
    recipe: Annotated[str, typer.Argument(help="METHOD/MODEL/DATASET; `fastokd list recipes`.")],
    device: Annotated[str, typer.Option(help="h100, h200, a100, rtx4090 or cpu.")] = "h100",
    gpus: Annotated[int, typer.Option(help="GPUs that share the batch.")] = 1,
    batch_size: BatchSize = None,
    students: Students = None,
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute activations in the backward: less memory, more FLOPs.")
    ] = False,
    json_: Json = False,
) -> None:
    """Estimate memory and time on another machine.

    One step is traced without data or a GPU; its time is modelled. docs/plan.md lists the assumptions.
    """
    from fastokd.plan.plan import plan as planned
    from fastokd.plan.table import lines

    found = planned(
        _resolved(recipe, batch_size=batch_size, students=students),
        device,
        gpus,
        checkpoint_activations=checkpoint_activations,
    )
    print(json.dumps(found) if json_ else "\n".join(lines(found)))


def _resolved(name: str, **changes: Any) -> Any:
    from fastokd.recipe.names import recipe

    return recipe(name, **{key: value for key, value in changes.items() if value is not None})
