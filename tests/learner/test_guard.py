"""A value that isn't finite: no state takes the step, and the right culprit is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastokd import train as training
from fastokd.checkpoint import load_checkpoint
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.learner import build as parts
from fastokd.learner.captured import CapturedStep
from fastokd.learner.guard import Held
from fastokd.learner.step import step
from fastokd.methods import MethodLoss
from fastokd.models import create_model
from fastokd.recipe.names import Recipe, recipe
from fastokd.run import interruption
from fastokd.run.build import build
from fastokd.run.folder import Run
from fastokd.run.hooks import Hooks
from fastokd.run.interruption import Keeper, StopRequest
from fastokd.run.nonfinite import find, settle
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.train import train, train_epoch

BAD = 3  # the step at which something happens
STEPS = 6
NAN, INF = float("nan"), float("inf")
assert training is train


def small(name: str = "okddip-branch", **changes: Any) -> Recipe:
    made = {"epochs": 4, "students": 3, "batch_size": 6, **changes}
    return recipe(f"{name}/resnet8/digits", **made)


def session_of(one: Recipe | None = None, training: bool = True, **options: Any) -> Session:
    plain = {"quiet": True, "precision": "fp32", "engine": "loop", "impl": "torch"}
    session = build(one or small(), RunOptions(**{**plain, **options}), training=training)

    # The loss of every step depends on a random number, so that random states matter.
    def times(_module: Any, _args: Any, loss: MethodLoss) -> MethodLoss:
        return MethodLoss(loss.total * (1 + torch.rand(())), loss.parts)

    session.learner.method.register_forward_hook(times)
    return session


def go(session: Session, steps: int = STEPS, read_each: bool = False) -> None:
    """Steps of the training loop; the flag is read after them, or after each."""
    if session.step == 0:
        torch.manual_seed(0)
    object.__setattr__(session.options, "max_steps", steps)

    def check(background: bool = False) -> None:
        del background
        settle(session, lambda: None)

    hooks = Hooks()
    hooks.add(Keeper(check, StopRequest(), 1 if read_each else None, None, settle=check))
    train_epoch(session, hooks)


def digest(session: Session) -> str:
    """Of everything that a checkpoint holds."""
    tensors, facts = session.state()
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        total.update(name.encode())
        total.update(value.detach().contiguous().view(-1).numpy().tobytes())
    return total.hexdigest()


def when(session: Session) -> bool:
    return session.step == BAD


class Poisoned:
    """The stream, but for what ``change`` makes of one batch."""

    def __init__(self, stream: Any, change: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.stream, self.change = stream, change

    def __len__(self) -> int:
        return len(self.stream)

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for index, pair in enumerate(self.stream.batches(epoch, first), first):
            yield self.change(*pair) if index == BAD else pair


def poison_image(session: Session) -> None:
    def change(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        floats = images.permute(0, 3, 1, 2).float() / 255
        floats[2, 1, 5, 5] = NAN
        return floats, labels

    session.stream = Poisoned(session.stream, change)  # type: ignore[assignment]


def poison_student(session: Session, student: int = 1) -> None:
    def one_bad(_module: Any, _args: Any, out: Any) -> None:
        if when(session):
            bad = torch.zeros_like(out.logits_SBC)
            bad[student, 0, 0] = NAN
            out.logits_SBC = out.logits_SBC + bad

    session.learner.cohort.register_forward_hook(one_bad)


def poison_gradient(session: Session, student: int = 2) -> None:
    weight = session.learner.cohort.students[student].get_submodule("fc").weight

    def grown(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, torch.tensor([4]), INF) if when(session) else gradient

    weight.register_hook(grown)  # type: ignore[union-attr, arg-type]


def poison_term(session: Session) -> None:
    """Only a part is bad, which nothing is differentiated by."""

    def one_bad(_module: Any, _args: Any, loss: MethodLoss) -> MethodLoss:
        kd_S = loss.parts["kd_S"].clone()
        kd_S[0] = INF if when(session) else kd_S[0]
        return MethodLoss(loss.total, {**loss.parts, "kd_S": kd_S})

    session.learner.method.register_forward_hook(one_bad)


def poison_statistic(session: Session) -> None:
    """A variance overflows, which nothing else shows: the batch is normalised by its own."""
    norm = session.learner.cohort.students[0].get_submodule("layer3.0.bn2")

    def overflow(module: nn.Module, _args: Any) -> None:
        if when(session):
            module.running_var[1] = INF  # type: ignore[operator, index]

    norm.register_forward_pre_hook(overflow)


POISONS = {
    "image": (poison_image, "image 2 of the batch holds nan, student 0's logits hold nan"),
    "student": (poison_student, "student 1's logits hold nan, student 1's ce is nan"),
    "gradient": (poison_gradient, "the gradient of student 2's fc.weight holds inf"),
    "term": (poison_term, "student 0's kd is inf"),
    "statistic": (poison_statistic, "student 0's layer3.0.bn2.running_var would hold inf"),
}
WHERE = "step 3 (epoch 0, batch 3, counted from 0; seed 0) isn't finite: "


@pytest.mark.parametrize("kind", POISONS)
def test_no_state_takes_the_step_nor_those_after_it(kind: str) -> None:
    poison, message = POISONS[kind]
    whole, hurt = session_of(small(ema=0.9)), session_of(small(ema=0.9))
    poison(hurt)
    poison(whole)
    go(whole, steps=BAD)
    with pytest.raises(UserError) as told:
        go(hurt)
    assert WHERE + message in str(told.value)
    assert "--resume --skip-nonfinite 1" in str(told.value)
    assert digest(hurt) == digest(whole)


@pytest.mark.parametrize(
    ("kind", "name", "engine", "options"),
    [
        ("gradient", "okddip-network", "grouped", {"clip_norm": 1.0}),
        ("student", "okddip-network", "vmap", {"accumulate": 2}),
        ("student", "dml", "loop", {"precision": "bf16"}),
        ("gradient", "ffsd", "loop", {"accumulate": 2}),
        ("gradient", "ffsd", "vmap", {}),
        ("student", "kdcl", "grouped", {}),
        ("gradient", "one-branch", "loop", {"impl": "cpp"}),
    ],
)
def test_whatever_the_engine_and_the_method(
    kind: str, name: str, engine: str, options: dict[str, Any], cpp_ops: None
) -> None:
    whole, hurt = (session_of(small(name), engine=engine, **options) for _ in range(2))
    for session in (whole, hurt):
        POISONS[kind][0](session)
    go(whole, steps=BAD)
    student = 1 if kind == "student" else 2
    with pytest.raises(UserError, match=rf"step 3 .*student {student}'s"):
        go(hurt, steps=BAD + 2)
    assert digest(hurt) == digest(whole)


def test_a_weight() -> None:
    session = session_of(small("dml-network"))
    go(session, steps=2)
    session.learner.cohort.students[1].get_submodule("layer2.0.conv1").weight.data[3, 1, 0, 0] = NAN  # type: ignore[operator, index]
    before = digest(session)
    with pytest.raises(UserError, match=r"step 2 .* student 1's layer2.0.conv1.weight holds nan, "):
        go(session)
    assert digest(session) == before


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_teacher(value: float) -> None:
    class Teacher(nn.Module):
        def __init__(self, session: Session) -> None:
            super().__init__()
            self.student = create_model("resnet8", 10)
            self.when = lambda: when(session)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            logits_BC: Tensor = self.student(x_BCHW)
            return logits_BC.index_fill(1, torch.tensor([2]), value) if self.when() else logits_BC

    sessions = []
    for _ in range(2):
        torch.manual_seed(0)
        session = session_of(recipe("kd/resnet8/digits", batch_size=6), training=False)
        session.learner.cohort._teacher = [Teacher(session).eval().requires_grad_(False)]
        sessions.append(session)
    whole, hurt = sessions
    go(whole, steps=BAD)
    with pytest.raises(
        UserError, match=f"step 3 .* isn't finite: the teacher's logits hold {value}"
    ):
        go(hurt)
    assert digest(hurt) == digest(whole)


@pytest.mark.parametrize("kind", ["image", "gradient"])
def test_a_skipped_step_leaves_the_same_run_whenever_it_is_noticed(kind: str) -> None:
    """Late, at once, or with a resume in between; as a run that goes by it of its own accord."""
    poison, _ = POISONS[kind]
    runs: list[str] = []
    for read_each in (False, True):
        session = session_of(small(ema=0.9), skip_nonfinite=1)
        poison(session)
        go(session, read_each=read_each)
        assert (session.step, session.batch, session.skipped) == (STEPS, STEPS, 1)
        assert 0 < session.meter.result()["loss"] < 50
        assert session.meter.totals["count"] == 6 * (STEPS - 1)
        runs.append(digest(session))
    first = session_of(small(ema=0.9))
    poison(first)
    with pytest.raises(UserError):
        go(first)
    tensors, facts = first.state()
    second = session_of(small(ema=0.9), skip_nonfinite=1)
    poison(second)
    second.load_state(tensors, facts)
    go(second)
    runs.append(digest(second))
    assert len(set(runs)) == 1


def test_no_more_are_skipped_than_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    session = session_of(skip_nonfinite=2)
    weight = session.learner.cohort.students[0].get_submodule("fc").weight
    weight.register_hook(lambda g: g * INF if session.step in (1, 2, 4) else g)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match=r"step 4 .*\(2 were skipped before it\).*-nonfinite 3"):
        go(session)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in warnings] == ["warning: step 1", "warning: step 2"]
    assert warnings[1].endswith("it is skipped, 2 of 2")


def test_the_first_step_of_all() -> None:
    """Torch's fused SGD would leave momentum as the memory was, and the next step would use it."""
    hurt, whole = session_of(skip_nonfinite=1), session_of()
    weight = hurt.learner.cohort.students[0].get_submodule("fc").weight
    weight.register_hook(lambda g: g * NAN if hurt.step == 0 else g)  # type: ignore[union-attr, operator]
    go(hurt, steps=3)
    whole.step = whole.batch = whole.skipped = 1
    torch.manual_seed(0)
    torch.rand(())  # the skipped step's
    go(whole, steps=3)
    assert digest(hurt) == digest(whole)


