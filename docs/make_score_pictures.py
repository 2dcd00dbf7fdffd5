"""Draws docs/methods/*.svg, the score matrices, from the scores that the methods compute.

    python docs/make_score_pictures.py

Each method is run on a small cohort to find the cells that are -inf. The labels of the other cells are given here.
FFSD has several calls of the loss; its picture, docs/methods/ffsd.svg, is drawn by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.methods import Method, Progress, create_method

HERE = Path(__file__).parent / "methods"
CELL, LEFT, TOP = 46, 110, 96
FIXED, LEARNED, EXTRA = "#4c78a8", "#f58518", "#54a24b"
STYLE = "text{fill:#333}"


class Picture(NamedTuple):
    """A method's matrix: the labels of its finite cells, and the note below it.

    ``peers``, ``leader`` and ``extra`` label the scores between students, in the leader's row, and of
    the extra sources; ``source`` names the extra source. Of several both have commas.
    """

    method: str
    students: int
    note: str
    peers: str = "0"
    leader: str = "0"
    extra: str = "0"
    source: str = "teacher"
    learned: bool = False
    options: dict[str, object] = {}
    sharing: str = "branch"


PICTURES = {
    "okdph": Picture(
        "okdph",
        2,
        "all students and the hybrid of their weights",
        source="hybrid",
        sharing="network",
    ),
    "pcl": Picture(
        "pcl",
        3,
        "weights of the KLs to the ensemble classifier e and to the other peers' means",
        source="e, mean 1, mean 2, mean 3",
        extra="½, ¼, ¼, ¼",
    ),
    "baseline": Picture("baseline", 1, "labels only", sharing="network"),
    "ind": Picture("ind", 4, "labels only; shared trunk"),
    "dml": Picture("dml", 4, "all others", sharing="network"),
    "cl_ilr": Picture("cl_ilr", 4, "all others; the trunk's gradient is divided by 4"),
    "one": Picture(
        "one", 4, "gₙ: the gate's logits, from the trunk; equal rows", peers="gₙ", learned=True
    ),
    "okddip": Picture("okddip", 4, "q·k: W_L h_a · W_E h_b", peers="q·k", learned=True),
    "okddip_random": Picture(
        "okddip_random", 4, "u: uniform in (0, 1], drawn for each sample and step", peers="ln u"
    ),
    "okddip_entropy": Picture("okddip_entropy", 4, "each peer: only itself"),
    "okddip_mean": Picture("okddip_mean", 4, "equal weights for all peers"),
    "okddip_symmetric": Picture(
        "okddip_symmetric", 4, "h·h: h_a · h_b, no projections", peers="h·h", learned=True
    ),
    "okddip_no_two_level": Picture(
        "okddip_no_two_level", 4, "four peers and no leader", peers="q·k", learned=True
    ),
    "kd": Picture("kd", 1, "the frozen teacher only", sharing="network"),
    "dkd": Picture("dkd", 1, "the frozen teacher only", sharing="network"),
    "dist": Picture("dist", 1, "the frozen teacher only", sharing="network"),
    "okddip_kd": Picture(
        "okddip_kd", 4, "first call: q·k; second call: the teacher", peers="q·k", learned=True
    ),
    "kdcl_naive": Picture(
        "kdcl",
        3,
        "a sample where student 2 has the lowest CE",
        options={"target": "naive"},
        sharing="network",
    ),
    "kdcl_linear": Picture(
        "kdcl",
        3,
        "aₙ: convex weights with the lowest CE",
        peers="ln aₙ",
        options={"target": "linear"},
        sharing="network",
    ),
    "kdcl_min_logit": Picture(
        "kdcl",
        3,
        "the smallest logits relative to the true class",
        source="minimum",
        options={"target": "min_logit"},
        sharing="network",
    ),
    "kdcl_general": Picture(
        "kdcl",
        3,
        "weights from the inverse error covariance",
        source="ensemble",
        options={"target": "general"},
        sharing="network",
    ),
    "mcl": Picture("mcl", 2, "logit_distill: the mean logits of all", sharing="network"),
}


def heard(picture: Picture) -> Tensor:
    """Which cells of the method's scores are finite, ``[S, N]``, on one sample."""
    torch.manual_seed(0)
    teacher = Cohort(("resnet8", 1), 10).student(0)
    cohort = Cohort(
        ("resnet8", picture.students), 10, sharing=picture.sharing, teacher=teacher
    ).eval()
    method = create_method(picture.method, cohort.shape, impl="torch", **picture.options).eval()
    out = cohort(torch.randn(2, 3, 32, 32))
    # Student 2 predicts the label.
    labels_B = torch.tensor([3, 3])
    if picture.students > 1:
        out.logits_SBC = torch.zeros_like(out.logits_SBC)
        out.logits_SBC[1, :, 3] = 5.0
    draws = method.draw(2, torch.Generator().manual_seed(0))
    progress = Progress(torch.zeros(()), torch.ones(()), draws)
    scores = scores_of(method, out, labels_B, progress)
    return torch.isfinite(scores if scores.dim() == 2 else scores[0])


