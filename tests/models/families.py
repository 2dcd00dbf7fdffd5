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
    "timm:tf_efficientnet_lite0": (64, STILL),
    "timm:tf_mobilenetv3_small_minimal_100": (64, STILL),
    "timm:tf_mixnet_s": (64, STILL),
    "timm:nf_resnet26": (64, {}),
    "timm:nf_regnet_b0": (64, {}),
    "timm:resnetv2_50x1_bit": (64, {}),
    "timm:test_efficientnet_evos": (64, STILL),
    "timm:mobileone_s0": (64, {}),
    "timm:repvgg_a0": (64, {}),
    "timm:fastvit_t8": (64, {}),
    # Convolutions and norms.
    "timm:resnet10t": (64, {}),
    "timm:legacy_seresnet18": (64, {}),
    "timm:skresnet18": (64, {}),
    "timm:resnest14d": (64, {}),
    "timm:ese_vovnet19b_slim_dw": (64, {}),
    "timm:dla46_c": (64, {}),
    "timm:dpn48b": (64, {}),
    "timm:ghostnet_050": (64, STILL),
    "timm:hardcorenas_a": (64, STILL),
    "timm:tinynet_e": (64, STILL),
    "timm:lcnet_035": (64, STILL),
    "timm:mobilenetv4_conv_small": (64, STILL),
    "timm:fbnetc_100": (64, STILL),
    "timm:rexnet_100": (64, STILL),
    "timm:regnety_002": (64, {}),
    "timm:gernet_s": (64, {}),
    "timm:cs3darknet_s": (64, {}),
    "timm:hgnetv2_b0": (64, {}),
    "timm:starnet_s1": (64, {}),
    "timm:repvit_m0_9": (64, {}),
    "timm:gcresnext26ts": (64, {}),
    "torchvision:squeezenet1_1": (64, STILL_TV),
    "torchvision:mobilenet_v2": (64, STILL_TV),
    "torchvision:mobilenet_v3_small": (64, STILL_TV),
    "torchvision:shufflenet_v2_x0_5": (64, {}),
    "torchvision:mnasnet0_5": (64, STILL_TV),
    "torchvision:regnet_y_400mf": (64, {}),
    "torchvision:efficientnet_b0": (64, {**STILL_TV, "stochastic_depth_prob": 0.0}),
    "torchvision:densenet121": (64, {}),
    "torchvision:googlenet": (64, STILL_TV),
    "torchvision:resnet18": (64, {}),
    # Attention, tokens, and channels last.
    "timm:vit_tiny_patch16_224": (32, {"img_size": 32, "patch_size": 8}),
    "timm:deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "patch_size": 8}),
    "timm:pit_ti_224": (64, {"img_size": 64}),
    "timm:levit_128s": (64, {"img_size": 64}),
    "timm:convit_tiny": (32, {"img_size": 32, "patch_size": 8}),
    "timm:xcit_nano_12_p16_224": (64, {}),
    "timm:coat_lite_tiny": (64, {"img_size": 64}),
    "timm:pvt_v2_b0": (64, {}),
    "timm:mobilevit_xxs": (64, STILL),
    "timm:edgenext_xx_small": (64, {}),
    "timm:efficientvit_b0": (64, {}),
    "timm:efficientvit_m0": (64, {"img_size": 64}),
    "timm:gmlp_ti16_224": (32, {"img_size": 32, "patch_size": 8}),
    "timm:poolformer_s12": (64, {}),
    "timm:mambaout_femto": (64, {}),
    "timm:convnext_atto": (64, {}),
    "timm:convnextv2_atto": (64, {}),
    "timm:swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (1, 1, 1, 1)}),
}
COLUMNS = ("loop", "vmap", "grouped", "branch, loop", "branch, vmap")
EQUAL = "equal"


class Family:
    """One name, and what each engine makes of its network."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size, self.options = FAMILIES[name]
        student = create_model(name, C, **self.options)
        assert isinstance(student, ExternalStudent)
        self.splits = [path for path in student._candidates() if student._can_cut(path)]

    def outcome(self, column: str) -> str:
        """``equal``, or why the engine refuses.

        Raises:
            AssertionError: the numbers differ.
        """
        engine = column.removeprefix("branch, ")
        options, sharing = dict(self.options), "network"
        if column.startswith("branch"):
            if not self.splits:
                return "no module to split at"
            options["split_at"], sharing = self.splits[-1], "branch"
        cohort = Cohort(
            (self.name, S), C, sharing=sharing, model_options=options, image_size=self.size
        ).double()
        try:
            cohort.set_engine(engine)
        except UserError as error:
            return str(error).removeprefix(f"engine={engine!r} ").partition(": use loop")[0]
        same_as_alone(cohort)
        return EQUAL


def same_as_alone(cohort: Cohort) -> None:
    """A training step of a float64 cohort beside one of each student alone, then both in eval mode.

    Logits, features, maps, gradients (a trunk's is the sum over students) and buffers are equal.
    """
    count = len(cohort.students)
    generator = torch.Generator().manual_seed(0)
    shape = B, 3, cohort.image_size, cohort.image_size
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights_SBC = torch.randn((count, B, C), generator=generator, dtype=torch.float64)
    alone = [cohort.student(s).train() for s in range(count)]
    expected = [student.outputs(images.clone()) for student in alone]
    for theirs, weights in zip(expected, weights_SBC, strict=True):
        (theirs.logits_BC * weights).sum().backward()
    out = cohort.train()(images)
    (out.logits_SBC * weights_SBC).sum().backward()
    for s, theirs in enumerate(expected):
        same(out.logits_SBC[s], theirs.logits_BC, "logits")
        same(out.features[s], theirs.features_BD, "features")
        assert len(out.maps[s]) == len(theirs.maps)
        for pair in zip(out.maps[s], theirs.maps, strict=True):
            same(*pair, "maps")
    by_key = [dict(student.named_parameters()) for student in alone]
    gradients: dict[str, Tensor] = {}
    for s, parameters in enumerate(by_key):
        for key, parameter in parameters.items():
            shared = cohort.trunk is not None and key in dict(cohort.trunk.named_parameters())
            place = f"trunk.{key}" if shared else f"students.{s}.{key}"
            gradients[place] = gradients.get(place, 0) + gradient_of(parameter)
    ours = dict(cohort.named_parameters())
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        same(gradient_of(ours[key]), gradient, key)
    for s, student in enumerate(alone):
        state = cohort.student_state(s)
        for key, buffer in student.named_buffers():
            if key in state:
                same(state[key], buffer, key)
    torch.optim.SGD(cohort.parameters(), RATE).step()
    cohort.eval()
    with torch.no_grad():
        after_SBC = cohort(images).logits_SBC
        for s in range(count):
            same(after_SBC[s], cohort.student(s)(images.clone()), "logits in eval mode")


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
    rows = [line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if "`" in line]
    table = {row[0].strip("`"): row[2:] for row in rows if row[0].strip("`") in FAMILIES}
    return {name: dict(zip(COLUMNS, cells, strict=True)) for name, cells in table.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for known in sys.argv[1:] or FAMILIES:
        family = Family(known)
        found = []
        for column in COLUMNS:
            try:
                found.append(family.outcome(column))
            except Exception as error:
                found.append(f"FAULT {type(error).__name__} {str(error)[:300]}")
        print(f"| `{known}` | {family.size} | {' | '.join(found)} |", flush=True)
