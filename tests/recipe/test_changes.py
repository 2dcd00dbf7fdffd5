"""Every option of a recipe, its method and its students is set by its name; schedules of any length."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fastokd.errors import UserError
from fastokd.known import MODELS, RUN_OPTIONS
from fastokd.models import create_model, option_defaults, register_model
from fastokd.models.vgg import VGG
from fastokd.recipe.names import list_recipes, recipe
from fastokd.recipe.settings import parse_settings
from fastokd.run.options import RunOptions


def options(name: str, **changes: object) -> tuple[dict[str, object], dict[str, object]]:
    made = recipe(name, **changes)
    return made.method_options, made.model_options


def test_an_option_goes_to_the_part_that_has_it() -> None:
    split = "okddip-branch/torchvision:mobilenet_v2/cifar10"
    assert options(split, split_at="features.13", temperature=2) == (
        {"temperature": 2.0},
        {"split_at": "features.13"},
    )
    assert options("dml/torchvision:mobilenet_v2/cifar10", dropout=0.5)[1] == {"dropout": 0.5}
    assert options("dml/torchvision:vit_b_16/cifar10", input_size=64)[1] == {"input_size": 64}
    assert options("okddip-branch/vgg16/cifar10")[1] == {"dropout": 0.5}
    changed = options("okddip-branch/vgg16/cifar10", dropout=0)[1]
    assert changed == {"dropout": 0.0}
    assert type(changed["dropout"]) is float
    assert options("okddip-network/vgg16+vgg19/cifar10", dropout=0.1)[1] == {"dropout": 0.1}


def test_options_reach_the_constructor_of_timm() -> None:
    pytest.importorskip("timm")
    found = options("dml/timm:mobilenetv3_small_100/cifar10", drop_rate=0.25)[1]
    assert create_model("timm:mobilenetv3_small_100", 10, **found).net.drop_rate == 0.25
    # This network's function doesn't say its class.
    assert "drop_rate" in option_defaults("timm:repvit_m0_9")


def test_a_name_that_method_and_student_share_needs_its_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Warm(VGG):
        def __init__(self, num_classes: int, *, temperature: float = 1.0) -> None:
            super().__init__(num_classes)

    monkeypatch.setitem(MODELS, "warm_vgg", __name__)  # and removed after the test
    register_model("warm_vgg", Warm, input_size=32, about="a student with an option of a method")
    with pytest.raises(UserError, match="an option of the method dml and of the model warm_vgg"):
        recipe("dml/warm_vgg/cifar10", temperature=2.0)
    both = recipe("dml/warm_vgg/cifar10", model_options={"temperature": 2.0})
    assert both.model_options == {"temperature": 2.0}
    assert both.method_options == {"temperature": 3.0}


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("dml/vgg16+resnet20/cifar10", {"dropout": 0.1}, "dropout is no option of resnet20"),
        ("dml/vgg16/cifar10", {"dropout": "much"}, r"dropout must be a number \(got 'much'\)"),
        ("dml/vgg16/cifar10", {"dropout": True}, r"dropout must be a number \(got True\)"),
        (
            "dml/vgg16/cifar10",
            {"dropout": 0.1, "model_options": {"dropout": 0.2}},
            "dropout is both 0.2 and 0.1",
        ),
        ("dml/torchvision:mobilenet_v3_small/cifar10", {"drop_rate": 0.1}, "unknown setting"),
        ("dml/resnet20/cifar10", {"engine": "loop"}, "give it as --engine"),
        ("dml/resnet20/cifar10", {"seeds": 1}, "give it as --seeds on the command line$"),
        ("dml/resnet20/cifar10", {"attention_dim": 3}, "dml has no option 'attention_dim'"),
        ("dml/resnet20/cifar10", {"method": 3}, r"method must be a word \(got 3\)"),
        ("dml/resnet20/cifar10", {"method": ["a"]}, r"method must be a word \(got \['a'\]\)"),
        ("dml/resnet20/cifar10", {"epochs": "3"}, r"epochs must be a whole number \(got '3'\)"),
        ("dml/resnet20/cifar10", {"epochs": None}, r"epochs must be a whole number \(got None\)"),
        ("dml/resnet20/cifar10", {"students": "two"}, "students must be a whole number"),
        ("dml/resnet20/cifar10", {"lr": "fast"}, "lr must be a number"),
        ("dml/resnet20/cifar10", {"milestones": 3}, "milestones must be a list of whole numbers"),
        ("dml/resnet20/cifar10", {"method_options": {1: 2}}, "method_options must be an object"),
        ("dml/resnet20/cifar10", {"teacher": 3}, "teacher must be a word"),
        (3, {}, "the recipe must be a name"),
        (None, {}, "the recipe must be a name"),
    ],
)
def test_what_is_wrong_is_said(name: str, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(name, **changes)


def test_a_value_that_a_constructor_rejects_is_said() -> None:
    for name in ("vgg16", "torchvision:mobilenet_v2"):
        with pytest.raises(UserError, match="has to be between 0 and 1"):
            create_model(name, 10, dropout=2.0)


def test_the_options_of_a_run_are_known_by_name() -> None:
    assert tuple(field.name for field in dataclasses.fields(RunOptions)) == RUN_OPTIONS


@pytest.fixture(scope="module")
def schedules() -> dict[tuple[int, tuple[int, ...]], str]:
    """One recipe's name for each schedule by steps."""
    names = (*list_recipes(), "dml/resnet8/digits", "dml/resnet8/fashion_mnist")
    made = {name: recipe(name) for name in names}
    return {(r.epochs, r.milestones): name for name, r in made.items() if r.schedule == "step"}


@pytest.mark.parametrize("epochs", [*range(1, 13), 29, 30, 60, 100, 299, 300])
def test_milestones_are_distinct_and_within_the_run(
    epochs: int, schedules: dict[tuple[int, tuple[int, ...]], str]
) -> None:
    for (full, milestones), name in schedules.items():
        made = recipe(name, epochs=epochs)
        scaled = [max(1, round(m * epochs / full)) for m in milestones]
        assert list(made.milestones) == sorted({m for m in scaled if m < epochs}), name
        rates = [made.learning_rate(epoch, warm_up=False) for epoch in range(epochs)]
        assert rates[0] == made.lr
        falls = [after / before for before, after in itertools.pairwise(rates)]
        assert all(fall == pytest.approx(1) or fall == pytest.approx(0.1) for fall in falls)
        if epochs >= 6 and len({*scaled}) == len(scaled):
            assert list(made.milestones) == scaled, name


@pytest.mark.parametrize("name", ["lr", "temperature"])
def test_a_number_too_large_for_a_float_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be a finite number"):
        recipe("okddip-branch/resnet8/digits", **{name: 10**400})


def test_python_s_words_are_taken_for_json_s() -> None:
    assert parse_settings(["nesterov=True,False"]) == {"nesterov": [True, False]}
