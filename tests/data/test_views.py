"""What is seen of an image: torchvision's random boxes, and its centre."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from fastokd.data.views import AREA, RATIO, TRIES, View, centre_windows, random_boxes
from fastokd.errors import UserError
from fastokd.seeds import keyed_generator

N = 4000


def theirs(height: int, width: int, count: int) -> np.ndarray:
    """Boxes that torchvision draws."""
    crop, image = RandomResizedCrop(8), [torch.empty(3, height, width)]
    drawn = [crop.make_params(image) for _ in range(count)]
    return np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Every number of a box, and its area; the narrow image often takes the fall-back."""
    sizes_B2 = torch.tensor([[height, width]]).expand(N, 2)
    ours = random_boxes(sizes_B2, keyed_generator("boxes", height)).numpy()
    expected = theirs(height, width, N)
    for a, b in zip(
        (*ours.T, ours[:, 2] * ours[:, 3]),
        (*expected.T, expected[:, 2] * expected[:, 3]),
        strict=True,
    ):
        assert ks_2samp(a, b).pvalue > 1e-4


def test_the_first_try_that_fits_is_taken() -> None:
    """As torchvision: a run that goes on must draw what it would have drawn."""
    height, width, B = 60, 40, 50
    boxes = random_boxes(torch.tensor([[height, width]]).expand(B, 2), keyed_generator(5)).tolist()
    generator = keyed_generator(5)
    areas, ratios = torch.rand(2, B, TRIES, generator=generator, dtype=torch.float64).tolist()
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    later = 0
    for box, area_T, ratio_T in zip(boxes, areas, ratios, strict=True):
        for t, (a, r) in enumerate(zip(area_T, ratio_T, strict=True)):
            area = (AREA[0] + (AREA[1] - AREA[0]) * a) * height * width
            ratio = math.exp(low + (high - low) * r)
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                assert box[2:] == [h, w]
                later += t > 0
                break
    assert later > 5


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3), (375, 500)])
def test_boxes_lie_within(size: tuple[int, int]) -> None:
    box_B4 = random_boxes(torch.tensor([size]).expand(500, 2), keyed_generator(0))
    assert (box_B4[:, :2] >= 0).all()
    assert (box_B4[:, 2:] > 0).all()
    assert (box_B4[:, :2] + box_B4[:, 2:] <= torch.tensor(size)).all()


def test_ratios_are_drawn_in_the_logarithm() -> None:
    """As wide as high on average: linearly drawn, they would be 1.028 times as wide."""
    sizes_B2 = torch.tensor([[4000, 4000]]).expand(20_000, 2)
    box_B4 = random_boxes(sizes_B2, keyed_generator("ratios")).double()
    log_ratio_B = (box_B4[:, 3] / box_B4[:, 2]).log()
    # Of 20,000 draws from log(3/4) to log(4/3) the mean is known to 0.0012.
    assert abs(log_ratio_B.mean().item()) < 0.006
    for share in (0.1, 0.25, 0.5):  # a wide box is as likely as a high one
        wide, high = log_ratio_B.quantile(1 - share), log_ratio_B.quantile(share)
        assert wide.item() == pytest.approx(-high.item(), abs=0.012)


def test_no_thread_of_torch_draws_boxes() -> None:
    """They are drawn batch by batch, and torch's threads would wait for the next, spinning, on the
    cores that decode."""
    born: list[int] = []

    def count(work: Callable[[], Tensor]) -> None:
        before = set(Path("/proc/self/task").iterdir())
        work()
        born.append(len(set(Path("/proc/self/task").iterdir()) - before))

    def draw() -> None:
        # Of this Python thread, which has no threads of torch's yet.
        torch.set_num_threads(2)
        sizes_B2 = torch.tensor([375, 500]).expand(256, 2)
        count(lambda: random_boxes(sizes_B2, keyed_generator(0)))
        count(lambda: torch.ones(1_000_000).add(1))

    threads = torch.get_num_threads()
    drawing = threading.Thread(target=draw)
    drawing.start()
    drawing.join()
    torch.set_num_threads(threads)
    assert born == [0, 1]


def test_an_image_of_no_permitted_ratio_gives_its_largest_centred_box() -> None:
    """As torchvision: 4:3 at most, 3:4 at least."""
    sizes = torch.tensor([[30, 1200], [1200, 30]])
    boxes = random_boxes(sizes, keyed_generator(0))
    assert boxes.tolist() == [[0, 580, 30, 40], [580, 0, 40, 30]]
    crop = RandomResizedCrop(8)
    for size, box in zip(sizes.tolist(), boxes.tolist(), strict=True):
        drawn = crop.make_params([torch.empty(3, *size)])
        assert [drawn["top"], drawn["left"], drawn["height"], drawn["width"]] == box


def test_a_sample_s_box_depends_on_its_own_size_alone() -> None:
    sizes = torch.randint(20, 500, (40, 2))
    other = sizes.clone()
    other[7] = torch.tensor([33, 44])
    first, second = (random_boxes(s, keyed_generator(1)) for s in (sizes, other))
    same = (first == second).all(1)
    assert same.sum() == 39
    assert not same[7]


@pytest.mark.parametrize("view", [View(224, 256), View(64, 73), View(32, 0), View(7, 8)])
def test_the_centre_s_corner_is_torchvisions(view: View) -> None:
    """The decoded window, scaled, holds exactly the crop that Resize and CenterCrop take."""
    sizes = torch.tensor([[375, 500], [500, 375], [256, 256], [300, 301], [640, 257]])
    windows = centre_windows(sizes, view)
    for row, (height, width) in enumerate(sizes.tolist()):
        short = min(height, width)
        resized = [
            view.resize if side == short else int(view.resize * side / short)
            for side in (height, width)
        ]
        for axis, (side, target) in enumerate(zip((height, width), resized, strict=True)):
            corner = round((target - view.image_size) / 2.0)
            start = float(windows.start_B2[row, axis])
            first = start + windows.roi_start_B2[row, axis]
            last = start + windows.roi_end_B2[row, axis]
            assert first == pytest.approx(corner * side / target, abs=1e-3)
            assert last - first == pytest.approx(view.image_size * side / target, abs=1e-3)
            assert start >= 0
            assert start + windows.shape_B2[row, axis] <= side
            assert math.ceil(last) <= start + windows.shape_B2[row, axis] + 1


@pytest.mark.parametrize(
    ("sizes", "says"), [((0, 0), "image_size is 0"), ((64, 32), "less than image_size 64")]
)
def test_bad_sizes_are_named(sizes: tuple[int, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        View(*sizes)
