"""What a person sees while it trains: every column on a terminal, a plain line an epoch elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fastokd.data import load_dataset
from fastokd.metrics import choosing_split
from fastokd.recipe.names import recipe
from fastokd.run import display
from fastokd.run.display import COLUMNS, Display, cells, heads


def row(epoch: int, leader: float | None) -> dict[str, Any]:
    students = [0.5, 0.7] + ([leader] if leader is not None else [])
    test = {
        "leader_top1": leader,
        "student_top1": students,
        "ensemble_top1": 0.8,
        "diversity": 0.0321,
    }
    train = {"loss": 1.25}
    return {"epoch": epoch, "images_per_second": 1234.5, "lr": 0.1, "train": train, "test": test}


def shown(
    monkeypatch: pytest.MonkeyPatch,
    *,
    terminal: bool,
    leader: float | None,
    val: bool = False,
    width: int = 120,
) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    monkeypatch.setattr(display, "console", lambda: console)
    session = SimpleNamespace(
        recipe=recipe("dml/resnet8/digits", epochs=12),
        epoch=0,
        steps_left=96,
        data=replace(load_dataset("digits"), note="read from here"),
        learner=SimpleNamespace(ranks=SimpleNamespace(note=lambda batch, students: "")),
    )
    live = Display(session, quiet=False)  # type: ignore[arg-type]
    live.on_begin()
    for epoch in range(12):
        live.on_step(64)
        one = row(epoch, leader)
        live.on_epoch(one | {"val": one["test"]} if val else one)
    live.on_end()
    return out.getvalue()


def test_a_terminal_has_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True, leader=0.9)
    last = text[text.rindex("images/s  left") - 200 :]
    for column in COLUMNS:
        assert column == "student" or column.removeprefix("train ") in last
    for value in ("12/12", "1,234", "0 s", "0.1", "1.250", "0.9000", "0.6000", "0.8000", "0.0321"):
        assert value in last
    assert " 3/12" in last
    assert " 2/12" not in last  # the table is no higher than a terminal


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_figure_names_its_split(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """A terminal of 80 columns, a pipe, and the command ``evaluate``."""
    how: dict[str, Any] = {"leader": 0.9, "val": split == "val"}
    table = shown(monkeypatch, terminal=True, width=80, **how)
    other = {"val": "test", "test": "val"}[split]
    assert other not in table
    lines = table.splitlines()
    last = max(number for number, line in enumerate(lines) if "images/s  left" in line)
    words = " ".join(lines[last - 2 : last + 1]).split()
    assert (words.count(split), words.count("top-1"), words.count("train")) == (4, 3, 1)
    assert all(" ".join(head.split()).startswith(split) for head in heads(split)[5:])
    text = shown(monkeypatch, terminal=False, **how)
    assert f"  {split} top-1: leader 0.9000  peers 0.6000" in text
    assert f"  {split} diversity 0.0321\n" in text
    assert f"{other} " not in text


def test_a_file_has_a_plain_line_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=False, leader=0.9)
    note, first, *rest = text.splitlines()
    assert note == "read from here"
    assert first.startswith("epoch 1/12  images/s 1,234  left ")
    assert first.endswith(
        "lr 0.1  train loss 1.250  test top-1: leader 0.9000  peers 0.6000  ensemble 0.8000  "
        "test diversity 0.0321"
    )
    assert len(rest) == 11
    assert "\x1b" not in text


def test_a_column_that_nothing_fills_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "leader" not in shown(monkeypatch, terminal=True, leader=None)
    assert "leader" not in shown(monkeypatch, terminal=False, leader=None)


def test_a_lone_student_is_nobodys_peer() -> None:
    lone = row(0, None)
    lone["test"] |= {"student_top1": [0.5], "diversity": None}
    told = dict(zip(COLUMNS, [*cells(lone, 1)[:2], "0 s", *cells(lone, 1)[2:]], strict=True))
    assert told["student"] == "0.5000"
    assert {name for name, value in told.items() if value} == {*COLUMNS[:5], "student"}


def test_the_best_epoch_is_chosen_on_held_out_images_where_all_have_some() -> None:
    held, none = {"val": {"mean_top1": 0.5}, "test": {}}, {"test": {"mean_top1": 0.5}}
    assert choosing_split([held, held]) == "val"
    assert choosing_split([held, none]) == "test"
    assert choosing_split([none]) == "test"
