"""The shapes of requests and replies, after the OpenAI fine-tuning job API. Rows of the store become these and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, field_validator

from selfpruner.config import SearchConfig

MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class JobRequest(SearchConfig):
    """A search to run: the fields of SearchConfig, and ``metadata`` of the submitter's own."""

    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)

    @field_validator("metadata")
    @classmethod
    def _no_null_byte(cls, value: dict[str, str]) -> dict[str, str]:
        if any("\x00" in part for pair in value.items() for part in pair):
            raise ValueError("contains a null byte")
        return value

    def config(self) -> SearchConfig:
        return SearchConfig.model_validate(self.model_dump(exclude={"metadata"}))


class FileObject(BaseModel):
    """A file of a checkpoint; ``id`` is its name in the folder."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    sha256: str


class ModelObject(BaseModel):
    """A model that requests may name. ``source``: embedded, folder (below the server's model root) or hub (may hold * and ?)."""

    id: str
    object: Literal["model"] = "model"
    source: Literal["embedded", "folder", "hub"]
    description: str


Item = TypeVar("Item")


class ListObject(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | int | None
    last_id: str | int | None

    @classmethod
    def of(cls, data: list[Any], has_more: bool) -> ListObject[Item]:
        ids = [item.id for item in data]
        return cls(data=data, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
