"""docs/digits.ipynb: its cells run, one after another, and show what they say."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "digits.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def value_of(code: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last expression, as a notebook shows it."""
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return (
        None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    )


def test_it_is_kept_without_outputs() -> None:
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.proof
@pytest.mark.usefixtures("all_digits")
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: a reader runs cells again."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in [*CODE[:1], *CODE]:
        names["shown_last"] = value_of(code, names)
        if "pictures(cohort, alone)" in code or code.startswith("shown["):
            assert names["shown_last"]._repr_svg_().startswith("<svg")
    assert names["cohort"].last["epoch"] == 11
    assert names["cohort"].last["test"]["leader_top1"] > 0.6
    assert names["shown_last"] == names["fastokd"].models.model_info("resnet8", 10).params
