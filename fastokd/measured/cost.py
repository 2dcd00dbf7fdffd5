"""The seconds of a training step by its parts, kept in ``cost.json``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter as clock

import torch

from fastokd.checkpoint import read_object, write_durably, writing
from fastokd.data import DatasetSplits
from fastokd.device import synchronize
from fastokd.errors import UserError
from fastokd.learner.step import gradients, update
from fastokd.run.beside import beside, measured_on
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.run.session import Session

FILE = "cost.json"
# In the order of a step.
PARTS = ("data", "forward", "loss", "backward", "update")
WARM_UP, TIMED = 3, 8
# No further step is begun after so many seconds, once one is timed.
PATIENCE = 60.0


@dataclass(frozen=True)
class Cost:
    """The parts of one eager training step, each followed by a synchronisation with the device.

    Attributes:
        step: that of the run's checkpoint.
        seconds: the median of each of :data:`PARTS` over the timed ``steps``: ``data``, from the loader to
            the images as the students see them; ``forward`` of the cohort; the method's ``loss``;
            ``backward``; ``update``, the optimizers and all that remains.
        batch: images of a step; of a run on several ranks, one rank's share of them.
        device: ``"cpu"``, or the GPU's name.
        precision, engine: of the students.
        how: ``"measured-cpu"`` or ``"measured-gpu"``.
    """

    step: int
    seconds: dict[str, float]
    steps: int
    batch: int
    device: str
    precision: str
    engine: str
    how: str

    @property
    def total(self) -> float:
        """The sum of the parts in seconds, to be compared with ``per_step(run)["training"]``."""
        return sum(self.seconds.values())


def cost_of(run: Run, data: DatasetSplits | None = None, options: RunOptions | None = None) -> Cost:
    """The cost of a step after the newest step of ``run``: that of its :data:`FILE`, or measured now and kept
    there. Nothing else of the run changes.

    Args:
        data: the run's data, if they are loaded already.
        options: where the data and the device are, unless where the run had them.

    Raises:
        UserError: the run has no checkpoint, or its data or its teacher can't be found.
        DiskError: the file can't be written.
    """
    known = read_cost(run)
    if known is not None:
        return known
    with beside(run, data, options, training=True) as session:
        found = _measured(session)
    with writing(run.folder):
        write_durably(run.folder / FILE, (json.dumps(asdict(found)) + "\n").encode())
    return found


def read_cost(run: Run) -> Cost | None:
    """The cost that is kept of the run's newest step; None if there is none, or the file is damaged."""
    try:
        facts = read_object(run.folder / FILE, "cost")
        found = Cost(**facts)
        fits = found.seconds.keys() == set(PARTS) and found.total > 0
    except (UserError, TypeError, AttributeError):
        return None
    return found if fits and found.step == run.standing.step else None


def per_step(run: Run) -> dict[str, float]:
    """Seconds of the run itself by ``metrics.jsonl``: of ``"training"`` on a whole batch, the median over the
    epochs; of ``"evaluation"`` and ``"loader"`` (waiting for decoded images), all that was spent divided by the
    steps of all epochs. A name is left out where the lines don't say it."""
    rates = [rate for row in run.metrics if (rate := row.get("images_per_second"))]
    found = {"training": run.recipe.batch_size / statistics.median(rates)} if rates else {}
    steps = max((row.get("step", 0) for row in run.metrics), default=0)
    for name, key in (("evaluation", "eval_seconds"), ("loader", "data_seconds")):
        spent = [row[key] for row in run.metrics if key in row]
        if spent and steps:
            found[name] = sum(spent) / steps
    return found


class _Watch:
    """Adds the time since the last lap to a part, after the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        self.laps: dict[str, float] = defaultdict(float)
        self.last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.laps[part] += now - self.last
        self.last = now

    def _now(self) -> float:
        synchronize(self.device)
        return clock()


def _measured(session: Session) -> Cost:
    learner, step = session.learner, session.step
    watch, begun = _Watch(learner.device), clock()
    _attach(watch, session)
    timed: list[dict[str, float]] = []
    batch = 0
    for number, B in enumerate(_steps(session, watch)):
        batch, late = B, clock() - begun > PATIENCE
        if number >= WARM_UP or (late and number > 0):
            timed.append(dict(watch.laps))
        if len(timed) == TIMED or (late and timed):
            break
    on_gpu = learner.device.type == "cuda"
    return Cost(
        step,
        {part: statistics.median(laps[part] for laps in timed) for part in PARTS},
        len(timed),
        batch,
        torch.cuda.get_device_name(learner.device) if on_gpu else "cpu",
        learner.precision,
        learner.choice.engine,
        measured_on(learner.device),
    )


def _attach(watch: _Watch, session: Session) -> None:
    """Has the session's cohort and method end the laps of their parts."""
    cohort, method = session.learner.cohort, session.learner.method
    # Before the second part of an accumulated batch lies the backward pass of the first.
    cohort.register_forward_pre_hook(
        lambda *_: watch.lap("backward" if "loss" in watch.laps else "update")
    )
    cohort.register_forward_hook(lambda *_: watch.lap("forward"))
    method.register_forward_hook(lambda *_: watch.lap("loss"))


def _steps(session: Session, watch: _Watch) -> Iterator[int]:
    """Takes steps over the whole batches of the last epoch, again and again; yields each one's images."""
    learner, largest = session.learner, 0
    session.epoch = session.last_epoch
    learner.train()
    session.begin_epoch()
    while True:
        session.batch = 0
        watch.begin()
        for B, *batch in session.batches(lambda: None):
            largest = max(largest, B)
            if largest == B:
                learner.guard.begin()
                images_BHWC, labels_B, counted_B = session.drawn(B, *batch)
                watch.lap("data")
                learner.before.take()
                logits_SBC, loss = gradients(learner, images_BHWC, labels_B)
                watch.lap("backward")
                update(learner, loss)
                session.count(logits_SBC, counted_B, loss)
                watch.lap("update")
                yield B
            session.finish_step()
            watch.begin()
