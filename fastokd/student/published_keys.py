"""Maps the keys of the authors' checkpoints to fastokd's, and describes mismatches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.cohort.keys import split_key
from fastokd.host.names import first_names
from fastokd.methods.ffsd_modules import Squeeze
from fastokd.models import create_model, trunk_shape

# fastokd's model names and the authors'.
FFSD_NAMES = {
    "resnet20": "resnet20",
    "resnet32": "resnet32",
    "resnet56": "resnet56",
    "wrn_16_2": "wideresnet1602",
    "wrn_40_2": "wideresnet4002",
    "densenet_40_12_uncompressed": "densenet",
    "googlenet": "googlenet",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
}
OKDDIP_NAMES = {
    "resnet32": "resnet32",
    "resnet110": "resnet110",
    "wrn_20_8": "wide_resnet20_8",
    "vgg16": "vgg16",
    "densenet_40_12": "densenetd40k12",
}
# Prefixes of a branch's keys: fastokd's, and the authors' with the branch's index.
RESIDUAL = (("layer3.", "layer3_{}."), ("fc.", "classifier3_{}."))
BRANCHES = {
    "resnet32": RESIDUAL,
    "resnet110": RESIDUAL,
    "wrn_20_8": RESIDUAL,
    "vgg16": (("layer4.", "layer3_{}."), ("classifier.", "classifier3_{}.")),
    "densenet_40_12": (
        ("features.denseblock3.", "Branch{}."),
        ("features.norm_final.", "norm_final_{}."),
        ("classifier.", "classifier3_{}."),
    ),
}
# A method's keys: FFSD's transfusion, OKDDip's projections, ONE's gate.
METHOD_KEYS = ("trans_fusion_module.", "query_weight.", "key_weight.", "control_v1.", "bn_v1.")
SHOWN = 3

# The authors' key -> (fastokd's key, shape).
KeyMap = dict[str, tuple[str, torch.Size]]


def sharing_of(weights: Mapping[str, Tensor]) -> tuple[str | None, int]:
    """The kind of sharing and the number of students."""
    for sharing, pattern in (
        ("network", r"stu(\d+)\."),
        ("branch", r"(?:(?:layer3|classifier3|norm_final)_|Branch)(\d+)\."),
    ):
        found = {int(match.group(1)) for key in weights if (match := re.match(pattern, key))}
        if found:
            # A gap in the indices gives missing and extra keys.
            return sharing, len(found)
    return None, 1


def our_name(model: str) -> str:
    """fastokd's name of a model; ``model`` may be the authors' name."""
    theirs = {v: k for names in (FFSD_NAMES, OKDDIP_NAMES) for k, v in names.items()}
    return theirs.get(model, model)


def keys_of(model: str, classes: int, sharing: str | None, students: int) -> KeyMap:
    """The keys of the networks in a file."""
    with torch.device("meta"):
        if sharing is None:
            student = create_model(model, classes)
            state = student.state_dict()
            return {student.published_key(key): (key, v.shape) for key, v in state.items()}
        state = Cohort((model, students), classes, sharing=sharing).state_dict()
    return {_their_key(key, model, sharing): (key, value.shape) for key, value in state.items()}


def _their_key(key: str, model: str, sharing: str) -> str:
    index, rest = split_key(key)
    if index is None:
        return rest
    if sharing == "network":
        return f"stu{index}.{rest}"
    ours, theirs = next(pair for pair in BRANCHES[model] if rest.startswith(pair[0]))
    return theirs.format(index) + rest.removeprefix(ours)


def classes_of(weights: Mapping[str, Tensor]) -> int:
    """C, the rows of the last linear layer; 100 if there is none."""
    rows = [
        value.shape[0]
        for key, value in weights.items()
        if value.dim() == 2 and not key.startswith(METHOD_KEYS)
    ]
    return rows[-1] if rows and rows[-1] >= 2 else 100


def method_keys(
    weights: Mapping[str, Tensor], model: str, sharing: str | None, students: int
) -> KeyMap:
    """The keys of each method module of which the file has a key."""
    if not any(key.startswith(METHOD_KEYS) for key in weights):
        return {}
    parts: list[tuple[str, str, nn.Module]] = []
    with torch.device("meta"):
        width = create_model(model, 2).feature_dim
        if any(key.startswith("trans_fusion_module.") for key in weights):
            norm = weights.get("trans_fusion_module.bn1_1.weight", torch.empty(2 * width))
            squeeze = Squeeze(width, max(norm.numel(), 1))
            parts.append(("trans_fusion_module.", "transfusion.", squeeze))
        if any(key.startswith(("query_weight.", "key_weight.")) for key in weights):
            for name in ("query", "key"):
                linear = nn.Linear(width, width // 8, bias=False)
                parts.append((f"{name}_weight.", f"{name}.", linear))
        if sharing == "branch" and any(k.startswith(("control_v1.", "bn_v1.")) for k in weights):
            channels = trunk_shape(model, 2)[0]
            parts.append(("control_v1.", "control.", nn.Linear(channels, students)))
            parts.append(("bn_v1.", "norm.", nn.BatchNorm1d(students)))
        return {
            f"{theirs}{key}": (f"{ours}{key}", value.shape)
            for theirs, ours, module in parts
            for key, value in module.state_dict().items()
        }


def faults_of(weights: Mapping[str, Tensor], keys: KeyMap) -> dict[str, list[str]]:
    """The keys that don't fit, by kind. ``num_batches_tracked`` may be missing, as in old torch."""
    faults = {
        "missing": [
            key for key in keys if key not in weights and not key.endswith("num_batches_tracked")
        ],
        "extra": [key for key in weights if key not in keys],
        "of another shape": [
            f"{key} ({list(weights[key].shape)}, not {list(shape)})"
            for key, (_, shape) in keys.items()
            if key in weights and weights[key].shape != shape
        ],
    }
    return {kind: keys for kind, keys in faults.items() if keys}


def described(faults: Mapping[str, Sequence[str]]) -> tuple[int, str]:
    """The number of faults, and a description with the first of each kind."""
    text = "; ".join(
        f"{len(keys)} {kind}: {first_names(keys, SHOWN)}" for kind, keys in faults.items()
    )
    return sum(len(keys) for keys in faults.values()), text


def renamed(weights: Mapping[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    """The entries under fastokd's keys; a missing ``num_batches_tracked`` is 0."""
    zero = torch.zeros((), dtype=torch.long)
    return {ours: weights.get(theirs, zero) for theirs, (ours, _) in keys.items()}
