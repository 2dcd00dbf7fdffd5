"""Names as file systems and people have them, in every place where one is shown."""

from __future__ import annotations

import html
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.table import Table

from fastokd.host.console import console
from fastokd.host.names import in_html, in_markdown, in_plot, in_utf8, on_a_line
from fastokd.recipe.names import recipe
from fastokd.report.canvas import canvas, plainly
from fastokd.report.page import report
from fastokd.report.plots import as_svg, save
from fastokd.run.options import RunOptions
from tests.report.fake import FakeTrain

BYTES = b"_\xff[bold][/] <script>&\"'% $x$ `*\nz"
NAME = os.fsdecode(BYTES)
LINE = "_\\udcff[bold][/] <script>&\"'% $x$ `*\\nz"


def test_a_name_is_one_line_of_text() -> None:
    assert on_a_line(NAME) == LINE
    assert on_a_line("é 狗 \u3000 🐕") == "é 狗 \u3000 🐕"
    assert on_a_line("\x1b[31m\u2028") == "\\x1b[31m\\u2028"


def test_a_page_and_a_card_show_it_as_it_is() -> None:
    assert html.unescape(in_html(NAME)) == LINE
    assert "<" not in in_html(NAME)
    assert in_markdown("a_b [x](y) <i>") == "a\\_b \\[x\\](y) \\<i\\>"


def test_a_console_knows_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[red]a[/red]")
    table.add_column("[/]")
    table.add_row("[bold]b :dog:")
    console(width=40).print(table)
    console().print("[/x] [link=y]", soft_wrap=True)
    said = capsys.readouterr().out
    assert all(name in said for name in ("[red]a[/red]", "[/]", "[bold]b :dog:", "[/x] [link=y]"))


def test_a_figure_has_no_formulas(tmp_path: Path) -> None:
    figure = canvas(6, 4)
    with plainly():
        axes = figure.subplots()
        axes.plot([1, 2], label=in_plot(NAME))
        axes.plot([2, 1], label=in_plot("狗" * 200))
        axes.set(title=in_plot(r"$\frac{1}$ and $"))
        axes.legend()
    texts = ET.fromstring(as_svg(figure)).itertext()
    found = [text.strip() for text in texts]
    assert LINE in found
    assert r"$\frac{1}$ and $" in found
    assert any(text.startswith("狗狗") and "…" in text for text in found)
    save(figure, as_svg(figure), tmp_path / "figure")


def test_a_label_leaves_room_for_the_axes() -> None:
    """A wide letter takes two narrow ones' room."""
    assert [len(in_plot(letter * 200)) for letter in "a狗"] == [61, 31]
    assert in_plot("a" * 60) == "a" * 60


def test_a_report_of_a_folder_with_such_a_name(tmp_path: Path) -> None:
    train = FakeTrain(lambda recipe, epoch: 0.5)
    place = tmp_path / NAME
    train(recipe("okddip-branch/resnet8/digits", epochs=1), RunOptions(out=place))
    page = report([place]).read_text()
    assert in_html(place) in page
    assert "<script>&" not in page


def test_a_library_that_takes_utf8_alone_gets_another_name(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    with in_utf8(folder) as place:
        (Path(str(place).encode().decode()) / "x").write_text("here")
    assert (folder / "x").read_text() == "here"
    with in_utf8(tmp_path) as place:
        assert place == tmp_path
