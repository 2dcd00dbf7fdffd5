"""Trains a student with and without each modern setting: the runs of docs/ablation.md.

    OMP_NUM_THREADS=1 python docs/ablation.py --data-root DIR --part 0/2 &
    OMP_NUM_THREADS=1 python docs/ablation.py --data-root DIR --part 1/2    # one process per core

Stores each finished run's accuracy in docs/ablation.json and continues after an interruption; --page writes the
page. The folder is Fashion-MNIST's; it needs none where Debian's dataset-fashion-mnist is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.data.sets.fashion_mnist import DEBIAN
from fastokd.data.sets.idx import read_idx
from fastokd.device import environment, pick_device
from fastokd.recipe.names import recipe
from fastokd.report.statistics import Sample, welch
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.run.sweep import run_or_resume
from fastokd.train import train

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "ablation.json", HERE / "ablation.md"
SEEDS = (0, 1, 2)
# The first of the 60,000 training images, so that a run takes about a minute; none is held out.
IMAGES, ALL = 1000, {"val": 0, "epochs": 20}
BASE, PAIR = "baseline/resnet8/fashion_mnist", "dml@2/resnet8/fashion_mnist"
OPTIONS = RunOptions(device="cpu", precision="fp32", engine="loop", eval_every=20, quiet=True)
ADAM = {"lr": 2e-3, "weight_decay": 0.05}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": (BASE, {}),
    "cosine": (BASE, {"schedule": "cosine"}),
    "trivialaugment": (BASE, {"auto_augment": "trivialaugment"}),
    "randaugment": (BASE, {"auto_augment": "randaugment"}),
    "mixup 0.2": (BASE, {"mixup": 0.2}),
    "cutmix 1": (BASE, {"cutmix": 1.0}),
    "label smoothing 0.1": (BASE, {"label_smoothing": 0.1}),
    "ema 0.99": (BASE, {"ema": 0.99}),
    "dml": (PAIR, {}),
    "dml, a view per student": (PAIR, {"views": "student"}),
    "random erasing 0.25": (BASE, {"random_erasing": 0.25}),
    "bce": (BASE, {"criterion": "bce"}),
    "adamw, cosine": (BASE, {"optimizer": "adamw", "schedule": "cosine", **ADAM}),
    "lamb, cosine": (
        BASE,
        {"optimizer": "lamb", "schedule": "cosine", "lr": 5e-3, "weight_decay": 0.02},
    ),
    "one_cycle by step": (
        BASE,
        {"schedule": "one_cycle", "schedule_by": "step", "warmup": "before", "warmup_epochs": 6},
    ),
    "swa from epoch 15": (BASE, {"swa": True, "average_start": 15}),
    "cutout 8": (BASE, {"cutout": 8}),
    "test flip": (BASE, {"test_flip": True}),
    "repeated augmentation 3": (BASE, {"repeats": 3}),
    "mixup 0.2 or cutmix 1, 15 epochs": (BASE, {"mixup": 0.2, "cutmix": 1.0, "mix_epochs": 15}),
    "no decay of norms": (BASE, {"decay_norms": False}),
    "no flip": (BASE, {"flip": False}),
    "no crop": (BASE, {"crop_padding": 0}),
}


def main() -> None:
    """Trains the missing runs of a part, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--part", default="0/1", help="this process's runs: part/parts")
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(json.loads(KEPT.read_text())))
        return
    part, parts = (int(word) for word in arguments.part.split("/"))
    data_root = _first_images(arguments.data_root or DEBIAN, arguments.out / "data")
    wanted = [(row, seed) for row in ROWS for seed in SEEDS]
    for row, seed in wanted[part::parts]:
        label = f"{row}-seed{seed}"
        if KEPT.is_file() and label in json.loads(KEPT.read_text())["runs"]:
            continue
        name, settings = ROWS[row]
        options = replace(OPTIONS, out=arguments.out / label, data_root=data_root)
        run = run_or_resume(recipe(name, seed=seed, **ALL, **settings), options, train)
        _keep(label, {"row": row, "seed": seed, "top1": summarise(run).last})
        print(label, f"{100 * summarise(run).last:.2f}", flush=True)


def _first_images(data_root: Path, out: Path) -> Path:
    """A folder with the first ``IMAGES`` training images of ``data_root``, and all test images."""
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", IMAGES), ("t10k", None)):
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            name = f"{split}-{kind}-ubyte"
            values = read_idx(data_root / f"{name}.gz", dimensions)[:count]
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            write_durably(out / name, bytes([0, 0, 8, dimensions]) + sizes + values.tobytes())
    return out


def _keep(label: str, run: dict[str, Any]) -> None:
    """Adds a run to the file, which other processes write, too."""
    lock = os.open(HERE, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {"runs": {}}
    kept["runs"][label] = run
    kept["environment"] = environment(pick_device("cpu"), "fp32")
    write_durably(KEPT, (json.dumps(kept, indent=1) + "\n").encode())
    os.close(lock)


def page(kept: dict[str, Any]) -> str:
    """The page, from the stored figures."""
    by_row: dict[str, list[float]] = {}
    for run in kept["runs"].values():
        by_row.setdefault(run["row"], []).append(100 * run["top1"])
    samples = {row: Sample.of(by_row[row]) for row in ROWS if row in by_row}
    lines = [
        "| setting | seeds | test top-1 (%) | difference, 95% interval |",
        "|---|---|---|---|",
    ]
    for row, sample in samples.items():
        base = samples["dml" if ROWS[row][0] == PAIR else "baseline"]
        apart = "" if sample is base else str(welch(sample, base))
        lines.append(f"| {row} | {sample.runs} | {sample} | {apart} |")
    where = kept["environment"]
    return f"""# Ablation of the modern settings

One student, ResNet-8, is trained on the first {IMAGES:,} of the 60,000 training images of Fashion-MNIST with the
set's recipe and the settings that the row names: 20 epochs, 160 steps in all. The table gives the accuracy after the last epoch on the
10,000 test images, mean ± deviation over seeds, and Welch's interval of the difference from the first row (from `dml`
for `dml, a view per student`).

{chr(10).join(lines)}

An interval that contains 0 shows neither help nor harm. Read the table as a test of small, short runs: only leaving out
the crop is shown to help. Augmentation and mixing are made for long runs of large networks, and in 160 steps a network
of 78,000 parameters underfits with them. `bce` has the rate of the cross-entropy, and a gradient 10 times smaller
([losses](losses.md)). `dml`, whose two students teach each other from their random start on, is 10 points below one
student alone.

measured-cpu on {where["cpu"] or "a CPU"}, fp32, torch {where["torch"]}. To reproduce: remove `docs/ablation.json`, then
`python docs/ablation.py --data-root DIR` (Fashion-MNIST's `.gz` files; no option where Debian's `dataset-fashion-mnist` is
installed) and `python docs/ablation.py --page`.
"""


if __name__ == "__main__":
    main()
