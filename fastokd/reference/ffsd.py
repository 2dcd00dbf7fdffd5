"""FFSD's loop as published: each network has its loss, backward and optimizer, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.models import create_model, model_info

EPS = 1e-12


class Lambdas(NamedTuple):
    """Weights of the map losses, already warmed up."""

    diversity: Tensor | float = 1e-5
    fusion: Tensor | float = 10.0
    self_distillation: Tensor | float = 1000.0


class FFSDLosses(NamedTuple):
    """What each network minimises."""

    students: list[Tensor]
    fusion: Tensor
    leader: Tensor
    decoders: dict[str, Tensor]


class DecoderBlock(nn.Module):
    """Twice the height and width: transposed 3x3, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # Spelt as published.
        self.convtranpose = nn.ConvTranspose2d(
            inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.norm(self.convtranpose(x_BCHW)))


class Decoder(nn.Module):
    """From the last map back to the others; ``channels`` are the student's, first stage first."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        reverse = channels[::-1]
        self.count = len(reverse) - 1
        for index in range(self.count):
            self.add_module(f"layer{index}", DecoderBlock(reverse[index], reverse[index + 1]))

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """The earlier stages' maps, first stage first."""
        maps = []
        for index in range(self.count):
            x_BCHW = self.get_submodule(f"layer{index}")(x_BCHW)
            maps.append(x_BCHW)
        return maps[::-1]


class Squeeze(nn.Module):
    """Depthwise 3x3, BatchNorm, ReLU, 1x1 to ``outputs`` channels, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1_1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn1_1 = nn.BatchNorm2d(outputs)
        for conv in (self.conv1, self.conv1_1):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn1_1(self.conv1_1(x_BCHW)))


class Fusion(Squeeze):
    """The students' last maps squeezed to the channels of one, and a classifier behind them."""

    def __init__(self, inputs: int, outputs: int, num_classes: int) -> None:
        super().__init__(inputs, outputs)
        self.fc2 = nn.Linear(outputs, num_classes)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        fused_BCHW = super().forward(x_BCHW)
        return self.fc2(fused_BCHW.mean((2, 3))), fused_BCHW


class ReferenceFFSD(nn.Module):
    """``students`` networks, the last the leader, and FFSD's other modules."""

    def __init__(self, model: str, num_classes: int, students: int = 3) -> None:
        super().__init__()
        self.students = nn.ModuleList(create_model(model, num_classes) for _ in range(students))
        channels = [shape[0] for shape in model_info(model, num_classes).maps]
        last, together = channels[-1], channels[-1] * (students - 1)
        self.fusion = Fusion(together, last, num_classes)
        self.transfusion = Squeeze(last, together)
        names = [*map(str, range(1, students - 1)), "leader"]
        self.decoders = nn.ModuleDict({name: Decoder(channels) for name in names})


def ffsd_optimizers(
    model: ReferenceFFSD,
    lr: float = 0.1,
    weight_decay: float = 1e-4,
    fusion_weight_decay: float = 1e-5,
) -> list[torch.optim.Optimizer]:
    """One for each network: the students in order (the leader's has its transfusion), the fusion
    module's, the decoders'."""

    def sgd(modules: list[nn.Module], decay: float) -> torch.optim.Optimizer:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=decay)

    peers, leader = list(model.students[:-1]), model.students[-1]
    return [
        *(sgd([peer], weight_decay) for peer in peers),
        sgd([leader, model.transfusion], weight_decay),
        sgd([model.fusion], fusion_weight_decay),
        *(torch.optim.Adam(d.parameters(), weight_decay=1e-4) for d in model.decoders.values()),
    ]


def energy(x_BCHW: Tensor) -> Tensor:
    """A(x): the channel mean of squares, ``[B, HW]``."""
    return x_BCHW.pow(2).mean(1).flatten(1)


