"""Proposers: what answers an LLM operator. Importing this package imports no SDK and no torch."""

from __future__ import annotations

from selfpruner.errors import ConfigError
from selfpruner.proposers.base import Proposer
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.workers.base import Session, WorkerPool

__all__ = ["Proposer", "ProposerSettings", "create"]


def create(name: str, settings: ProposerSettings, *, pool: WorkerPool, session: Session) -> Proposer:
    """The proposer called ``name`` in the server's settings. Raises ConfigError when a recording cannot be read."""
    if settings.kind == "openai":
        from selfpruner.proposers.openai import OpenAIProposer

        return OpenAIProposer(name, settings)
    if settings.kind == "local":
        from selfpruner.proposers.local import LocalProposer

        return LocalProposer(name, settings, pool, session)
    from selfpruner.proposers.replay import ReplayProposer, read_recording

    if settings.recording is None:
        raise ConfigError(f"Proposer {name!r} is of kind replay and has no recording; name its JSONL file.", param="proposer")
    return ReplayProposer(name, read_recording(settings.recording))
