"""The GPU regions of docs/benchmarks.md: the card, the steps, end-to-end training, the tests."""

from __future__ import annotations

from bench.gpu.page import (
    COHORTS,
    Found,
    Measured,
    Measurement,
    Region,
    count,
    number,
    ratio,
    table,
    why_blank,
)

PEAK, COPY = "8192^3 bfloat16 TFLOP/s", "copy TB/s"
CEILINGS = {
    COPY: "device copy, TB/s read and written",
    PEAK: "8192^3 product in bf16, TFLOP/s",
    "8192^3 float32 TFLOP/s": "the same in fp32, without TF32",
    "host us an eager add": "an eager operator, us of the host",
    "device us a graph's node": "a node of a replayed graph, us of the device",
}
PROVEN = ("step", "capture", "ops", "rest")
NAMED = 12  # of the failed tests


def card(measured: Measured) -> str | None:
    """Versions and ceilings."""
    machine = measured["machine"]
    if not machine.entry:
        return None
    said = machine.call.get("card") or {}
    versions = machine.entry.get("versions", {})
    asked = {"driver": "driver_version", "memory": "memory.total", "power limit": "power.limit"}
    rows = [[text, said.get(name, "")] for text, name in asked.items()]
    rows += [[name, str(version or "")] for name, version in versions.items()]
    rows += [[text, number(machine.figure(name))] for name, text in CEILINGS.items()]
    return f"{machine.source}.\n\n" + table([machine.card, ""], rows)


def steps(measured: Measured) -> str | None:
    """A table for each cohort."""
    parts = [_cohort(measured, cohort) for cohort in COHORTS]
    if not any(measured.steps(cohort) for cohort in COHORTS):
        return None
    return "\n\n".join(parts)


def _cohort(measured: Measured, cohort: str) -> str:
    programs = measured.steps(cohort)
    if not programs:
        return f"**{cohort}**, {COHORTS[cohort][0]}: not measured."
    sources = dict.fromkeys(found.source for found, _ in programs.values())
    heads = ["program", "cudnn.benchmark", "ms (quartiles)", "images/s", "peak, GB", "TFLOP/s"]
    heads += ["of the card's bf16 product", "published loop in bf16", "in fp32", "steps"]
    ordered = sorted(programs, key=lambda program: program.startswith("published"))
    rows = [_row(measured, programs, program) for program in ordered]
    blank = [
        f"{_label(program)}: {why}"
        for program, (_, row) in programs.items()
        if (why := why_blank(row)) is not None
    ]
    text = f"**{cohort}**, {COHORTS[cohort][0]}; {'; '.join(sources)}.\n\n{table(heads, rows)}"
    return text + (f"\n\nBlank: {'; '.join(blank)}." if blank else "")


def _row(
    measured: Measured, programs: dict[str, tuple[Found, Measurement]], program: str
) -> list[str]:
    """One program's cells, compared only with programs that ran on the same card."""
    found, row = programs[program]
    if why_blank(row) is not None:
        return [_label(program), *[""] * 9]
    tflop = next((r["tflop"] for _, r in programs.values() if "tflop" in r), None)
    pace = ratio(tflop, row["ms"] / 1e3)
    share = ratio(pace, measured.ceiling(PEAK, found.card))
    low, high = row["quartiles_ms"]
    benchmark = row.get("cudnn_benchmark")
    return [
        _label(program),
        "" if benchmark is None else "on" if benchmark else "off",
        f"{number(row['ms'], 4)} ({number(low, 4)} to {number(high, 4)})",
        number(row["images_per_second"]),
        number(row.get("peak_gb")),
        number(pace),
        number(share, 2),
        *(
            number(ratio(_published(programs, precision, found.card), row["ms"]))
            for precision in ("bf16", "fp32")
        ),
        count(row.get("steps")),
    ]


def _published(
    programs: dict[str, tuple[Found, Measurement]], precision: str, card: str
) -> float | None:
    found, row = programs.get(f"published {precision}", (Found(), {}))
    return row["ms"] if found.card == card and why_blank(row) is None else None


def _label(program: str) -> str:
    """The name of a program in the table, from one such as ``"grouped captured, benchmark"``."""
    program = program.replace(", benchmark", "").replace(" (compile)", ", beside the compiled")
    if program.startswith("published "):
        precision = program.removeprefix("published ")
        layout = ", channels-last" if precision == "bf16" else ""
        return f"published loop, {precision}{layout}"
    engine, how = "loop", program
    if program.startswith("grouped "):
        engine, how = program.split(" ", 1)
    return f"ours, {engine}, {how}"


def train(measured: Measured) -> str | None:
    """``fastokd train``; the resumed run's metrics include the earlier epochs."""
    found = measured["train"]
    if not found.entry:
        return None
    told: list[Measurement] = []
    rows = []
    for row in found.rows:
        for line in row.get("lines", []):
            if line not in told:
                told.append(line)
                cells = [row["name"], count(line["epoch"] + 1), count(line["step"])]
                cells += [number(line["seconds"]), number(line["images_per_second"])]
                rows.append([*cells, count(line["skipped_steps"])])
    heads = ["", "epoch", "step", "seconds", "images/s", "steps not taken"]
    ending = ""
    if (whole := found.figure("images/s from end to end")) is not None:
        ending = (
            "\n\nFrom end to end, both calls' start, capture, evaluation and checkpoints included: "
            f"{number(whole)} images/s in {number(found.figure('seconds in all'))} s."
        )
    return f"{found.entry['title']}; {found.source}.\n\n{table(heads, rows)}{ending}"


def proven(measured: Measured) -> str | None:
    """The results of each section of tests."""
    if not any(measured[name].entry for name in PROVEN):
        return None
    rows, failed = [], []
    for name in PROVEN:
        found = measured[name]
        counts = [count(found.figure(kind)) for kind in ("passed", "failed", "skipped")]
        entry = found.entry
        rows.append([f"`{name}`", entry.get("title", ""), entry.get("status", ""), *counts])
        rows[-1] += [number(entry.get("seconds")), found.card]
        failed += [test for test, (how, _) in entry.get("tests", {}).items() if how == "failed"]
    heads = ["section", "what", "ended", "passed", "failed", "not run", "seconds", "on"]
    text = f"measured-gpu.\n\n{table(heads, rows)}"
    compiling = measured["compile"]
    if (seconds := compiling.figure("first step s")) is not None:
        text += f"\n\nThe first compiled step of branch ResNet-32 took {number(seconds)} s; "
        text += f"{compiling.source}."
    if failed:
        text += "\n\nFailed: " + ", ".join(f"`{test}`" for test in failed[:NAMED])
        more = len(failed) - NAMED
        text += f" and {more} more." if more > 0 else "."
    return text


REGIONS: dict[str, Region] = {"card": card, "steps": steps, "train": train, "proven": proven}
