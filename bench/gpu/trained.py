"""``fastokd train``: two epochs on drawn CIFAR-100, captured, stopped halfway and resumed."""

from __future__ import annotations

import json
import time
from typing import Any

from bench.gpu.child import Result
from bench.gpu.machine import the_device
from fastokd.cli import run_command
from tests.data.make import write_cifar


def measure(result: Result) -> None:
    """The section. The second call is the same command with ``--resume``."""
    the_device(result)
    dry = result.dry
    images, held_out, batch = (64, 16, 16) if dry else (50_000, 10_000, 128)
    place = result.path.parent
    started = time.perf_counter()
    write_cifar(place / "drawn", "cifar100", train=images, test=held_out)
    result.data["drawing_seconds"] = time.perf_counter() - started
    steps = 2 * -(-images // batch)
    run = place / "trained"
    model = "resnet8" if dry else "resnet32"
    how = ["--precision", "fp32", "--impl", "torch", "--device", "cpu"] if dry else []
    command = ["train", f"okddip-branch/{model}/cifar100", "--data-root", str(place / "drawn")]
    command += ["--out", str(run), "--epochs", "2", "--batch-size", str(batch)]
    command += ["--engine", "loop", "--quiet", *how]
    seconds = 0.0
    for name, more in (("begun", ["--max-steps", str(3 * steps // 4)]), ("resumed", ["--resume"])):
        row = result.row(name=name)
        started = time.perf_counter()
        code = run_command([*command, *more])
        row["wall_seconds"] = time.perf_counter() - started
        seconds += row["wall_seconds"]
        row["lines"] = [_short(line) for line in _lines(run)]
        row["captured"] = (run / "environment.json").is_file() and json.loads(
            (run / "environment.json").read_text()
        )["capture"]
        if code != 0:
            raise RuntimeError(f"`fastokd {' '.join([*command, *more])}` ended with {code}")
        result.write()
    first, last = result.data["rows"][0]["lines"][0], result.data["rows"][1]["lines"][-1]
    if last["step"] != steps:
        raise RuntimeError(f"the resumed run ended after step {last['step']}, not {steps}")
    result.figure("images/s of epoch 1", first["images_per_second"])
    result.figure("images/s from end to end", 2 * images / seconds)
    result.figure("seconds in all", seconds)


def _lines(run: Any) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _short(line: dict[str, Any]) -> dict[str, Any]:
    kept = ("epoch", "step", "seconds", "images_per_second", "skipped_steps")
    found = {name: line[name] for name in kept}
    return {**found, "loss": line["train"]["loss"], "test": line.get("test", {}).get("mean_top1")}
