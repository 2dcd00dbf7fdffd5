"""The step: parts of a batch, clipping, loss scaling, averages, compiling, capturing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import profile

import fastokd
from fastokd.cohort import Choice
from fastokd.errors import UserError
from fastokd.learner.captured import CapturedStep
from fastokd.learner.step import step, training_step
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from tests.learner.every_method import COMPILES, Recorder

PLAIN: dict[str, Any] = {"quiet": True, "precision": "fp32", "engine": "loop", "impl": "torch"}


def small(name: str = "okddip-branch/resnet8/digits", **changes: object) -> Recipe:
    return recipe(name, **{"epochs": 300, "students": 2, "batch_size": 8, **changes})


def session_of(one: Recipe | None = None, **options: Any) -> Session:
    return build(one or small(), RunOptions(**{**PLAIN, **options}))


def doubled(session: Session) -> Session:
    """The session in float64."""
    session.learner.cohort.double()
    session.learner.method.double()
    return session


def take(session: Session, steps: int, first: int = 0) -> list[float]:
    """Some steps on the first images; the losses."""
    losses = []
    session.begin_epoch()
    for index in range(first, first + steps):
        images, labels = session.stream.batch(0, index)
        session.begin_step(len(labels))
        losses.append(training_step(session.learner, images, labels)[1].total.item())
        session.step += 1
    return losses


def state(session: Session) -> dict[str, Tensor]:
    return {k: v for k, v in session.state()[0].items() if not k.startswith("rng")}


def frozen_norms(session: Session) -> Session:
    """BatchNorm by its running statistics: then the parts of a batch are the batch."""
    session.learner.cohort.eval()
    return session


@pytest.mark.parametrize("name", ["okddip-branch", "okddip_random-branch", "ffsd"])
def test_a_batch_in_parts_is_the_batch_where_the_norms_allow(name: str) -> None:
    one = small(f"{name}/resnet8/digits", students=3, batch_size=7)
    whole = frozen_norms(doubled(session_of(one)))
    parts = frozen_norms(doubled(session_of(one, accumulate=3)))
    if name == "ffsd":
        whole.learner.method.eval()
        parts.learner.method.eval()
    assert take(whole, 2) == pytest.approx(take(parts, 2), rel=1e-9)
    torch.testing.assert_close(state(parts), state(whole), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("criterion", ["ce", "bce"])
def test_mixed_labels_are_split_with_their_parts(criterion: str) -> None:
    one = small("dml-network/resnet8/digits", batch_size=7, criterion=criterion)
    totals = []
    for accumulate in (1, 3):
        session = frozen_norms(doubled(session_of(one, accumulate=accumulate)))
        shares = torch.linspace(0, 1, 7), torch.linspace(1, 0, 7).double()
        for share2_B in shares:
            session.learner.progress.mixed_with = torch.arange(7), share2_B
            totals += take(session, 1, first=session.step)
    assert totals[:2] == pytest.approx(totals[2:], rel=1e-9)
    session.learner.progress.mixed_with = None
    assert take(session, 1, first=session.step)[0] != pytest.approx(totals[3], rel=1e-3)


def test_ffsds_decoders_teach_on_the_statistics_from_before_the_step() -> None:
    """Norms in training, but each part of the batch is the same images: then its statistics are the
    batch's, and only the parts' order could tell the parts from the batch."""
    one = small("ffsd/resnet8/digits", students=3, batch_size=8)
    found = []
    for accumulate in (1, 2):
        session = doubled(session_of(one, accumulate=accumulate))
        session.begin_epoch()
        images, labels = (part[:4].repeat(2, *[1] * (part.dim() - 1)) for part in
                          session.stream.batch(0, 0))  # fmt: skip
        losses = []
        for _ in range(2):
            session.begin_step(8)
            losses.append(training_step(session.learner, images, labels)[1].total.item())
        found.append((losses, {k: v for k, v in state(session).items() if "num_batches" not in k}))
    (whole, after), (parts, in_parts) = found
    # A variance is taken over n - 1 values: of the first part's 32 in the last map, not of 64.
    assert parts == pytest.approx(whole, rel=2e-3)
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    for name, value in after.items():
        if name.startswith("method.") and name.endswith("running_mean"):
            torch.testing.assert_close(in_parts[name], value, rtol=5e-2, atol=1e-3)


def test_parts_are_what_the_norms_see_and_memory_holds() -> None:
    sizes: list[int] = []
    session = session_of(accumulate=4)
    session.learner.cohort.register_forward_pre_hook(
        lambda _module, args: sizes.append(len(args[0]))
    )
    session.begin_epoch()
    session.begin_step(8)
    logits_SBC, loss = training_step(session.learner, *session.stream.batch(0, 0))
    assert sizes == [2, 2, 2, 2]
    assert logits_SBC.shape == (2, 8, 10)
    assert loss.parts["ce_S"].shape == (2,)
    assert session.learner.parts_of(3) == 3
    gate = session_of(small("one/resnet8/digits"), accumulate=4)
    assert [gate.learner.parts_of(b) for b in (8, 5, 2)] == [4, 2, 1]


@pytest.mark.parametrize("name", ["okddip-branch", "okddip-network"])
def test_the_losss_gradients_are_not_multiplied_by_one(name: str, cpp_ops: None) -> None:
    """Nor read, where the total is the loss itself."""
    session = session_of(small(f"{name}/resnet8/digits", students=3), impl="cpp")
    images, labels = session.stream.batch(0, 0)
    session.begin_step(len(labels))
    with profile() as seen:
        step(session.learner, images, labels)
    events = sorted(seen.events() or [], key=lambda event: event.time_range.start)
    (node,) = (e for e in events if e.name == "FusedLossBackward")
    assert not {"aten::mul", "aten::item"} & {event.name for event in node.cpu_children}


def test_a_clipped_gradient_has_the_norm() -> None:
    session = session_of(clip_norm=0.5)
    seen: list[Tensor] = []

    def look(*_: Any) -> None:
        norms = [p.grad.norm() for p in session.learner.parameters() if p.grad is not None]
        seen.append(torch.stack(norms).norm())

    session.learner.optimizers[0].register_step_pre_hook(look)
    take(session, 1)
    assert seen[0].item() == pytest.approx(0.5, rel=1e-4)


def test_fp16_scales_the_loss_and_skips_what_overflows() -> None:
    """A scale far too large: the first step changes nothing but the scale; it comes back too."""
    session = session_of(precision="fp16")
    assert session.learner.scaler.is_enabled()
    session.learner.scaler.load_state_dict(
        {**session.learner.scaler.state_dict(), "scale": 2.0**60}
    )
    before = {k: v.clone() for k, v in session.learner.cohort.named_parameters()}
    take(session, 1)
    assert all(torch.equal(v, before[k]) for k, v in session.learner.cohort.named_parameters())
    assert session.learner.scaler.get_scale() == 2.0**59
    session.learner.scaler.load_state_dict({**session.learner.scaler.state_dict(), "scale": 1024.0})
    take(session, 1)
    assert not all(torch.equal(v, before[k]) for k, v in session.learner.cohort.named_parameters())
    tensors, facts = session.state()
    again = session_of(precision="fp16")
    again.load_state(tensors, facts)
    assert again.learner.scaler.state_dict() == session.learner.scaler.state_dict()


def test_a_clipped_fp16_gradient_is_clipped_unscaled() -> None:
    """The parameters move as in fp32: by a norm that was taken of scaled gradients, they would hardly
    move at all."""
    moves = []
    for precision in ("fp16", "fp32"):
        session = session_of(precision=precision, clip_norm=0.1)
        before = torch.cat([p.detach().flatten() for p in session.learner.parameters()])
        take(session, 1)
        moves.append(
            torch.cat([p.detach().flatten() for p in session.learner.parameters()]) - before
        )
    ours, theirs = moves
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_the_average_follows_the_leader_and_is_what_is_kept(tmp_path: Path) -> None:
    session = session_of(small(ema=0.75))
    average = session.learner.average
    assert average is not None
    key = "layer3.0.conv2.weight"
    expected = session.learner.cohort.student_state(1)[key].clone()
    for index in range(3):
        take(session, 1, first=index)
        share = max(0.25, 9 / (10 + index))
        expected = expected + share * (session.learner.cohort.student_state(1)[key] - expected)
    torch.testing.assert_close(average.states[1][key], expected)
    assert average.states[1]["bn1.num_batches_tracked"] == 3
    run = fastokd.train(small(batch_size=50, epochs=1, ema=0.5), out=tmp_path / "run", **PLAIN)
    assert 0 <= run.last["test"]["ema_top1"] <= 1
    kept = load_file(run.folder / "student.safetensors")
    assert kept.keys() == average.states[1].keys()
    evaluated = fastokd.evaluate(run.folder, options=RunOptions(quiet=True, precision="fp32"))
    assert evaluated["test"]["ema_top1"] == run.last["test"]["ema_top1"]


def test_a_run_changes_its_engine_with_momentum_and_average() -> None:
    """loop, grouped, vmap, loop; and the other layout: as steps of the loop alone."""
    turns = [
        Choice("loop"),
        Choice("grouped"),
        Choice("vmap", False, "contiguous"),
        Choice("loop", False, "contiguous"),
        Choice("loop"),
    ]
    states = []
    for choices in (turns, [Choice("loop")] * len(turns)):
        session = doubled(session_of(small("okddip-network/resnet8/digits", batch_size=6, ema=0.9)))
        assert session.learner.average is not None
        session.learner.average.states[1] = {
            k: v.clone() for k, v in session.learner.cohort.student_state(1).items()
        }
        for index, choice in enumerate(choices):
            session.learner.adopt(choice)
            take(session, 1, first=index)
        states.append(state(session))
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_initial_weights_do_not_depend_on_the_engine(engine: str) -> None:
    torch.testing.assert_close(
        state(session_of(engine=engine)), state(session_of()), rtol=0, atol=0
    )


@COMPILES
def test_a_compiled_step_is_the_eager_one_across_ramp_and_rate() -> None:
    """Epochs 0, 40 (the ramp), 150 (the rate): what changes is read, not frozen, nor recompiled."""
    eager, compiled = session_of(batch(4)), session_of(batch(4), compile=True)
    assert compiled.learner.choice.compile
    start = torch.cat([p.detach().flatten() for p in eager.learner.parameters()])
    for epoch in (0, 40, 150):
        losses = []
        for session in (eager, compiled):
            session.epoch = epoch
            losses.append(take(session, 1, first=epoch % 7))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3), epoch
    moved = [
        torch.cat([p.detach().flatten() for p in s.learner.parameters()]) for s in (eager, compiled)
    ]
    # Of the whole way: a rate of the wrong epoch would move the last step ten times as far.
    apart = torch.linalg.vector_norm(moved[1] - moved[0]) / torch.linalg.vector_norm(
        moved[0] - start
    )
    assert apart < 0.05


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *[("okddip-branch/resnet8", engine) for engine in ("loop", "grouped", "vmap")],
        ("ffsd/resnet8", "grouped"),
        ("dml/vgg16", "vmap"),
        ("mcl/resnet8", "loop"),
    ],
)
def test_a_step_is_compiled_once(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG has dropout, whose masks a step hands to the layers."""
    torch._dynamo.reset()  # what other tests compiled counts against the limit of one function
    compilations: list[int] = []

    def counting(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        compilations.append(len(graph.graph.nodes))
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, **how: real(body, backend=counting, **how))
    session = session_of(
        small(f"{name}/digits", students=3 if "ffsd" in name else 2, batch_size=4),
        engine=engine,
        compile=True,
    )
    for index in range(5):
        take(session, 1, first=index)
        assert len(compilations) == 1, f"compiled again in step {index}"


