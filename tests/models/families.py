"""Classifiers of timm and torchvision, one a family, against the single network in float64.

``python -m tests.models.families`` prints the table of docs/families.md.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.models import create_model
from fastokd.models.external import ExternalStudent

S, B, C, RATE = 2, 3, 10, 1e-3
STILL = {"drop_rate": 0.0}  # two programs would draw other masks
STILL_TV = {"dropout": 0.0}
# The height and width of the images, and the constructor's options.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    # Convolutions with a forward of their own.
    "timm:tf_efficientnet_lite0": (48, STILL),
    "timm:tf_mobilenetv3_small_minimal_100": (48, STILL),
    "timm:tf_mixnet_s": (48, STILL),
    "timm:nf_resnet26": (48, {}),
    "timm:nf_regnet_b0": (48, {}),
    "timm:resnetv2_50x1_bit": (48, {}),
    "timm:repvgg_a0": (48, {}),
    "timm:fastvit_t8": (48, {}),
    # Convolutions and norms.
    "timm:resnet10t": (48, {}),
    "timm:legacy_seresnet18": (48, STILL),
    "timm:skresnet18": (48, {}),
    "timm:resnest14d": (48, {}),
    "timm:ese_vovnet19b_slim_dw": (48, {}),
    "timm:dla46_c": (64, {}),
    "timm:dpn48b": (48, {}),
    "timm:ghostnet_050": (48, STILL),
    "timm:hardcorenas_a": (48, STILL),
    "timm:tinynet_e": (48, STILL),
    "timm:lcnet_035": (48, STILL),
    "timm:mobilenetv4_conv_small": (48, STILL),
    "timm:fbnetc_100": (48, STILL),
    "timm:rexnet_100": (48, STILL),
    "timm:regnety_002": (48, {}),
    "timm:gernet_s": (48, {}),
    "timm:cs3darknet_s": (48, {}),
    "timm:hgnetv2_b0": (48, {}),
    "timm:starnet_s1": (48, {}),
    "timm:repvit_m0_9": (48, {}),
    "timm:gcresnext26ts": (48, {}),
    "torchvision:squeezenet1_1": (48, STILL_TV),
    "torchvision:mobilenet_v2": (48, STILL_TV),
    "torchvision:mobilenet_v3_small": (48, STILL_TV),
    "torchvision:shufflenet_v2_x0_5": (48, {}),
    "torchvision:mnasnet0_5": (48, STILL_TV),
    "torchvision:regnet_y_400mf": (48, {}),
    "torchvision:efficientnet_b0": (48, {**STILL_TV, "stochastic_depth_prob": 0.0}),
    "torchvision:densenet121": (48, {}),
    "torchvision:googlenet": (48, STILL_TV),
    "torchvision:resnet18": (48, {}),
    # Attention, tokens, and channels last.
    "timm:vit_tiny_patch16_224": (32, {"img_size": 32, "patch_size": 8}),
    "timm:deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "patch_size": 8}),
    "timm:pit_ti_224": (64, {"img_size": 64}),
    "timm:levit_128s": (64, {"img_size": 64}),
    "timm:convit_tiny": (32, {"img_size": 32, "patch_size": 8}),
    "timm:xcit_nano_12_p16_224": (48, {}),
    "timm:coat_lite_tiny": (64, {"img_size": 64}),
    "timm:pvt_v2_b0": (48, {}),
    "timm:mobilevit_xxs": (48, STILL),
    "timm:edgenext_xx_small": (48, {}),
    "timm:efficientvit_m0": (64, {"img_size": 64}),
    "timm:gmlp_ti16_224": (64, {"img_size": 64}),
    "timm:mambaout_femto": (48, {}),
    "timm:convnext_atto": (48, {}),
    "timm:convnextv2_atto": (48, {}),
    "timm:swin_tiny_patch4_window7_224": (56, {"img_size": 56, "drop_path_rate": 0.0}),
}
COLUMNS = ("loop", "vmap", "grouped", "branch, loop", "branch, vmap")
EQUAL = "equal"


def outcomes(name: str) -> dict[str, str]:
    """By column: ``equal``, how the numbers differ, or why the engine refuses."""
    size, options = FAMILIES[name]
    student = create_model(name, C, **options)
    assert isinstance(student, ExternalStudent)
    splits = [path for path in student._candidates() if student._can_cut(path)]
    found: dict[str, str] = {}
    for sharing in ("network", "branch"):
        columns = [
            column for column in COLUMNS if column.startswith("branch") == (sharing == "branch")
        ]
        if sharing == "branch" and not splits:
            return found | dict.fromkeys(columns, "no module to split at")
        more = {"split_at": splits[-1]} if sharing == "branch" else {}
        cohort = Cohort(
            (name, S), C, sharing=sharing, model_options={**options, **more}, image_size=size
        ).double()
        alone = Alone(cohort)
        for column in columns:
            engine = column.removeprefix("branch, ")
            try:
                if engine != cohort.engine:
                    cohort.set_engine(engine)
                alone.compare(cohort)
                found[column] = EQUAL
            except UserError as error:
                why = str(error).removeprefix(f"engine={engine!r} ").partition(": use loop")[0]
                found[column] = why.replace(f"{name}, which is ", "")
            except AssertionError as error:
                found[column] = " ".join(str(error).split())
    return found


class Alone:
    """A training step of each student of a float64 cohort, alone; then what it is in eval mode."""

    def __init__(self, cohort: Cohort) -> None:
        count = len(cohort.students)
        generator = torch.Generator().manual_seed(0)
        shape = B, 3, cohort.image_size, cohort.image_size
        self.images = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.weights_SBC = torch.randn((count, B, C), generator=generator, dtype=torch.float64)
        self.begun = {key: value.clone() for key, value in cohort.state_dict().items()}
        self.students = [cohort.student(s).train() for s in range(count)]
        self.out = [student.outputs(self.images.clone()) for student in self.students]
        for out, weights in zip(self.out, self.weights_SBC, strict=True):
            (out.logits_BC * weights).sum().backward()
        trunk = {} if cohort.trunk is None else dict(cohort.trunk.named_parameters())
        self.gradients: dict[str, Tensor] = {}
        for s, student in enumerate(self.students):
            for key, parameter in student.named_parameters():
                place = f"trunk.{key}" if key in trunk else f"students.{s}.{key}"
                self.gradients[place] = self.gradients.get(place, 0) + gradient_of(parameter)
        self.buffers = [
            {key: value.clone() for key, value in student.named_buffers()}
            for student in self.students
        ]

    def compare(self, cohort: Cohort) -> None:
        """A step of ``cohort`` by its engine: logits, features, maps, gradients (a trunk's is the sum
        over students) and buffers are equal, and after an update the logits in eval mode."""
        cohort.load_state_dict(self.begun)
        cohort.zero_grad()
        out = cohort.train()(self.images)
        (out.logits_SBC * self.weights_SBC).sum().backward()
        for s, theirs in enumerate(self.out):
            same(out.logits_SBC[s], theirs.logits_BC, "logits")
            same(out.features[s], theirs.features_BD, "features")
            assert len(out.maps[s]) == len(theirs.maps)
            for pair in zip(out.maps[s], theirs.maps, strict=True):
                same(*pair, "maps")
        ours = dict(cohort.named_parameters())
        assert ours.keys() == self.gradients.keys()
        for key, gradient in self.gradients.items():
            same(gradient_of(ours[key]), gradient, key)
        states = [cohort.student_state(s) for s in range(len(self.students))]
        for state, buffers in zip(states, self.buffers, strict=True):
            for key in state.keys() & buffers.keys():
                same(state[key], buffers[key], key)
        torch.optim.SGD(cohort.parameters(), RATE).step()
        with torch.no_grad():
            logits_SBC = cohort.eval()(self.images).logits_SBC
            for s, student in enumerate(self.students):
                student.load_state_dict(cohort.student_state(s))
                same(logits_SBC[s], student.eval()(self.images.clone()), "logits in eval mode")


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient; zeros where it has no part in the logits."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal but for the order of float64 sums, which norms over few values amplify."""
    scale = max(1.0, theirs.abs().max().item()) if theirs.is_floating_point() else 1.0
    torch.testing.assert_close(
        ours, theirs, rtol=1e-7, atol=1e-8 * scale, msg=lambda m: f"{what}: {m}"
    )


def documented() -> dict[str, dict[str, str]]:
    """The outcomes that docs/families.md states, by name and column."""
    page = Path(__file__).parents[2] / "docs" / "families.md"
    rows = [
        line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if "`" in line
    ]
    table = {row[0].strip("`"): row[2:] for row in rows if row[0].strip("`") in FAMILIES}
    return {name: dict(zip(COLUMNS, cells, strict=True)) for name, cells in table.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for known in sys.argv[1:] or FAMILIES:
        print(
            f"| `{known}` | {FAMILIES[known][0]} | {' | '.join(outcomes(known).values())} |",
            flush=True,
        )
