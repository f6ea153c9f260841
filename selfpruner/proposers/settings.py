"""What the operator of the server says about a proposer. It is never part of a request: a base_url from outside would leak keys."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from selfpruner import environment

Kind = Literal["openai", "local", "replay"]


class ProposerSettings(BaseModel):
    """One named proposer.

    ``timeout`` bounds a whole call in seconds, retries included. Prices are per million tokens, in any one currency.
    ``plans_per_call``, ``max_prompt_chars`` and ``reflections`` are hints to the operators; None takes what suits the kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    kind: Kind = "local"
    base_url: str = "https://api.openai.com/v1"
    api_key: SecretStr | None = None
    model: str = Field(default="", max_length=256)
    temperature: float = Field(default=0.8, ge=0, le=2)
    max_tokens: int = Field(default=4096, ge=16, le=1_000_000)
    timeout: float = Field(default=120.0, gt=0, le=3600)
    max_retries: int = Field(default=2, ge=0, le=10)
    price_prompt: float = Field(default=0.0, ge=0)
    price_completion: float = Field(default=0.0, ge=0)
    plans_per_call: int | None = Field(default=None, ge=1, le=16)
    max_prompt_chars: int | None = Field(default=None, ge=500, le=1_000_000)
    reflections: bool | None = Field(default=None, description="whether it is asked for lessons between generations")
    recording: Path | None = Field(default=None, description="JSONL of llm_call rows, for kind replay")

    @field_validator("base_url")
    @classmethod
    def _plain_http(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("must be an http:// or https:// address, such as http://127.0.0.1:8000/v1")
        if url.username is not None or url.password is not None:
            raise ValueError("must not carry a user name or password; put the key into api_key")
        return value

    @model_validator(mode="after")
    def _complete(self) -> ProposerSettings:
        if self.kind == "openai" and not self.model:
            raise ValueError("a proposer of kind openai needs the name of a model")
        return self

    @property
    def plans(self) -> int:
        """Plans asked of one call. A small local model writes one; a large one sees several parents at once."""
        return self.plans_per_call or (1 if self.kind == "local" else 4)

    @property
    def prompt_chars(self) -> int:
        """The longest prompt. A local model on a CPU reads a few hundred tokens a second, and a digit is a token."""
        return self.max_prompt_chars or (1600 if self.kind == "local" else 24_000)

    @property
    def reflects(self) -> bool:
        """Whether a lesson is worth its call. A model small enough to run beside the search has none to give."""
        return self.kind != "local" if self.reflections is None else self.reflections

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_prompt + completion_tokens * self.price_completion) / 1e6


class _Variables(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SELFPRUNER_", env_nested_delimiter="__", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    proposers: dict[str, ProposerSettings] = Field(default_factory=dict)


def from_environment() -> dict[str, ProposerSettings]:
    """The proposers of ``SELFPRUNER_PROPOSERS``; no other variable is looked at. Raises ConfigError."""
    return dict(environment.read(_Variables).proposers)
