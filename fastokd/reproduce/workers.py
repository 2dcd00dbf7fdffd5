"""The processes that train runs within a budget of time, on a folder that other processes may share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from fastokd.errors import Interrupted
from fastokd.reproduce import child
from fastokd.reproduce.everything import Everything
from fastokd.reproduce.order import Job, fit, in_hours
from fastokd.reproduce.standing import claimed, holder, note_failure, standing_of
from fastokd.run.interruption import StopRequest

# Seconds between two looks at the runs that other processes hold.
LOOK_EVERY = 2.0


def train_all(of: Everything, budget: float, changed: Callable[[], object]) -> None:
    """Trains what fits ``budget`` hours since ``of`` was made; ``changed`` is called whenever a run has begun or ended.

    Raises:
        Interrupted: a signal came. The runs are saved, as they are at the budget's end.
    """
    of.out.mkdir(parents=True, exist_ok=True)
    _Workers(of, budget, changed).run()


@dataclass
class _Running:
    child: child.Child
    claim: ExitStack
    since: float


class _Workers:
    """The processes that train runs until the budget's end."""

    def __init__(self, of: Everything, budget: float, changed: Callable[[], object]) -> None:
        self.of = of
        self.budget, self.changed = budget, changed
        self.running: dict[int, _Running] = {}
        self.look_every = LOOK_EVERY
        self.whole = budget
        self.begun: dict[str, int] = {}  # how often each run was begun in this call

    def _left(self) -> float:
        """The seconds until the budget's end."""
        return self.of.since + 3600 * self.budget - time.monotonic()

    def run(self) -> None:
        """Trains until nothing is left, the budget ends, or a signal comes."""
        self.whole = self._left() / 3600  # a longer run is begun, and saved at the budget's end
        with StopRequest() as stop:
            try:
                while stop.received is None and self._left() > 0:
                    for slot in range(len(self.of.places)):
                        if slot not in self.running and not self._begin(slot):
                            break
                    if not self.running and not self._others():
                        break
                    self._wait(stop)
            finally:
                for one in self.running.values():
                    one.child.stop()
                for slot in [*self.running]:
                    self._end(slot)
            if stop.received is not None:
                raise Interrupted(stop.received)

    def _wait(self, stop: StopRequest) -> None:
        """Until a run ends, a signal or the budget's end; without runs of our own, until the next look."""
        looked = time.monotonic()
        while stop.received is None and self._left() > 0:
            ended = [s for s, one in self.running.items() if not one.child.process.is_alive()]
            for slot in ended:
                self._end(slot)
            if ended or (
                len(self.running) < len(self.of.places)
                and time.monotonic() - looked > self.look_every
            ):
                return
            time.sleep(0.1)

    def _others(self) -> list[str]:
        """Runs that other processes hold, and that may leave some to this one."""
        return [name for name in self.of.trainings if holder(self.of.out, name) is not None]

    def _begin(self, slot: int) -> bool:
        """Begins the next run that fits in this slot; False if there is none."""
        of, looked = self.of, time.monotonic()
        at = of.standings()
        self.look_every = max(LOOK_EVERY, 10 * (time.monotonic() - looked))
        left = self._left() / 3600
        done = {name for name, one in at.items() if one.state == "done"} | {""}
        ready = [job for job in of.jobs(at) if job.teacher in done]
        for job in self._fitting(ready, left):
            claim = ExitStack()
            # Another process may have trained it since it was looked at.
            if claim.enter_context(claimed(of.out, job.folder)) and not self._is_done(job.folder):
                self._start(slot, job, claim)
                return True
            claim.close()
        return False

    def _fitting(self, ready: list[Job], left: float) -> Iterator[Job]:
        """The runs that may begin now, the best first."""
        while ready:
            found = next((j for j in fit(ready, left, 1, self.whole) if j.start == 0.0), None)
            if found is None:
                return
            yield found
            ready = [job for job in ready if job.folder != found.folder]

    def _start(self, slot: int, job: Job, claim: ExitStack) -> None:
        of, place = self.of, self.of.places[slot]
        training = of.trainings[job.folder]
        options = of.options_of(training)
        begun = self.begun[job.folder] = self.begun.get(job.folder, 0) + 1
        new = not (of.out / job.folder / "recipe.json").exists()
        if of.first_steps is not None and begun == 1 and new:
            options = replace(options, max_steps=of.first_steps)
        note_failure(of.out, job.folder, "")
        log = of.out / "logs" / f"{job.folder}.txt"
        recipe = training.entry.recipe
        made = child.start(recipe, options, log, gpu=place.gpu, threads=place.threads)
        self.running[slot] = _Running(made, claim, time.monotonic())
        about = "" if of.first_steps or math.isinf(job.hours) else f", about {in_hours(job.hours)}"
        of.tell(f"begins {job.folder}{about}{', as far as the budget goes' if job.part else ''}")
        self.changed()

    def _end(self, slot: int) -> None:
        """Notes how the run ended, and gives up its claim."""
        one, of = self.running.pop(slot), self.of
        state, why = one.child.outcome()
        name = one.child.folder
        with one.claim:
            if state == "failed":
                note_failure(of.out, name, why)
        took = in_hours((time.monotonic() - one.since) / 3600)
        of.tell(f"{state} after {took}: {name}{f' ({why})' if why else ''}")
        again = of.first_steps is not None and self.begun[name] < 2
        if state == "failed" or (not again and not one.child.asked and not self._is_done(name)):
            of.failed.add(name)
        self.changed()

    def _is_done(self, name: str) -> bool:
        training = self.of.trainings[name]
        options = self.of.options_of(training)
        return standing_of(self.of.out, training, options, mine=True).state == "done"
