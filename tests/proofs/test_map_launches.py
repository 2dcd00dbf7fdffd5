"""Launches and bytes of FFSD's map losses and fusion step, eager as in reference/ and fused: counted.

``python -m tests.proofs.test_map_launches`` prints the figures of docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastokd.kernels import attention, feature_transfer, fusion_step
from torch import Tensor, nn

from fastokd.reference import ffsd as eager
from tests.proofs.offline import compiling_for
from tests.proofs.test_launches import Count, Head

B = 128
STAGES = ((16, 32), (32, 16), (64, 8))
M, K = 2, 128


def draw(stage: int) -> Tensor:
    C, side = STAGES[stage]
    x_BCHW = torch.rand(B, C, side, side)
    return x_BCHW.contiguous(memory_format=torch.channels_last).requires_grad_()


def loss_eager(loss: Callable[..., Tensor], stage: int) -> Head:
    x, y = draw(stage), draw(stage).detach()
    with Count() as count:
        torch.autograd.grad(loss(x, y), x)
    # Less the incoming gradient of 1, which a step makes once.
    return Head(count.launches - 1, count.bytes - 4)


def fusion_eager(m: int) -> Head:
    maps = [draw(2).detach().requires_grad_(m == 1) for _ in range(m)]
    channels = m * STAGES[2][0]
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    bn = nn.BatchNorm2d(channels)
    leaves = [conv.weight, bn.weight, bn.bias, *(maps if m == 1 else [])]
    with Count() as count:
        y = torch.relu(bn(conv(maps[0] if m == 1 else torch.cat(maps, 1))))
        torch.autograd.grad(y, leaves, y.detach())
    return Head(count.launches, count.bytes)


def loss_fused(name: str, stage: int) -> Head:
    """The kernels by their launchers, and what is dispatched beside them; bytes by design."""
    x, y = draw(stage).detach(), draw(stage).detach()
    pixels = 4 * B * STAGES[stage][1] ** 2
    with compiling_for("sm_90") as kernels, Count() as count:
        if name == "feature_transfer":
            loss, saved = feature_transfer.feature_pair(x, y)
            feature_transfer.feature_pair_backward(x, y, saved, loss, True, False)
            sums = 2 * 8 * saved.numel() * stretches(x)  # float64, out and in again
            designed = 5 * x.nbytes + 2 * saved.nbytes + sums
        elif name == "shifted_map":
            attention.shifted_map(x)
            designed = 2 * x.nbytes
        else:
            loss, s, _ = attention.attention_pair(x, y, name == "attention_diversity", True, False)
            attention.attention_pair_backward(x, s, loss)
            designed = 4 * x.nbytes + 2 * pixels
    return Head(len(kernels) + count.launches, designed + count.bytes)


def stretches(x_BCHW: Tensor) -> int:
    """Programs of a sample in ``feature_transfer``'s first launch."""
    tiles = x_BCHW[0].numel() // 1024
    return min(tiles, feature_transfer.PROGRAMS // B)


def fusion_fused(m: int) -> Head:
    maps = [draw(2).detach() for _ in range(m)]
    channel = torch.zeros(m * STAGES[2][0])
    weight, batches = torch.zeros(len(channel), 1, 3, 3), torch.zeros((), dtype=torch.long)
    with compiling_for("sm_90") as kernels, Count() as count:
        args = (weight, channel, channel)
        y, z, saved = fusion_step.fusion_step(maps, *args, channel, channel, batches, 0.1, 1e-5)
        fusion_step.fusion_step_backward(y, maps, *args, z, saved, m == 1)
    # Maps in, z out; z in, y out; z and dy in; z, dy and maps in; with the map's gradient dz out and
    # in and that gradient out besides.
    passes = (2 + 2 + 2 + 3) + (3 if m == 1 else 0)
    return Head(len(kernels) + count.launches, passes * y.nbytes + count.bytes)


LOSSES = ("attention_transfer", "feature_transfer", "attention_diversity", "shifted_map")


def rows() -> dict[str, tuple[Head, Head, int]]:
    """Eager, fused, and the bytes that the maps alone must move."""
    found = {}
    for name in LOSSES[:2]:
        for stage in range(3):
            found[f"{name}, stage {stage + 1}"] = (
                loss_eager(getattr(eager, name), stage),
                loss_fused(name, stage),
                (4 if name == LOSSES[0] else 5) * draw(stage).nbytes,
            )
    minimum = 4 * draw(2).nbytes
    found["attention_diversity, stage 3"] = (
        loss_eager(eager.attention_diversity, 2),
        loss_fused("attention_diversity", 2),
        minimum,
    )
    with Count() as count:
        eager.shifted_map(draw(2).detach())
    shifted = Head(count.launches, count.bytes)
    found["shifted_map, stage 3"] = (shifted, loss_fused("shifted_map", 2), minimum // 2)
    for m in (2, 1):
        nbytes = m * draw(2).nbytes
        name = "fusion of 2 maps" if m == 2 else "transfusion"
        # Maps in, y out; dy and z in, the maps again; the map's gradient out.
        found[name] = fusion_eager(m), fusion_fused(m), (5 if m == 2 else 6) * nbytes
    return found


def idle(side: int, C: int, tile: int) -> tuple[str, float]:
    """An attention's blocks of a map in tiles of ``tile`` elements, and the idle share of the lanes."""
    BP, _, BC = attention._blocks(side * side, C, tile)
    blocks, passes = -(-side * side // BP), -(-C // BC)
    lanes = blocks * BP * passes * BC
    return f"{blocks} of {BP} x {BC}", 1 - side * side * C / lanes


@pytest.mark.proof
@pytest.mark.parametrize(("C", "side"), [(16, 32), (32, 16), (64, 8), (64, 56), (128, 28)])
def test_few_lanes_idle(C: int, side: int) -> None:
    assert idle(side, C, attention._TILE)[1] < 1 / 16
    assert idle(side, C, attention._BACKWARD_TILE)[1] < 1 / 16


@pytest.mark.proof
def test_launches() -> None:
    found = rows()
    # Loss, sum over the batch, gradient; the fusion's two kernels each way and the sum of the
    # weight's partial gradients, and the map's gradient.
    launches = {"shifted_map, stage 3": 1, "fusion of 2 maps": 5, "transfusion": 6}
    for name, (before, after, minimum) in found.items():
        assert after.launches == launches.get(name, 3), name
        assert before.launches > after.launches, name
        assert before.bytes > after.bytes, name
        losses = not name.endswith(("maps", "transfusion"))
        assert after.bytes < (1.1 if losses else 2.1) * minimum, name


if __name__ == "__main__":
    print("| | eager launches | eager MB | fused launches | fused MB | the maps alone, MB |")
    print("|---|---|---|---|---|---|")
    for name, (before, after, minimum) in rows().items():
        print(
            f"| {name} | {before.launches} | {before.bytes / 1e6:.1f} "
            f"| {after.launches} | {after.bytes / 1e6:.1f} | {minimum / 1e6:.1f} |"
        )
    print("| map | blocks: pixels x channels | idle | backward | idle |\n|---|---|---|---|---|")
    for C, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        cells = [f"{C}x{side}x{side}"]
        for tile in (attention._TILE, attention._BACKWARD_TILE):
            blocks, share = idle(side, C, tile)
            cells += [blocks, f"{share:.0%}"]
        print(f"| {' | '.join(cells)} |")
