"""MCL (Yang, An and Xu, AAAI 2022): students contrast their embeddings with each other's.

Each student has an embedding of its pooled feature, normalised, which is trained with it and dropped after.
The contrasts are those of ``ops/mutual_contrast.py`` over the batch, or of ``ops/memory_contrast.py`` with a
memory of all training images: MCL's form for ImageNet, and MCL-OKD's.

Scores, for the logit term: 0 for all students, itself included, whose mean logits are the target of both of
two students, else of the last student alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import INDEX, MethodLoss, Progress
from fastokd.methods.mcl_memory import Memory
from fastokd.methods.scored import ScoredMethod
from fastokd.ops.memory_contrast import memory_contrast, noise_contrast
from fastokd.ops.mutual_contrast import Contrasts, check_numbers, mutual_contrast

Form = Literal["batch", "memory", "okd"]


class MCL(ScoredMethod):
    """CE + alpha VCL + gamma soft VCL + beta ICL + lam soft ICL, and the logit term, without a ramp.

    Args:
        form: ``"batch"``: contrasts within the batch; ``"memory"``: with a memory of all training images;
            ``"okd"``: MCL-OKD, CE + T^2 KL(mean logits || last student) + nce NCE, with a memory.
        alpha: weighs VCL, each student's contrast with itself.
        gamma: weighs soft VCL, which makes the students' similarities alike.
        beta: weighs ICL, the contrast of each student with each other one.
        lam: weighs soft ICL, which makes the contrasts of two students alike in both directions.
        nce: weighs MCL-OKD's noise-contrastive loss.
        tau: divides the similarities.
        temperature: T of the soft terms and of the logit term.
        embedding_dim: width of the embeddings and of their hidden layer; MCL-OKD's has none.
        logit_distill: adds T^2 KL(mean logits || student), which MCL-OKD has always.
        negatives: rows of the memory, of other classes, for each image.
        memory_momentum: share of an image's old row of the memory in its new one.
        detach_targets: keeps the logit term's target out of the gradient; contrasts detach theirs always.

    With a memory, a loop of your own calls ``keep(loss.kept, progress, torch.zeros(()))`` after each optimizer
    step, which renews it.
    """

    needs = replace(ScoredMethod.needs, mixed_labels=False)
    ramped = False

    scores_SS: Tensor
    listens_S: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        form: Form = "batch",
        alpha: float = 0.1,
        gamma: float = 1.0,
        beta: float = 0.1,
        lam: float = 1.0,
        nce: float = 0.025,
        tau: float = 0.1,
        temperature: float = 3.0,
        embedding_dim: int = 128,
        logit_distill: bool = False,
        negatives: int = 8192,
        memory_momentum: float = 0.5,
        detach_targets: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(shape, temperature=temperature, detach_targets=detach_targets, **options)
        if form not in ("batch", "memory", "okd"):
            raise UserError(f"form is {form!r}: choose batch, memory or okd")
        check_numbers(tau, temperature)
        self.form = form
        self.alpha, self.gamma, self.beta, self.lam, self.nce = alpha, gamma, beta, lam, nce
        self.tau = tau
        self.embeddings = nn.ModuleList(
            _embedding(width, embedding_dim, hidden=form != "okd") for width in shape.feature_dims
        )
        self.memory: Memory | None = None
        S = shape.students
        if form != "batch":
            self.needs = replace(self.needs, training_set=True)
            self.memory = Memory(S, embedding_dim, negatives, memory_momentum)
        listens_S = torch.zeros(S)
        first = 0 if S == 2 and form == "batch" else S - 1
        listens_S[first:] = float(logit_distill or form == "okd")
        self.register_buffer("listens_S", listens_S, persistent=False)
        self.register_buffer("scores_SS", torch.zeros(S, S), persistent=False)

    def start(self, labels_N: Tensor, generator: Generator) -> None:
        if self.memory is not None:
            self.memory.start(labels_N, generator)
            self.memory.to(next(self.embeddings.parameters()))

    def draw(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        return {} if self.memory is None else self.memory.draw(batch, generator)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SS

    def settings(self, progress: Progress) -> dict[str, Any]:
        settings = super().settings(progress)
        return settings | {"kd_weight": self.listens_S * settings["kd_weight"]}

    def embedded(self, out: CohortOutput) -> Tensor:
        """The students' embeddings, of length 1, ``[S, B, E]``, in float32 or float64."""
        pairs = zip(self.embeddings, out.features, strict=True)
        embeddings_SBE = torch.stack([embed(features_BD) for embed, features_BD in pairs])
        x_SBE = embeddings_SBE.to(torch.promote_types(embeddings_SBE.dtype, torch.float32))
        return x_SBE / x_SBE.norm(dim=-1, keepdim=True)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        loss = super().forward(out, labels_B, progress)
        embeddings_SBE = self.embedded(out)
        if self.memory is None:
            terms = self._weighed(
                mutual_contrast(
                    embeddings_SBE, labels_B, tau=self.tau, temperature=self.temperature
                )
            )
        else:
            terms = self._with_memory(self.memory, embeddings_SBE, labels_B, progress)
        total = loss.total + sum(weight * term for weight, term in terms.values())
        named = {name: term.detach() for name, (_, term) in terms.items()}
        kept = None if self.memory is None else embeddings_SBE.detach()
        return MethodLoss(total, {**loss.parts, **named}, kept)

    def unguarded(self) -> Iterable[Tensor]:
        memory = self.memory
        return [] if memory is None or not memory.started else [memory.memory_SND]

    def keep(self, kept: Tensor, progress: Progress, untaken: Tensor) -> None:
        assert self.memory is not None
        self.memory.renew(progress.draws[INDEX], kept, untaken)

    def _with_memory(
        self, memory: Memory, embeddings_SBE: Tensor, labels_B: Tensor, progress: Progress
    ) -> dict[str, tuple[float, Tensor]]:
        """The weighed terms with rows of the memory, which :meth:`keep` renews after the step."""
        if not memory.started:
            raise UserError(
                f"form is {self.form!r}, but its memory has no images: call start with the training "
                "set's labels, as a run does, or choose form='batch'"
            )
        rows_BK = memory.rows(progress.draws, labels_B)
        if self.form == "okd":
            own_BK = torch.cat([rows_BK[:, :1], rows_BK[:, 2:]], dim=1)
            nce = noise_contrast(
                embeddings_SBE, memory.memory_SND, own_BK, tau=self.tau, impl=self.impl
            )
            terms = {"nce": (self.nce, nce)}
        else:
            terms = self._weighed(
                memory_contrast(
                    embeddings_SBE,
                    memory.memory_SND,
                    rows_BK,
                    tau=self.tau,
                    temperature=self.temperature,
                    impl=self.impl,
                )
            )
        return terms

    def _weighed(self, terms: Contrasts) -> dict[str, tuple[float, Tensor]]:
        """The terms by name, each with its weight."""
        weights = self.alpha, self.gamma, self.beta, self.lam
        return {
            name: (weight, term)
            for (name, term), weight in zip(terms._asdict().items(), weights, strict=True)
        }


def _embedding(width: int, dim: int, *, hidden: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width, dim)]
    if hidden:
        layers += [nn.ReLU(), nn.Linear(dim, dim)]
    return nn.Sequential(*layers)
