"""Reads the classes of ILSVRC's flat ``val/`` from a ground-truth file."""

from __future__ import annotations

from pathlib import Path

from fastokd.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# Where the files are after their archives were unpacked beside train/ and val/.
PLACES = (
    f"{DEVKIT}/{TRUTH}",
    f"devkit/data/{TRUTH}",
    TRUTH,
    "LOC_val_solution.csv",
    "val.txt",
    "val_labels.txt",
)


def read_ground_truth(
    root: Path, given: Path | None, names: list[str], classes: list[str]
) -> dict[str, str]:
    """The class of each of ``names`` that the file contains.

    The file is the development kit's (a number a line, for the images in the order of their names;
    ``meta.mat`` beside it maps numbers to WordNet ids), Kaggle's ``LOC_val_solution.csv``, or has
    lines of ``NAME CLASS``, where a number is an index into the sorted classes.

    Raises:
        UserError: there is no such file, it can't be read, or it doesn't fit the images.
    """
    path = given
    if path is None:
        found = [root / place for place in PLACES if (root / place).is_file()]
        if not found:
            raise UserError(
                f"{root / 'val'} has no folders of classes: put {TRUTH} and meta.mat of ILSVRC's "
                f"development kit into {root / DEVKIT}, or name a file of `NAME CLASS` lines with "
                "--val-labels"
            )
        path = found[0]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the ground truth {path}: {error}") from error
    rows = [line.strip() for line in lines if line.strip()]
    if rows and rows[0].lower().startswith("imageid,"):
        return _kaggle(path, rows[1:], names)
    if rows and all(row.isdecimal() for row in rows):
        return _devkit(path, [int(row) for row in rows], names)
    return _pairs(path, rows, classes)


def _devkit(path: Path, numbers: list[int], names: list[str]) -> dict[str, str]:
    """Line n is the class of image n. File names contain n, so a subset of the images fits too."""
    ids = _wordnet_ids(path.with_name("meta.mat"))
    truth = {}
    for position, name in enumerate(names):
        tail = Path(name).stem.rpartition("_")[2]
        line = int(tail) - 1 if tail.isdecimal() else position
        if not 0 <= line < len(numbers):
            raise UserError(f"{path} has {len(numbers)} lines, but there is an image {name}")
        if numbers[line] not in ids:
            raise UserError(
                f"line {line + 1} of {path} is {numbers[line]}, which {path.with_name('meta.mat')} "
                "doesn't have: fetch the development kit again"
            )
        truth[name] = ids[numbers[line]]
    return truth


def _wordnet_ids(meta: Path) -> dict[int, str]:
    """Maps ``ILSVRC2012_ID`` to the WordNet id."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(meta), squeeze_me=True, struct_as_record=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in synsets
            if int(row["num_children"]) == 0
        }
    except FileNotFoundError:
        raise UserError(
            f"the ground truth's numbers need {meta}: put it there, from the development kit"
        ) from None
    except Exception as error:
        # loadmat may raise any exception for a damaged file.
        raise UserError(
            f"{meta} can't be read ({error}): fetch the development kit again"
        ) from error


def _kaggle(path: Path, rows: list[str], names: list[str]) -> dict[str, str]:
    """``ILSVRC2012_val_00000001,n01751748 111 108 441 193``: the class, then its boxes."""
    stems = {Path(name).stem: name for name in names}
    truth = {}
    for number, row in enumerate(rows, start=2):
        stem, comma, boxes = row.partition(",")
        if not comma or not boxes.split():
            raise UserError(f"line {number} of {path} is {row!r}: it should be IMAGE,CLASS BOX")
        if stem in stems:
            truth[stems[stem]] = boxes.split()[0]
    return truth


def _pairs(path: Path, rows: list[str], classes: list[str]) -> dict[str, str]:
    truth = {}
    for number, row in enumerate(rows, start=1):
        words = row.replace(",", " ").replace("\t", " ").split()
        if len(words) != 2:
            raise UserError(f"line {number} of {path} is {row!r}: write NAME CLASS")
        name, label = words
        if label.isdecimal() and label not in classes:
            if int(label) >= len(classes):
                raise UserError(
                    f"line {number} of {path} names class {label}, but train/ has {len(classes)}"
                )
            label = classes[int(label)]
        truth[Path(name).name] = label
    return truth
