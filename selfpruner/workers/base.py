"""The pool protocol: how tasks reach whatever owns a device. Tasks and results are plain JSON data.

Every call carries the whole *session* (the job's config): a worker prepares it when it does not hold it, so a replaced worker, a
restarted server or a second job on the same model need no special case. Statistics are cached on disk, which makes
preparing again cheap.

    kind      payload                                            result
    prepare   {texts?: [role], output?: folder}                  {space, signals, model, texts, dtype, device, seconds, peak_mib}
    expect    {output?: folder}                                  {space}: as it will be, up to what a criterion leaves of weights
    evaluate  {plans: [[level]], text, sequences: [int],         {rows: [{kl, nll, tokens, reason, rejected}], seconds,
               exact?, race?: {keep, contenders: [index],         passes, passes_without_sharing}
               confidence?}}
    slopes    {plan: [level], moves: [[block, level]], text,     {kl, first: [nats], size: [share], tokens, seconds}: see
               sequences: [int]}                                  ``evaluation.slopes``
    propose   {messages, schema, temperature, max_tokens, seed}  {text, model, prompt_tokens, completion_tokens, seconds}
    baseline  {changes, text, sequences: [int]}                  {kl, nll, tokens, parameters, seconds}, uniform plan
    measure   {plans: {name: [level]}, decode?}                  {rows: {name: {parameters, prefill_tps?, decode_tps?}}, not_timed?}
    generate  {plans: {name: [level]}, text,                     {repetition: {name: rate}, seconds}
               sequences: [int], prompt, new_tokens}
    time_blocks {tokens}                                         {tokens, blocks: [[us]], rest}, prefill at batch 1
    export    {plan: [level], directory, card}                   {path, parameters, manifest_sha256, verification}

``exact`` says whether expectations over the vocabulary are exact; by default on the text ``report`` only. ``race``: of the plans
at ``contenders`` only ``keep`` will be kept, so others may be dropped early; their rows are ``rejected``, with estimated figures
and the tokens that were spent on them. ``generate`` writes ``new_tokens`` greedily after the first ``prompt`` tokens of each
sequence; a worker whose model is streamed cannot, and raises ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selfpruner.progress import OnProgress

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Session:
    """What a worker must hold to do a task: ``config`` is a dumped SearchConfig, ``cache`` a folder for statistics and texts. With
    a ``plan`` (levels) nothing is asked for but its export, and what only others need may be left out."""

    key: str
    config: Mapping[str, Any]
    cache: str
    plan: Sequence[int] | None = None


class WorkerPool(Protocol):
    async def run(self, session: Session, kind: str, payload: Mapping[str, Any], on_progress: OnProgress | None = None) -> Json:
        """Do one task and return its result.

        A worker that dies is replaced and the task run again; after ``max_attempts`` deaths on one task, or when the task
        itself fails, a WorkerError (or the typed error the task raised, see ``errors.from_dict``) is raised. Cancelling the
        awaiting asyncio task stops the work within seconds.
        """

    async def close(self) -> None: ...


class TaskHandler(Protocol):
    """The torch side. Blocking; one call at a time. ``cancelled`` is polled between layers and steps."""

    def handle(
        self,
        session: Session,
        kind: str,
        payload: Mapping[str, Any],
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Json: ...
