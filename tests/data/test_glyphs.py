"""The glyphs, drawn from the fonts that matplotlib ships: DejaVu, STIX, and TeX's mathematical ones."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastokd.cli import run_command
from fastokd.data import load_dataset
from fastokd.data.sets.draw_glyphs import draw, draw_glyphs, recognised, split_of
from fastokd.data.sets.glyphs import CHARACTERS, FILE
from fastokd.errors import UserError
from tests.data.make import SHIPPED, write_fonts

SYMBOLS = ("cmex10", "cmsy10", "STIXSizOneSymReg")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Families that are for train, val and test, and one of symbols."""
    here = write_fonts(tmp_path_factory.mktemp("fonts"))
    for name in SYMBOLS:
        (here / "symbols").mkdir(exist_ok=True)
        shutil.copy(SHIPPED / f"{name}.ttf", here / "symbols")
    (here / "symbols" / "broken.otf").write_bytes(b"OTTO")
    # A training font under another name, in a family for test.
    twin = here / next(
        name for name in map("twin-{}".format, range(100)) if split_of(name) == "test"
    )
    twin.mkdir()
    shutil.copy(SHIPPED / "DejaVuSans.ttf", twin / "Twin.ttf")
    return here


@pytest.fixture(scope="module")
def made(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("glyphs")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        words = ["prepare", "glyphs", "--workers", "1", "--fonts", str(fonts), "--out", str(out)]
        assert run_command([*words, "--json"]) == 0
    return out, json.loads(printed.getvalue())


def test_fonts_of_symbols_and_broken_ones_are_rejected(made: tuple[Path, dict]) -> None:
    facts = made[1]
    assert facts["fonts"] == {"train": 4, "val": 1, "test": 1}
    rejected = {Path(font["path"]).stem: font["why"] for font in facts["rejected"]}
    assert rejected.keys() == {*SYMBOLS, "broken", "Twin"}
    assert all(rejected.values())


def test_no_family_is_in_two_splits_and_other_families_change_none() -> None:
    found = [split_of(f"family {number}") for number in range(1000)]
    assert 0.17 < found.count("test") / 1000 < 0.23
    assert 0.07 < found.count("val") / 1000 < 0.13


def test_a_data_set_of_62_classes(made: tuple[Path, dict]) -> None:
    data = load_dataset("glyphs", made[0])
    assert data.class_names == tuple(CHARACTERS)
    assert [len(split) for split in (data.train, data.val, data.test)] == [4 * 62, 62, 62]
    images_NHWC = data.test.images_NHWC.numpy()
    glyphs_KHW = draw(SHIPPED / "STIXGeneral.ttf")
    assert isinstance(glyphs_KHW, np.ndarray)
    np.testing.assert_array_equal(images_NHWC[..., 0], glyphs_KHW)
    assert images_NHWC.max() == 255
    # A crop with padding 2 cuts no ink.
    assert not images_NHWC[:, [0, 1, -1, -2]].any()
    assert not images_NHWC[:, :, [0, 1, -1, -2]].any()


def test_what_is_drawn_is_the_character(made: tuple[Path, dict]) -> None:
    glyphs_FKHW = load_file(made[0] / FILE)["glyphs"]
    assert recognised(glyphs_FKHW).min() > 0.8
    assert recognised(np.concatenate([glyphs_FKHW, glyphs_FKHW[:1, ::-1]]))[-1] < 0.2
    ink_K = glyphs_FKHW.astype(float).mean((0, 2, 3))
    assert ink_K[CHARACTERS.index("W")] > ink_K[CHARACTERS.index("i")]


@pytest.mark.parametrize("damage", ["pixel", "names", "cut"])
def test_a_damaged_file_is_refused(made: tuple[Path, dict], tmp_path: Path, damage: str) -> None:
    from safetensors import safe_open

    whole = made[0] / FILE
    with safe_open(whole, "np") as file:
        facts, glyphs_FKHW = dict(file.metadata()), file.get_tensor("glyphs").copy()
    if damage == "pixel":
        glyphs_FKHW[0, 0, 16, 16] ^= 1
    elif damage == "names":
        facts["splits"] = facts["splits"].replace("val", "train")
    save_file({"glyphs": glyphs_FKHW}, tmp_path / FILE, facts)
    if damage == "cut":
        (tmp_path / FILE).write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match="fastokd prepare glyphs"):
        load_dataset("glyphs", tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"glyphs.safetensors is missing: fastokd prepare glyphs"):
        load_dataset("glyphs", tmp_path)
    with pytest.raises(UserError, match="texlive-fonts-extra"):
        draw_glyphs(tmp_path / "none")
    with pytest.raises(UserError, match="give another --fonts"):
        draw_glyphs(tmp_path)
