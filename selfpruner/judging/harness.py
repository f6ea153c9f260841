"""Zero-shot multiple-choice tasks through lm-evaluation-harness, which this file imports (extra ``evaluate``).

Prompts, tokens and metrics are the harness's own; the scoring is :mod:`selfpruner.judging.likelihood`, which computes a context
once for all its choices. A task is a local file where there is one, ``FOLDER/lm_eval_tasks/local_NAME.yaml`` (an ordinary task file
without code; its data files are relative to FOLDER), otherwise the harness's own task of that name with data from the hub.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from selfpruner.errors import ConfigError, TextError
from selfpruner.judging.likelihood import Question, likelihoods
from selfpruner.judging.task_files import LocalTask
from selfpruner.models import check_ids, hub_available, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Per metric 0 or 1 for each document scored; ``total`` documents are in the task."""

    metrics: dict[str, list[int]]
    total: int


class SharedContextLM(HFLM):
    """The harness's model class for transformers, with log-likelihoods that compute a context once for all its continuations."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        progress: Callable[[int, int], None] = lambda *_: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        with _hushed():
            super().__init__(pretrained=model, tokenizer=tokenizer)
        self._progress = progress
        self._cancelled = cancelled

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness's signature
        override_bs: int | None = None,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        places: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            places.setdefault(tuple(context), []).append(index)
        questions = [Question(context, [requests[index][2] for index in indexes]) for context, indexes in places.items()]
        for question in questions:
            ids = (*question.context, *(token for continuation in question.continuations for token in continuation))
            check_ids(ids, self.model, self.tokenizer, "A question")
        scored = likelihoods(self.model, questions, max_length=self.max_length, progress=self._progress, cancelled=self._cancelled)
        answers = [(0.0, False)] * len(requests)
        for indexes, scores in zip(places.values(), scored, strict=True):
            for index, score in zip(indexes, scores, strict=True):
                answers[index] = score.logprob, score.greedy
        return answers


def load_task(name: str, local: LocalTask | None, cache: Path) -> ConfigurableTask:
    """The task ``name``. Raises ConfigError for one that the harness does not know or that is no multiple choice, TextError where
    its data cannot be had."""
    if local is not None:
        try:
            with _hushed():
                task = ConfigurableTask(config=local.config(cache / "datasets"))
        except Exception as error:  # whatever the harness, datasets and jinja raise: there is no common base
            raise TextError(
                f"The task file {local.file} cannot be used ({error}). Correct it, or remove it.", param="tasks"
            ) from error
        return _checked(task, name)
    with _hushed():
        manager = TaskManager()
    if name not in manager.all_subtasks:
        close = get_close_matches(name, manager.all_subtasks, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " `lm_eval ls tasks` lists them."
        raise ConfigError(f"The harness has no task {name!r}.{hint}", code="unknown_name", param="tasks")
    if not hub_available():
        raise TextError(
            f"The data of task {name} are on the hub, which cannot be reached. Connect, or name a folder that has "
            f"{LocalTask.place(name)} with --data or SELFPRUNER_DATA.",
            param="tasks",
        )
    try:
        with _hushed():
            task = manager.load(name)["tasks"][name]
    except Exception as error:
        raise TextError(f"The data of task {name} cannot be read from the hub ({error}).", param="tasks") from error
    return _checked(task, name)


def run(task: ConfigurableTask, name: str, model: SharedContextLM, limit: int | None = None) -> Outcomes:
    """Score ``task``; with ``limit`` on so many of its documents, see :func:`subset`."""
    total = len(task.eval_docs)
    chosen = None if limit is None or limit >= total else subset(name, total, limit)
    with _hushed():
        task.build_all_requests(samples=chosen)
    instances: Sequence[Instance] = task.instances
    with quiet():
        answers = model.loglikelihood(instances, disable_tqdm=True)
    for instance, answer in zip(instances, answers, strict=True):
        instance.resps.append(answer)
    task.apply_filters()
    by_document: dict[int, list[Instance]] = {}
    for instance in instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    metrics: dict[str, list[int]] = {}
    (key,) = instances[0].filtered_resps
    for number, document in task.doc_iterator(samples=chosen):
        asked = sorted(by_document[number], key=lambda instance: instance.idx)
        results = task.process_results(document, [instance.filtered_resps[key] for instance in asked])
        for metric in METRICS:
            if metric in results:
                metrics.setdefault(metric, []).append(int(results[metric]))
    return Outcomes(metrics, total)


def subset(name: str, total: int, limit: int) -> list[int]:
    """``limit`` of ``total`` documents in order, drawn by the task's name and so the same for every model. Task files are often
    sorted by origin, so the first documents would not do. A smaller limit is a subset of a larger one."""
    order = list(range(total))
    random.Random(f"selfpruner:{name}").shuffle(order)
    return sorted(order[:limit])


def _checked(task: ConfigurableTask, name: str) -> ConfigurableTask:
    if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
        raise ConfigError(f"The task {name} is no multiple choice with an accuracy ({task.OUTPUT_TYPE}).", param="tasks")
    return task


@contextmanager
def _hushed() -> Iterator[None]:
    """Bars, warnings and log lines of the harness and of datasets go nowhere."""
    with quiet(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        yield