def batch(size: int) -> Recipe:
    return small(batch_size=size)


@pytest.mark.parametrize(
    ("sizes", "replays"),
    [((8, 8, 8, 8, 5, 8, 8, 5, 5, 8), [5, 2]), ((5, 8, 8, 8, 5, 8), [3, 1])],
)
def test_a_captured_step_reads_each_batch_from_the_same_tensors(
    sizes: tuple[int, ...], replays: list[int]
) -> None:
    """Warm-up, a recording for each shape, replays: as the plain steps. A shape is recorded when
    it comes again after the warm-up, whichever comes first."""
    one = small("okddip_random-branch/resnet8/digits", students=2)
    plain, captured = session_of(one), session_of(one)
    recorder = Recorder()
    graphs = CapturedStep(
        partial(step, captured.learner), captured.learner.device, recorder, warm_up=2
    )
    for index, size in enumerate(sizes):
        for session, run in ((plain, partial(step, plain.learner)), (captured, graphs)):
            session.epoch = 40 * index
            session.begin_epoch()
            images, labels = (part[:size] for part in session.stream.batch(0, index))
            session.begin_step(size)
            run(images, labels)
            session.step += 1
    assert recorder.replays == replays
    torch.testing.assert_close(state(captured), state(plain), rtol=0, atol=0)


def test_out_of_memory_says_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package has a function of that name.
    train_module = importlib.import_module("fastokd.train")
    real = train_module.build

    def limited(*args: Any, **kwargs: Any) -> Session:
        session = real(*args, **kwargs)

        def refuse(_module: Any, images: tuple[Tensor, ...]) -> None:
            if len(images[0]) > 14:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        session.learner.cohort.register_forward_pre_hook(refuse)
        return session

    monkeypatch.setattr(train_module, "build", limited)
    with pytest.raises(UserError, match=r"13 would fit: --batch-size 13, or --accumulate 4"):
        fastokd.train(small(batch_size=50), out=tmp_path / "run", **PLAIN)
