"""The table of docs/data.md on the images/s that recipes need."""

from __future__ import annotations

import pytest

from bench import needed_images


def test_what_was_measured_is_named_or_blank() -> None:
    row = {"recipe": "baseline/resnet8/cifar100", "name": "ours", "images_per_second": 1234.5}
    faster = {**row, "name": "published fp32", "images_per_second": 2000.0}
    report = {"sections": {"steps": {"rows": [row, faster]}, "rest": {}}}
    made = needed_images.row("baseline/resnet8/cifar100", report)
    assert len(made) == len(needed_images.HEADS)
    assert made[-1] == "1,234"
    rates = [float(cell.replace(",", "")) for cell in made[3:7]]
    assert 0 < rates[0] <= rates[1]
    assert 0 < rates[2] <= rates[3]
    assert needed_images.row("baseline/resnet8/cifar100", {"sections": {}})[-1] == ""


@pytest.mark.proof
def test_the_page_is_what_the_program_makes() -> None:
    found = needed_images.REGION.search(needed_images.PAGE.read_text())
    assert found is not None
    assert found[0] == f"{found[1]}{needed_images.table()}{found[2]}"
