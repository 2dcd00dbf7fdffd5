"""A folder of everything that can be given to a command and is wrong: for tests/test_wrong_input.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastokd.recipe.names import recipe
from fastokd.train import train
from tests.data.make import write_cifar, write_folder

RESUMED = "--students 2 --batch-size 250 --epochs 1 --resume"


def make_place(place: Path) -> Path:
    """Fills ``place``: a whole run in ``run/``, and copies of it that are wrong in one way each."""
    small = recipe("okddip-branch/resnet8/digits", epochs=1, students=2, batch_size=250)
    train(small, out=place / "run", max_steps=1, engine="loop", precision="fp32", quiet=True)
    for page in (place / "run").glob("report*"):  # nothing that is read again
        page.unlink()
    _plain_files(place)
    _images(place)
    _runs(place)
    _students(place)
    return place


def _plain_files(place: Path) -> None:
    for name in ("empty.pth", "empty.safetensors", "empty.png"):
        (place / name).write_bytes(b"")
    (place / "text.txt").write_text("hello\n")
    (place / "folder").mkdir()
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    for name in ("loop.pth", "loop2"):
        os.symlink(name, place / name)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 1}, place / "strange.pth")
    torch.save([1, 2], place / "list.pth")


def _images(place: Path) -> None:
    for name in ("picture.png", "picture.safetensors"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / name, "PNG")
    write_folder(place / "pictures")
    write_folder(place / "lone", classes=("cat",))
    write_folder(place / "trainonly", splits=("train",), count=2)
    write_folder(place / "damaged", count=20, size=(8, 8))
    for name in range(11):
        (place / f"damaged/train/cat/{name}.png").write_bytes(b"no image")
    write_folder(place / "lost", size=(8, 8))
    for name in range(4):
        (place / f"lost/val/dog/{name}.png").write_bytes(b"no image")
    write_folder(place / "flat", splits=(".",), classes=("train", "val"), size=(8, 8))
    write_folder(place / "beside", splits=("train", "."), size=(8, 8))
    write_cifar(place / "cifar", "cifar10")
    test = write_cifar(place / "badcifar", "cifar10") / "test_batch"
    test.write_bytes(b"")


def _runs(place: Path) -> None:
    known = json.loads((place / "run/recipe.json").read_bytes())
    how = json.loads((place / "run/environment.json").read_bytes())
    for name, file, content in (
        ("badrecipe", "recipe.json", b"{"),
        ("binrecipe", "recipe.json", b"\xff\xfe\x00"),
        ("listrecipe", "recipe.json", [1]),
        ("extrarecipe", "recipe.json", {**known, "x": 1}),
        ("typerecipe", "recipe.json", {**known, "epochs": "ten"}),
        ("pathrecipe", "recipe.json", {**known, "model": "../../resnet8"}),
        ("badenv", "environment.json", b"{"),
        ("listenv", "environment.json", [1]),
        ("typeenv", "environment.json", {**how, "accumulate": "two"}),
        ("badmetrics", "metrics.jsonl", b"{\n"),
        ("oddmetrics2", "metrics.jsonl", b'{"epoch":0,"test":5,"seconds":1,"step":"a"}\n'),
        ("oddmetrics3", "metrics.jsonl", b'{"epoch":"a","test":{}}\n'),
        ("badstudent", "student.safetensors", b"\xff" * 100),
        ("nometrics", "metrics.jsonl", b""),
    ):
        shutil.copytree(place / "run", place / name)
        data: Any = content if isinstance(content, bytes) else json.dumps(content).encode()
        (place / name / file).write_bytes(data)
    shutil.copytree(place / "run", place / "emptycheckpoints")
    (place / "emptycheckpoints/student.safetensors").unlink()
    shutil.rmtree(place / "emptycheckpoints/checkpoints")
    (place / "emptycheckpoints/checkpoints").mkdir()
    shutil.copytree(place / "run", place / "rotten")
    for path in (place / "rotten/checkpoints").glob("*/state.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)


def _students(place: Path) -> None:
    kept = place / "run/student.safetensors"
    with safe_open(kept, "pt") as file:
        facts = file.metadata()
    for name, changes in (
        ("wrongmodel", {"model": "resnet20"}),
        ("nomodel", {"model": "resnet31"}),
        ("badopts", {"model_options": "5"}),
        ("badjson", {"class_names": "["}),
        ("shortnames", {"class_names": '["a"]'}),
        ("othernames", {"class_names": json.dumps(list("abcdefghij"))}),
        ("badmean", {"mean": "[]"}),
        ("strmean", {"mean": '"x"'}),
        ("othermean", {"mean": "[0.1, 0.2, 0.3]"}),
        ("badsize", {"input_size": "-3"}),
        ("hugesize", {"input_size": "1000000000"}),
    ):
        save_file(load_file(kept), place / f"{name}.safetensors", {**facts, **changes})
    save_file(load_file(kept), place / "nofacts.safetensors")
