"""The shape of a request; those of replies are in :mod:`selfpruner.store.objects`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

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