def test_an_optimizer_that_knows_no_flag_is_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(kind: str, groups: Any, of: Recipe) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=of.momentum, foreach=True)

    monkeypatch.setattr(parts, "create_optimizer", plain)
    whole, hurt = session_of(), session_of()
    poison_gradient(hurt)
    go(whole, steps=BAD)
    with pytest.raises(UserError, match="step 3"):
        go(hurt)
    assert digest(hurt) == digest(whole)


def scaled(one: Recipe | None = None, **options: Any) -> Session:
    """In fp16, with a loss scale that overflows nothing."""
    session = session_of(one, precision="fp16", **options)
    session.learner.scaler.load_state_dict({**session.learner.scaler.state_dict(), "scale": 1024.0})
    return session


def test_an_overflow_in_fp16_is_no_fault_but_commits_nothing() -> None:
    session = scaled(small(ema=0.9))
    go(session, steps=2)
    kept = {k: v.clone() for k, v in session.state()[0].items() if k.startswith(("co", "op", "em"))}
    scale = session.learner.scaler.get_scale()
    session.learner.scaler.load_state_dict(
        {**session.learner.scaler.state_dict(), "scale": 2.0**60}
    )
    go(session, steps=3)
    now = session.state()[0]
    assert session.step == 3
    assert [k for k, v in kept.items() if not torch.equal(now[k], v)] == []
    assert session.learner.scaler.get_scale() == 2.0**59
    session.learner.scaler.load_state_dict({**session.learner.scaler.state_dict(), "scale": scale})
    go(session, steps=4)
    changed = [k for k, v in kept.items() if not torch.equal(session.state()[0][k], v)]
    assert len(changed) > len(kept) // 2


