"""Every cell of the papers is a recipe, and each resolves to what the papers say."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from fastokd.errors import UserError
from fastokd.facts import __file__ as facts_file
from fastokd.methods import list_methods, method_class
from fastokd.recipe.cells import Cell, cells_of, tables
from fastokd.recipe.names import list_recipes, recipe
from fastokd.recipe.recipe import Recipe

COMMITTED = json.loads((Path(__file__).parent / "recipes_of_the_papers.json").read_text())
FACTS = json.loads((Path(facts_file).parent / "paper_results.json").read_text())
ALL = [cell for table in tables() for cell in cells_of(table)]
# Those of the two papers; others name their source.
CELLS = [cell for cell in ALL if not cell.source]
NEWER = sorted({cell.table for cell in ALL if cell.source})


def resolved(cell: Cell) -> dict[str, object]:
    r = recipe(cell.recipe)
    return {
        "cell": f"{cell.table} / {cell.row} / {cell.column}",
        "recipe": cell.recipe,
        "method": r.method,
        "sharing": r.sharing,
        "model": r.model,
        "dataset": r.dataset,
        "S": r.students,
        "T": r.method_options.get("temperature"),
        "epochs": r.epochs,
        "milestones": list(r.milestones),
        "ramp": r.ramp_epochs,
        "decay": r.weight_decay,
        "batch": r.batch_size,
        "dropout": r.model_options.get("dropout", 0.0) if r.model == "vgg16" else None,
        "reported": r.reported,
        "teacher": r.teacher or None,
    }


def test_cells_resolve_to_the_committed_table() -> None:
    assert [row["cell"] for row in COMMITTED] == [resolved(cell)["cell"] for cell in CELLS]
    for row, cell in zip(COMMITTED, CELLS, strict=True):
        assert row == resolved(cell), row["cell"]


def test_what_the_papers_say_of_all_cells() -> None:
    """Read off the papers here once more, cell by cell, without the committed table."""
    for cell in CELLS:
        r = recipe(cell.recipe)
        imagenet = cell.table == "table3" or cell.column == "imagenet"
        ffsd = cell.table == "ffsd"
        assert r.lr == 0.1, cell
        assert (r.momentum, r.nesterov) == (0.9, True), cell
        assert r.epochs == (90 if imagenet else 300), cell
        assert r.batch_size == (256 if imagenet else 128), cell
        assert r.weight_decay == (1e-4 if imagenet or ffsd else 5e-4), cell
        assert r.crop_mode == ("reflect" if ffsd and not imagenet else "zeros"), cell
        assert r.resized_crop == imagenet, cell
        assert r.image_size == (224 if imagenet else 32), cell
        assert r.flip, cell
        assert r.warmup_epochs == (5.0 if imagenet and ffsd else 0.0), cell
        alone = r.method in ("baseline", "kd")
        if cell.table == "figure3":
            assert r.students == int(cell.row.split()[0]), cell
        else:
            assert r.students == (1 if alone else 3 if ffsd else 4), cell
        branches = r.method in ("ind", "cl_ilr", "one") or "branch" in cell.recipe
        assert r.sharing == ("branch" if branches else "network"), cell
        if cell.table == "table4":
            assert r.reported == "ensemble_logits", cell
            assert not r.has_leader, cell


def test_every_number_of_the_papers_has_its_cell() -> None:
    def leaves(values: object) -> list[object]:
        if isinstance(values, dict):
            return [leaf for value in values.values() for leaf in leaves(value)]
        return [values]

    okddip = {key: value for key, value in FACTS["okddip"].items() if key != "metric"}
    ours = [
        cell.mean if cell.std is None else [cell.mean, cell.std]
        for cell in CELLS
        if cell.table.startswith("table")
    ]
    assert ours == leaves(okddip)
    singles = {**FACTS["ffsd"]["cifar100"], **FACTS["ffsd"]["imagenet"]}
    for cell in cells_of("ffsd"):
        values = (
            singles[cell.row] if cell.column == "cifar100" else FACTS["ffsd"]["imagenet"][cell.row]
        )
        assert cell.mean == pytest.approx(statistics.mean(values))
        assert cell.runs == len(values)
    assert {(cell.row, cell.column) for cell in cells_of("figure3")} == {
        (f"{size} branches", method)
        for size in range(3, 9)
        for method in ("cl_ilr", "one", "okddip")
    }


REPEATED = {
    ("baseline/resnet32/cifar10",): ["table1", "table6"],
    ("okddip-branch/resnet32/cifar10",): ["table1", "table6"],
    # Published as 5.46 and as 5.27: the teacher of Table 6 is another training of it.
    ("baseline/resnet110/cifar10",): ["table1", "table6"],
    ("baseline/resnet32/cifar100",): ["table2", "table6"],
    ("baseline/resnet110/cifar100",): ["table2", "table6"],
    ("okddip-branch/resnet32/cifar100",): ["table2", "table5", "table6", "figure3"],
    ("cl_ilr/resnet32/cifar100",): ["table2", "figure3"],
    ("one/resnet32/cifar100",): ["table2", "figure3"],
}


def test_no_two_cells_resolve_alike_but_those_that_the_papers_repeat() -> None:
    alike = collections.defaultdict(list)
    for cell in CELLS:
        settings = recipe(cell.recipe).to_json()
        alike[json.dumps({**settings, "name": ""}, sort_keys=True)].append(cell)
    repeated = {
        tuple(dict.fromkeys(cell.recipe for cell in cells)): [cell.table for cell in cells]
        for cells in alike.values()
        if len(cells) > 1
    }
    assert repeated == REPEATED
    for cells in alike.values():
        published = {(cell.mean, cell.std) for cell in cells if cell.mean is not None}
        assert len(published) <= 1 or cells[0].recipe == "baseline/resnet110/cifar10"


def test_all_cells_are_listed() -> None:
    names = list_recipes()
    assert len(names) == len(set(names))
    assert {cell.recipe for cell in ALL} <= set(names)
    for name in names:
        assert recipe(name).name == name


@pytest.mark.parametrize("method", list_methods())
def test_methods_compose_with_students_and_data(method: str) -> None:
    forms = method_class(method).needs.sharing
    made = [recipe(f"{method}-{form}/resnet8/digits") for form in forms]
    for r in made:
        assert Recipe.from_json(json.loads(json.dumps(r.to_json()))) == r


def test_the_schedule_scales_with_the_epochs() -> None:
    r = recipe("okddip-branch/resnet32/cifar100", epochs=30)
    assert (r.milestones, r.ramp_epochs) == ((15, 22), 8.0)
    assert [r.learning_rate(e) for e in (0, 14, 15, 22)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    r = recipe("ffsd/resnet18/imagenet", epochs=45)
    assert (r.milestones, r.ramp_epochs, r.warmup_epochs) == ((15, 30, 40), 2.5, 2.5)


def test_a_count_behind_the_at_is_the_students_override() -> None:
    named = recipe("one@5/resnet32/cifar100")
    assert dataclasses.replace(named, name="") == dataclasses.replace(
        recipe("one/resnet32/cifar100", students=5), name=""
    )


def test_a_mixed_cohort_has_a_student_for_each_name() -> None:
    r = recipe("okddip-network/resnet20+resnet32+resnet20/cifar100")
    assert r.students == 3
    assert r.models == ("resnet20", "resnet32", "resnet20")
    assert recipe("dml/resnet20+resnet32/cifar100").models == ("resnet20", "resnet32")
    assert recipe("dml/resnet20/cifar100").models == ("resnet20",) * 4


def test_a_random_student_is_kept_by_the_seed() -> None:
    kept = [
        recipe("okddip_no_two_level-branch/resnet32/cifar100", seed=seed).kept_student
        for seed in range(40)
    ]
    assert set(kept) == {0, 1, 2, 3}
    again = recipe("okddip_no_two_level-branch/resnet32/cifar100", seed=7)
    assert again.kept_student == kept[7]
    metrics = {"student_top1": [0.1, 0.2, 0.3, 0.4], "mean_top1": 0.25}
    assert again.score(metrics) == metrics["student_top1"][kept[7]]


def test_what_is_reported_is_scored() -> None:
    metrics = {"leader_top1": 0.7, "mean_top1": 0.5, "ensemble_logits_top1": 0.8}
    for name, value in (("okddip-branch", 0.7), ("dml", 0.5), ("ind-ensemble", 0.8)):
        assert recipe(f"{name}/resnet32/cifar100").score(metrics) == value


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("okddip-branch", {}, "name one as METHOD/MODEL/DATASET"),
        ("okddip/resnet32/cifar100", {}, "two forms: name one"),
        ("okddip-brunch/resnet32/cifar100", {}, "okddip has no form"),
        ("okdip-branch/resnet32/cifar100", {}, "did you mean okddip"),
        ("okddip-branch-network/resnet32/cifar100", {}, "okddip has no form"),
        ("okddip-branch@x/resnet32/cifar100", {}, "write a number after the @"),
        ("okddip-branch@1/resnet32/cifar100", {}, "at least 2"),
        ("one-network/resnet32/cifar100", {}, "no network form: choose branch"),
        ("dml/resnet33/cifar100", {}, "did you mean"),
        ("dml/resnet32/cifar1000", {}, "did you mean cifar100"),
        ("dml/resnet20+resnet9/cifar100", {}, "unknown model 'resnet9'"),
        ("okddip-branch/resnet20+resnet32/cifar100", {}, "choose okddip-network"),
        ("dml/resnet20+resnet32/cifar100", {"students": 4}, "names 2"),
        ("dml@3/resnet20+resnet32/cifar100", {}, "names 2"),
        ("dml/resnet32/cifar100", {"learning_rate": 0.1}, "unknown setting 'learning_rate'"),
        ("dml/resnet32/cifar100", {"reported": "leader"}, "has none: choose 'mean'"),
        ("dml/resnet32/cifar100", {"reported": "best"}, "reported is 'best'"),
        ("dml/resnet32/cifar100", {"epochs": 0}, "epochs is 0"),
        ("dml/resnet32/cifar100", {"lr": float("nan")}, "lr is nan"),
        ("dml/resnet32/cifar100", {"crop_padding": 32}, "it must be below image_size, 32"),
        ("dml/resnet32/cifar100", {"method_options": {"temperature": 0.0}}, "temperature is 0"),
        ("dml/resnet32/cifar100", {"method_options": {"warmth": 1}}, "unknown option of dml"),
        (
            "dml/resnet32/cifar100",
            {"method_options": {"temperature": "hot"}},
            "must be a finite number, at least 0 \\(got 'hot'",
        ),
        (
            "dml/resnet32/cifar100",
            {"method_options": {"temperature": True}},
            "at least 0 \\(got True",
        ),
        ("dml/resnet32/cifar100", {"method_options": {"kd_weight": -1}}, "at least 0 \\(got -1"),
        ("dml/resnet32/cifar100", {"method_options": {"detach_targets": 1}}, "true or false"),
        ("dml/resnet32/cifar100", {"method_options": {"mix": 3}}, "must be a word, such as logits"),
        (
            "okddip-branch/resnet32/cifar100",
            {"method_options": {"attention_dim": 0.5}},
            "attention_dim must be a whole number, at least 1 \\(got 0.5",
        ),
        ("ind/resnet32/cifar100", {"method_options": {"temperature": 1}}, "has no option"),
    ],
)
def test_bad_names_are_refused(name: str, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(name, **changes)


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean table"):
        cells_of("table7")


@pytest.mark.parametrize("table", NEWER)
def test_numbers_of_newer_methods_are_of_recipes(table: str) -> None:
    """Each is of its method, on its row's student and its column's data set, and is listed."""
    for cell in cells_of(table):
        r = recipe(cell.recipe)
        assert r.name == cell.recipe
        assert r.model == cell.row, cell
        assert r.dataset in cell.column, cell
        assert cell.mean is not None, cell
        assert cell.source, cell
        assert cell.recipe in list_recipes(), cell


def test_mcl_is_as_published() -> None:
    two, four = recipe("mcl/resnet32/cifar100"), recipe("mcl-branch/resnet32/cifar100")
    assert (two.students, four.students, two.sharing) == (2, 4, "network")
    assert (two.model_options, four.model_options) == ({}, {"branch_from": 2})
    for r in (two, four):
        assert (r.schedule, r.schedule_by, r.final_lr, r.epochs) == ("cosine", "epoch", 0.0, 300)
        assert (r.lr, r.nesterov, r.weight_decay, r.ramp_epochs) == (0.1, True, 5e-4, 0.0)
        assert (r.batch_size, r.images_per_class) == (128, 2)
    imagenet = recipe("mcl-branch/resnet18/imagenet")
    assert (imagenet.epochs, imagenet.milestones, imagenet.batch_size) == (90, (30, 60), 256)
    assert imagenet.method_options == {"form": "memory", "tau": 0.07, "temperature": 3.0}
    assert imagenet.model_options == {}
    assert recipe("mcl-logits/resnet32/cifar100").method_options["logit_distill"] is True
    okd = recipe("mcl-branch-okd/resnet32/cifar100")
    assert (okd.lr, okd.batch_size, okd.images_per_class, okd.students) == (0.05, 64, 0, 4)
    assert okd.method_options == {"form": "okd", "negatives": 256, "temperature": 3.0}
    assert recipe("mcl/resnet8/digits").images_per_class == 0
    with pytest.raises(UserError, match="dml has no form 'okd'"):
        recipe("dml-okd/resnet32/cifar100")
