"""What the operator of a server decides, read from the environment (prefix ``SELFPRUNER_``). Secrets stay SecretStr.

A request can set none of it. Lists are written with commas, proposers as JSON:

    SELFPRUNER_HOST=127.0.0.1 SELFPRUNER_PORT=8000 SELFPRUNER_HOME=~/.selfpruner
    SELFPRUNER_TOKEN=secret                          one token, owner "default"
    SELFPRUNER_TOKENS='{"ann": "...", "bob": "..."}' several owners, who do not see each other's jobs
    SELFPRUNER_DEVICES=cuda:0,cuda:1                 one worker each, which share the jobs; cpu*2: two that share the cores
    SELFPRUNER_RAY=10.0.0.1:6379                     workers on a Ray cluster; SELFPRUNER_DEVICES is then auto, cuda, cpu or cpu*N,
                                                     what each node gives
    SELFPRUNER_MODEL_ROOT=/models SELFPRUNER_TEXT_ROOT=/texts SELFPRUNER_MODELS='Qwen/*,meta-llama/Llama-3.2-1B'
    SELFPRUNER_PROPOSERS='{"gpt": {"kind": "openai", "base_url": "https://api.openai.com/v1", "api_key": "...", "model": "..."}}'
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from selfpruner import environment
from selfpruner.config import Bytes
from selfpruner.errors import ConfigError
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.workers import devices

Names = Annotated[tuple[str, ...], NoDecode]


class ServerSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SELFPRUNER_", env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; others than loopback need a token")
    port: int = Field(default=8000, ge=0, le=65_535, description="0 picks a free one")
    home: Path = Field(default=Path("~/.selfpruner"), description="database, cache, checkpoints and logs live here")
    token: SecretStr | None = Field(default=None, description="bearer token of the owner 'default'")
    tokens: dict[str, SecretStr] = Field(default_factory=dict, description="owner -> bearer token")
    devices: Names = Field(default=("auto",), description="one worker process per device; cpu*2 makes two")
    ray: str | None = Field(default=None, description="HOST:PORT of a Ray cluster whose nodes do the work, instead of devices here")
    ray_memory: Bytes | None = Field(default=None, description="memory that a worker reserves on a node of that cluster, as 16GiB")
    parallel_jobs: int = Field(default=1, ge=1, le=64, description="jobs that run at the same time; the others queue")
    model_root: Path | None = Field(default=None, description="folder below which requests may name local models")
    text_root: Path | None = Field(default=None, description="folder below which requests may name text files")
    models: Names | None = Field(default=None, description="hub ids (with * and ?) that requests may name")
    proposers: dict[str, ProposerSettings] = Field(default_factory=dict, description="name -> proposer; 'local' is always there")
    shutdown_seconds: float = Field(default=8.0, gt=0, le=60, description="time to hand running jobs back after SIGTERM")

    @field_validator("devices", "models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("devices")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return devices.parse(value)
        except ConfigError as error:
            raise ValueError(error.message) from None

    @field_validator("home", "model_root", "text_root", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if value == "":  # pathlib takes it for the folder the server was started in
            raise ValueError("is empty; name a folder, or leave the variable out")
        return value

    @field_validator("home", "model_root", "text_root", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().resolve()

    @model_validator(mode="after")
    def _safe(self) -> ServerSettings:
        if not self.is_loopback and not self.owners:
            raise ValueError(
                f"host {self.host} can be reached by others, so it needs a token: set SELFPRUNER_TOKEN, or listen on 127.0.0.1"
            )
        for owner, token in self.owners.items():
            if len(token.get_secret_value()) < 8:
                raise ValueError(f"the token of {owner!r} is shorter than 8 characters")
        for root in (self.model_root, self.text_root):
            if root is not None and not root.is_dir():
                raise ValueError(f"{root} is not a folder")
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def owners(self) -> dict[str, SecretStr]:
        """Owner -> token; empty on a loopback server without tokens, where everybody is the owner ``local``."""
        return {**({"default": self.token} if self.token is not None else {}), **self.tokens}

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """Hub ids a request may name. A server without tokens serves its own user, who may name any."""
        if self.models is not None:
            return self.models
        return () if self.owners else ("*/*",)

    @property
    def all_proposers(self) -> dict[str, ProposerSettings]:
        return {"local": ProposerSettings(kind="local"), **self.proposers}

    @property
    def database(self) -> Path:
        return self.home / "selfpruner.db"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.home / "logs"


def load_settings(**overrides: object) -> ServerSettings:
    """Settings from the environment, then from ``overrides`` that are not None. Raises ConfigError naming the variable."""
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return environment.read(lambda: ServerSettings(**given))