def attention_transfer(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """mse(n(A(x)), n(A(y)))."""
    x_BP, y_BP = F.normalize(energy(x_BCHW)), F.normalize(energy(y_BCHW))
    return F.mse_loss(x_BP, y_BP)


def feature_transfer(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """mse(n(x), n(y))."""
    return F.mse_loss(F.normalize(x_BCHW.flatten(1)), F.normalize(y_BCHW.flatten(1)))


def shifted_attention(y_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a = n(A(y)), the target of the other student's attention, and r = ||A(y)||."""
    strength_BP = energy(y_BCHW)
    r_B1 = strength_BP.norm(dim=1, keepdim=True)
    a_BP = strength_BP / r_B1.clamp(min=EPS)
    weakest_BK = a_BP.topk(a_BP.shape[1] // 3, dim=1, largest=False).values
    threshold_B1 = weakest_BK.max(dim=1, keepdim=True).values
    target_BP = (r_B1 / 2 - a_BP) * torch.sign(a_BP - threshold_B1) + r_B1 / 2
    return a_BP, target_BP, r_B1


def attention_diversity(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """mse(n(A(x)), target(y))."""
    _, target_BP, _ = shifted_attention(y_BCHW.detach())
    return F.mse_loss(F.normalize(energy(x_BCHW)), target_BP)


@torch.no_grad()
def shifted_map(y_BCHW: Tensor) -> Tensor:
    """y + (target(y) - a) r / C."""
    a_BP, target_BP, r_B1 = shifted_attention(y_BCHW)
    B, C, H, W = y_BCHW.shape
    return y_BCHW + ((target_BP - a_BP) * r_B1 / C).view(B, 1, H, W)


def self_distillation(decoder: nn.Module, maps: tuple[Tensor, ...], source: Tensor) -> Tensor:
    """Attention transfer of the earlier maps to those that the decoder computes of ``source``."""
    decoder.eval()
    with torch.no_grad():
        decoded = decoder(source)
    return _sum([attention_transfer(x, y) for x, y in zip(maps[:-1], decoded, strict=True)])


def reconstruction(decoder: nn.Module, maps: tuple[Tensor, ...]) -> Tensor:
    """The decoder's loss: it computes the earlier maps from the last."""
    decoder.train()
    wanted = [x_BCHW.detach() for x_BCHW in maps]
    pairs = list(zip(decoder(wanted[-1]), wanted[:-1], strict=True))
    return _sum([feature_transfer(x, y) + attention_transfer(x, y) for x, y in pairs])


def divergence(target_BC: Tensor, student_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || student), the target detached."""
    log_q_BC = F.log_softmax(student_BC / temperature, dim=1)
    p_BC = F.softmax(target_BC.detach() / temperature, dim=1)
    return F.kl_div(log_q_BC, p_BC, reduction="batchmean") * temperature**2


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def ffsd_losses(
    model: ReferenceFFSD,
    x_BCHW: Tensor,
    labels_B: Tensor,
    lambdas: Lambdas,
    temperature: float = 2.0,
    label_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> FFSDLosses:
    """One forward of every network, and the loss of each; ``label_loss``: of logits and class ids."""
    outputs = [student.outputs(x_BCHW) for student in model.students]  # type: ignore[operator]
    *peers, leader = outputs
    decoders = model.decoders

    students = []
    for index, own in enumerate(peers):
        others = [peer for peer in peers if peer is not own]
        pairs = [divergence(o.logits_BC, own.logits_BC, temperature) for o in others]
        loss = label_loss(own.logits_BC, labels_B) + _sum(pairs) / len(pairs)
        if index:
            other_BCHW = peers[index - 1].maps[-1].detach()
            apart = attention_diversity(own.maps[-1], other_BCHW)
            decoder = decoders[str(index)]
            along = self_distillation(decoder, own.maps, shifted_map(other_BCHW))
            loss = loss + lambdas.diversity * (apart + along)
        students.append(loss)

    together_BKHW = torch.cat([peer.maps[-1] for peer in peers], dim=1).detach()
    fusion_BC, fused_BCHW = model.fusion(together_BKHW)
    mean_BC = torch.stack([peer.logits_BC for peer in peers]).mean(0)
    fusion = label_loss(fusion_BC, labels_B) + divergence(mean_BC, fusion_BC, temperature)

    fused_BCHW = fused_BCHW.detach()
    alike = attention_transfer(leader.maps[-1], fused_BCHW)
    spread = attention_transfer(model.transfusion(leader.maps[-1]), together_BKHW)
    along = self_distillation(decoders["leader"], leader.maps, fused_BCHW)
    leader_loss = (
        label_loss(leader.logits_BC, labels_B)
        + divergence(fusion_BC, leader.logits_BC, temperature)
        + lambdas.fusion * (alike + spread + along)
    )

    taught = {
        name: reconstruction(decoders[name], peers[int(name)].maps)
        for name in decoders
        if name != "leader"
    }
    taught["leader"] = reconstruction(decoders["leader"], leader.maps)
    return FFSDLosses(
        students,
        fusion,
        leader_loss,
        {name: lambdas.self_distillation * loss for name, loss in taught.items()},
    )


def ffsd_step(
    model: ReferenceFFSD,
    optimizers: list[torch.optim.Optimizer],
    x_BCHW: Tensor,
    labels_B: Tensor,
    lambdas: Lambdas,
    temperature: float = 2.0,
) -> FFSDLosses:
    """One training step; ``optimizers`` as :func:`ffsd_optimizers` orders them."""
    losses = ffsd_losses(model, x_BCHW, labels_B, lambdas, temperature)
    each = [*losses.students, losses.leader, losses.fusion, *losses.decoders.values()]
    for loss, optimizer in zip(each, optimizers, strict=True):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