def scores_of(method: Method, out: object, labels_B: Tensor, progress: Progress) -> Tensor:
    """The scores that the method passes to the loss, with the teacher's column of a second call appended."""
    if hasattr(method, "scores_RN"):  # other rows listen to nothing
        return method.scores_RN[: method.shape.students]
    if not hasattr(method, "scores"):
        return method.scores_SS
    scores = method.scores(out, labels_B, progress)
    if hasattr(method, "teacher_scores_SN"):
        return torch.cat([scores[0], method.teacher_scores_SN[:, -1:]], dim=1)
    return scores


def draw(picture: Picture) -> str:
    """The matrix as SVG."""
    cells = heard(picture)
    rows, columns = cells.shape
    has_leader = picture.method.startswith("okddip") and picture.method != "okddip_no_two_level"
    kind = "peer" if picture.method.startswith("okddip") else "student"
    named = [f"{kind} {s + 1}" for s in range(rows)]
    if has_leader:
        named[-1] = "leader"
    extras = picture.extra.split(", ") * (columns - rows)
    sources = named + (picture.source.split(", ") * (columns - rows))[: columns - rows]
    width = max(LEFT + CELL * columns + 60, LEFT + 7 * len(picture.note))
    height = TOP + CELL * rows + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{picture.method}: rows learn from columns</title>",
        f"<style>{STYLE}</style>",
        # The site's dark theme inverts pictures, so all are drawn on white.
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for n, name in enumerate(sources):
        x = LEFT + CELL * n + CELL / 2
        lines.append(f'<text x="{x + 4}" y="86" transform="rotate(-40 {x} 86)">{name}</text>')
    for s, name in enumerate(named):
        y = TOP + CELL * s
        lines.append(f'<text x="102" y="{y + 27}" text-anchor="end">{name}</text>')
        for n in range(columns):
            x = LEFT + CELL * n
            if not cells[s, n]:
                fill, label, ink = "none", "−∞", "#999"
            elif n >= rows:
                fill, label, ink = EXTRA, extras[n - rows], "#fff"
            elif has_leader and s == rows - 1:
                fill, label, ink = FIXED, picture.leader, "#fff"
            else:
                fill, label, ink = LEARNED if picture.learned else FIXED, picture.peers, "#fff"
            lines.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" '
                'stroke="#999"/>'
            )
            lines.append(
                f'<text x="{x + CELL / 2}" y="{y + 27}" text-anchor="middle" '
                f'style="fill:{ink}">{label}</text>'
            )
    lines.append(f'<text x="{LEFT}" y="{height - 10}">{picture.note}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Writes all pictures."""
    for name, picture in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw(picture))


if __name__ == "__main__":
    main()
