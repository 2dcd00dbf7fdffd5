"""Images a second of each augmentation on a CPU: the batched operations beside torchvision's, image by image.

    python -m bench.bench_augment [--size N] [--batch N] [--rounds N] [--threads N] [--cpu-time] [--write]

A row is one setting of a recipe on a batch of photographs' statistics (smooth, with noise), the draws included.
torchvision's is the transform of the same name on uint8 tensors, as in the worker processes of its reference
recipes. Both run in turn; the ratio is of the rounds, with its quartiles. ``--write`` replaces the table of
``--size`` in docs/augmentation.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from bench.turns import in_turn
from fastokd.data import Augment
from fastokd.data.augment import draw_rows, operate
from fastokd.seeds import keyed_generator

PAGE = Path(__file__).resolve().parents[1] / "docs/augmentation.md"
HEAD = "| setting | fastokd | torchvision | fastokd / torchvision (quartiles) | source |\n|---|---|---|---|---|\n"
Transform = Callable[[Tensor], Any]


def settings(size: int) -> dict[str, tuple[dict[str, Any], Transform]]:
    """Each row: a recipe's fields and torchvision's transform."""
    jitter = (0.4, 0.4, 0.4, 0.1)
    return {
        "auto_augment=trivialaugment": (
            {"auto_augment": "trivialaugment"},
            v2.TrivialAugmentWide(),
        ),
        "auto_augment=randaugment": ({"auto_augment": "randaugment"}, v2.RandAugment()),
        "auto_augment=cifar10": (
            {"auto_augment": "cifar10"},
            v2.AutoAugment(AutoAugmentPolicy.CIFAR10),
        ),
        "auto_augment=imagenet": ({"auto_augment": "imagenet"}, v2.AutoAugment()),
        "color_jitter=[0.4,0.4,0.4,0.1]": ({"color_jitter": jitter}, v2.ColorJitter(*jitter)),
        "random_erasing=0.25": ({"random_erasing": 0.25}, v2.RandomErasing(p=0.25)),
        "vertical_flip=true": ({"vertical_flip": True}, v2.RandomVerticalFlip()),
        f"cutout={size // 2}": ({"cutout": size // 2}, _no_transform),
    }


def _no_transform(image: Tensor) -> Tensor:
    """torchvision has none of this name."""
    return image


def pictures(batch: int, size: int) -> Tensor:
    """Smooth images with noise, uint8 ``[B, H, W, 3]``."""
    generator = keyed_generator("bench", batch, size)
    coarse_B3HW = torch.rand(batch, 3, 5, 5, generator=generator) * 255
    smooth_B3HW = F.interpolate(coarse_B3HW, size=(size, size), mode="bicubic")
    noise_B3HW = 5 * torch.randn(batch, 3, size, size, generator=generator)
    images_B3HW = (smooth_B3HW + noise_B3HW).clamp(0, 255).to(torch.uint8)
    return images_B3HW.permute(0, 2, 3, 1).contiguous()


def rows(batch: int, size: int, rounds: int, clock: Callable[[], float]) -> list[str]:
    """The lines of the table."""
    images_BHWC = pictures(batch, size)
    alone = [image.permute(2, 0, 1).contiguous() for image in images_BHWC]
    kind = "measured-cpu"
    lines = []
    for name, (fields, transform) in settings(size).items():
        augment, number = Augment(**fields), iter(range(10**9))

        def ours(augment: Augment = augment, number: Any = number) -> Tensor:
            generator = keyed_generator("bench", next(number))
            drawn_BL = draw_rows(augment, batch, (size, size), generator)
            return operate(augment, images_BHWC, drawn_BL)

        def theirs(transform: Transform = transform) -> Tensor:
            return torch.stack([transform(image) for image in alone])

        times = in_turn({"ours": ours, "theirs": theirs}, rounds, clock)
        per_second = {k: 1e3 * batch / statistics.median(found) for k, found in times.items()}
        if transform is _no_transform:
            lines.append(f"| `{name}` | {per_second['ours']:,.0f} | none | | {kind} |")
        else:
            ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            lines.append(
                f"| `{name}` | {per_second['ours']:,.0f} | {per_second['theirs']:,.0f} | "
                f"{middle:.1f} ({low:.1f} to {high:.1f}) | {kind} |"
            )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="seconds on a core, not the wall's")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(HEAD, end="")
    table = rows(args.batch, args.size, args.rounds, clock)
    how = (
        f"{args.batch} images of {args.size} x {args.size}, {args.threads} thread, "
        f"{'CPU' if args.cpu_time else 'wall'} time, {args.rounds} rounds, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    print(how)
    if args.write:
        region = re.compile(rf"(<!-- speed {args.size} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = HEAD + "\n".join(table) + f"\n\n{how}.\n\n"
        PAGE.write_text(region.sub(lambda found: found[1] + text + found[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
