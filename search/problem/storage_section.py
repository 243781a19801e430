"""`[storage]` of a study file, and what all of its sections share."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A section of a study file: no key that is not known, no type that is not meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def as_tuple(value: object) -> object:
    """A list of a study file as the tuple that a frozen section holds; everything else as it is."""
    return tuple(value) if isinstance(value, list) else value


class StorageSection(Section):
    """`[storage]`: where trials are kept. `auto`: SQLite in the run directory for one process, a journal for many."""

    kind: Literal["auto", "sqlite", "journal", "postgresql"] = "auto"
    url: str = ""
    proxy: str = Field(default="", pattern=r"^$|^[^\s:/]+:\d{1,5}$")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.proxy and self.kind != "postgresql":
            raise ValueError('proxy = "host:port" stands in front of kind = "postgresql"')
        if self.kind == "postgresql" and not self.url:
            raise ValueError('kind = "postgresql" needs url = "postgresql+psycopg://user@host:5432/database"')
        if self.kind != "postgresql" and self.url:
            raise ValueError('url is for kind = "postgresql"')
        return self

    @field_validator("url")
    @classmethod
    def _without_password(cls, url: str) -> str:
        if not url:
            return url
        if not url.startswith("postgresql+psycopg://"):
            # not shown: whatever it is, it may hold a password
            raise ValueError('expected an address that begins with "postgresql+psycopg://"')
        parts = urlsplit(url)
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError(
                "it holds a password, which would end up in files and logs; leave it out, and set PGPASSWORD or write "
                "a pgpass file (and change the password: this file has been readable)"
            )
        return url