def test_a_loss_scale_that_falls_to_nothing_is_one() -> None:
    session = scaled()
    weight = session.learner.cohort.students[0].get_submodule("fc").weight
    weight.register_hook(lambda g: g * INF)  # type: ignore[union-attr, operator]
    go(session, steps=1)
    session.learner.scaler.load_state_dict(
        {**session.learner.scaler.state_dict(), "scale": 2.0**-13}
    )
    with pytest.raises(UserError, match=r"step 3 .*student 0's fc.weight holds .* scale of 3"):
        go(session)
    assert session.learner.scaler.get_scale() == 2.0**-15


def test_a_forward_that_overflows_in_fp16_is_one() -> None:
    session = scaled(skip_nonfinite=1)
    poison_student(session)
    scale = session.learner.scaler.get_scale()
    go(session)
    assert session.skipped == 1
    assert session.learner.scaler.get_scale() == scale


def test_a_flag_is_read_every_so_often_and_before_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "READ_EVERY", 3)
    done: list[str] = []
    keeper = Keeper(
        lambda background: done.append("save"),
        StopRequest(),
        4,
        None,
        settle=lambda: done.append("check"),
    )
    for _ in range(7):
        keeper.on_step(1)
    assert done == ["check", "check", "save", "check"]


def test_a_run_that_diverges_stops_with_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: the exit code, the sentence, a checkpoint of finite values, no half epoch."""
    out = tmp_path / "run"
    flags = ["--out", str(out), "--quiet", "--engine", "loop", "--precision", "fp32"]
    command = ["train", "okddip-branch@2/resnet8/digits", *flags, "--batch-size", "20"]
    command += ["--epochs", "2", "--lr", "1e25"]
    assert run_command(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    step = int(error.split("step ")[1].split()[0])
    saved = sorted((out / "checkpoints").glob("last-*"))
    assert [path.name for path in saved] == [f"last-{step:09d}"]
    tensors, facts = load_checkpoint(saved[0])
    assert (facts["step"], facts["batch"]) == (step, step)
    assert all(x.isfinite().all() for x in tensors.values() if x.is_floating_point())
    assert Run.load(out).metrics == []
    assert run_command([*command, "--resume", "--skip-nonfinite", "1"]) == 2
    assert f"step {step + 1} " in capsys.readouterr().err.splitlines()[-1]


def test_metrics_count_what_was_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Session.begin_epoch

    def begin(session: Session) -> None:
        started(session)
        if not isinstance(session.stream, Poisoned):
            poison_image(session)

    monkeypatch.setattr(Session, "begin_epoch", begin)
    one = recipe("okddip-branch@2/resnet8/digits", epochs=2, batch_size=20)
    options = RunOptions(
        quiet=True, engine="loop", precision="fp32", skip_nonfinite=2, eval_every=2
    )
    run = train(one, options, out=tmp_path / "run")
    assert [row["skipped_steps"] for row in run.metrics] == [1, 2]
    assert [row["step"] for row in run.metrics] == [5, 10]


def test_what_is_held_comes_back_to_the_bit() -> None:
    tensors = [
        torch.tensor([1.0, -0.0, NAN]),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(7),
        torch.zeros(0),
        torch.randn(3, dtype=torch.float64),
    ]
    before = [x.clone() for x in tensors]
    held = Held(tensors)
    for undo, wanted in ((1.0, before), (0.0, [x.clone() + 1 for x in before])):
        held.take()
        for x in tensors:
            x.add_(1)
        held.put_back(torch.tensor(undo))
        for x, want in zip(tensors, wanted, strict=True):
            assert x.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes()
    with pytest.raises(ValueError, match="gaps"):
        Held([torch.zeros(4, 4)[:, :2]])


def test_the_search_for_a_fault_has_the_memory_of_the_graphs() -> None:
    session = session_of()
    captured = session.learner.captured = CapturedStep(step, session.learner.device)
    captured.graphs["a shape"] = object()  # type: ignore[index, assignment]
    find(session)
    assert captured.graphs == {"a shape": None}
