"""What a job holds after its search, for everything that is made of the outcome: the report, the front, the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selfpruner.config import SearchConfig
from selfpruner.evolution.evaluator import Evaluator
from selfpruner.evolution.extras import Extras
from selfpruner.evolution.outcome import Outcome
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Progress, Recorder
from selfpruner.stages import Stages
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import PrepareResult

# What events and reports keep of it.
PREPARED = {"model", "texts", "dtype", "device"}


@dataclass(slots=True, kw_only=True)
class RunningJob:
    """``prepared`` is what the worker said of the model and the texts; ``outcome`` is the search's, or the front's once there is
    one."""

    id: str
    config: SearchConfig
    pool: WorkerPool
    session: Session
    recorder: Recorder
    prepared: PrepareResult
    space: SearchSpace
    evaluator: Evaluator
    extras: Extras
    outcome: Outcome

    @property
    def best(self) -> Plan:
        return Plan(self.outcome.best.levels)

    @property
    def stages(self) -> Stages:
        return self.evaluator.stages

    def parameters(self, plan: Plan) -> int:
        """Parameters of the whole model with ``plan`` applied."""
        return self.prepared.model.parameters - self.space.removed(plan)

    def teller(self, stage: str) -> Callable[[str], None]:
        """What to call with what is done in ``stage``: progress in which what was found stays in view."""

        def tell(text: str) -> None:
            found = self.outcome
            self.recorder.progress(
                Progress(
                    stage=stage,
                    generation=found.generations,
                    generations=self.config.generations,
                    evaluations=self.evaluator.evaluations,
                    plans=len(self.evaluator.plans),
                    best_fitness=found.best.fitness,
                    best_relative=found.best.relative,
                    best_plan=found.best.plan_hash,
                    message=text,
                    data={"operators": dict(found.made), "improved": dict(found.improved), "tokens": found.tokens},
                )
            )

        return tell
