"""Trains every method on the digits: the runs of docs/methods_on_digits.md.

    python docs/methods_on_digits.py [--seeds 0,1,2] [--out runs/methods_on_digits]

Stores the figures of each finished run in docs/methods_on_digits.json, continues after an interruption, and writes the
page from them. Delete that file to start again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastokd.device import environment, pick_device
from fastokd.methods import method_class
from fastokd.recipe.names import recipe
from fastokd.recipe.settings import parse_seeds
from fastokd.report.statistics import Sample, welch
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.run.sweep import run_or_resume
from fastokd.train import train

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "methods_on_digits.json", HERE / "methods_on_digits.md"
EPOCHS = 30
OPTIONS = RunOptions(device="cpu", precision="fp32", engine="loop", eval_every=30, quiet=True)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("baseline", {}),
    ("ind", {}),
    ("dml", {}),
    ("cl_ilr", {}),
    ("one", {}),
    ("okddip-branch", {}),
    ("okddip-network", {}),
    ("okddip_random-branch", {}),
    ("okddip_entropy-branch", {}),
    ("okddip_mean-branch", {}),
    ("okddip_symmetric-branch", {}),
    ("okddip_no_two_level-branch", {}),
    ("kd", {}),
    ("okddip_kd-branch", {}),
    ("kdcl", {"target": "naive"}),
    ("kdcl", {"target": "linear"}),
    ("kdcl", {"target": "min_logit"}),
    ("kdcl", {"target": "general"}),
    ("ffsd", {}),
    ("dkd", {}),
    ("dist", {}),
    ("mcl", {}),
    ("okdph", {}),
    ("pcl", {}),
]


def main() -> None:
    """Trains the missing runs, seed by seed, and writes both files after each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/methods_on_digits"))
    arguments = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {"runs": {}}
    # The other methods are compared with the baseline of all three seeds.
    wanted = [("baseline", {}, seed) for seed in (0, 1, 2)]
    seeds = parse_seeds(arguments.seeds)
    wanted += [(name, options, seed) for seed in seeds for name, options in METHODS]
    for name, options, seed in wanted:
        label = "-".join([name, *options.values()])
        folder = arguments.out / f"{label}-seed{seed}"
        # The baseline of seed 0 is also a teacher: its folder has to be there.
        if f"{label}-seed{seed}" in kept["runs"] and f"{label}-seed{seed}" != "baseline-seed0":
            continue
        resolved = recipe(
            f"{name}/resnet8/digits", epochs=EPOCHS, seed=seed, method_options=options
        )
        needs = method_class(resolved.method).needs
        teacher = arguments.out / "baseline-seed0" if needs.teacher else None
        started = time.process_time()
        run = run_or_resume(resolved, replace(OPTIONS, out=folder, teacher=teacher), train)
        test = run.last["test"]
        kept["runs"][f"{label}-seed{seed}"] = {
            "method": label,
            "seed": seed,
            "students": resolved.students,
            "reported": resolved.reported,
            "top1": summarise(run).last,
            "ensemble_top1": test["ensemble_top1"],
            "diversity": test["diversity"],
            "seconds": sum(row["seconds"] for row in run.metrics),
        }
        kept["environment"] = environment(pick_device("cpu"), "fp32")
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(page(kept))
        print(
            label,
            seed,
            f"{100 * summarise(run).last:.1f}",
            f"{time.process_time() - started:.0f} s",
        )


def page(kept: dict[str, Any]) -> str:
    """The page, from the stored figures."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in kept["runs"].values():
        by_method.setdefault(run["method"], []).append(run)
    base = Sample.of([100 * run["top1"] for run in by_method["baseline"]])
    rows = [
        "| method | networks | seeds | reported | test top-1 (%) | difference from baseline, 95% interval "
        "| ensemble (%) | diversity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, runs in by_method.items():
        top1 = Sample.of([100 * run["top1"] for run in runs])
        ensemble = Sample.of([100 * run["ensemble_top1"] for run in runs])
        spread = [run["diversity"] for run in runs]
        diversity = "" if None in spread else f"{sum(spread) / len(spread):.3f}"
        rows.append(
            f"| {label} | {runs[0]['students']} | {len(runs)} | {runs[0]['reported']} | {top1} "
            f"| {'' if label == 'baseline' else welch(top1, base)} | {ensemble if diversity else ''} "
            f"| {diversity} |"
        )
    where = kept["environment"]
    return f"""# Every method on the digits

Every method is trained on scikit-learn's 8x8 digits (500 training images, 1,000 test images) with ResNet-8,
{EPOCHS} epochs of the digits' recipe; the table gives the last epoch on the test images, mean ± deviation over seeds,
and Welch's interval of the difference. Every method but PCL ends within one point of a network trained alone;
PCL keeps a mean of its weights over all 240 steps, the first ones too. The
set is too easy to rank the methods: one point is ten images. The number of networks includes the leader. The teacher of
`kd`, `dkd`, `dist` and `okddip_kd` is the baseline of seed 0, a network of the same size.

{chr(10).join(rows)}

measured-cpu on {where["cpu"] or "a CPU"}, fp32, torch {where["torch"]}. To reproduce:

    python docs/methods_on_digits.py
"""


if __name__ == "__main__":
    main()
