"""The coordinator's tables, in SQL that SQLite and PostgreSQL share."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Float, Integer, LargeBinary, MetaData, String, Table

SCHEMA: Final = 2
"""Version of this schema; stored in the database and checked before it is used."""

MIGRATIONS: Final = {1: ("ALTER TABLE exchanges ADD COLUMN result {binary}",)}
"""Statements that make the next schema of one, beside the tables that are new in it; ``binary``: the type of bytes."""

metadata = MetaData()

documents = Table(
    "documents",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
"""Single values: the schema, what the operator wants, and the retained messages as they were signed."""

versions = Table(
    "versions",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer, nullable=False),
    Column("origin", String(16), nullable=False),
    Column("source", Integer, nullable=False),
    Column("name", String(100), nullable=False),
    Column("sha256", LargeBinary(32), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("file", LargeBinary(32)),
    Column("card", LargeBinary(32), nullable=False),
    Column("card_ref", LargeBinary, nullable=False),
    Column("full_ref", LargeBinary),
    Column("patch_ref", LargeBinary),
    Column("round", BigInteger, nullable=False),
    Column("plan_hash", LargeBinary(32)),
    Column("contributors", Integer, nullable=False),
    Column("weight", BigInteger, nullable=False),
    Column("metrics", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("state", LargeBinary(32)),
    Column("clips", LargeBinary, nullable=False),
)
"""Every version of the model. Files and states are names in the blob store; NULL once they are no longer kept."""

rounds = Table(
    "rounds",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("plan_hash", LargeBinary(32), nullable=False),
    Column("plan", LargeBinary, nullable=False),
    Column("base", Integer, nullable=False),
    Column("awaited", LargeBinary, nullable=False),
    Column("opened", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("reason", String(2000), nullable=False),
    Column("closed", BigInteger, nullable=False),
    Column("version", Integer, nullable=False),
    Column("participants", Integer, nullable=False),
    Column("weight", BigInteger, nullable=False),
    Column("update_bytes", BigInteger, nullable=False),
    Column("patch_bytes", BigInteger, nullable=False),
    Column("accuracy", Float),
    Column("report", LargeBinary, nullable=False),
)
"""Every round; ``outcome`` is empty while it is open. ``update_bytes`` is the sum over the participants."""

exchanges = Table(
    "exchanges",
    metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("gateway", String(48), primary_key=True),
    Column("proposal_head", LargeBinary(32), nullable=False),
    Column("proposal", LargeBinary, nullable=False),
    Column("commit_head", LargeBinary(32), nullable=False),
    Column("commit", LargeBinary, nullable=False),
    Column("members", LargeBinary, nullable=False),
    Column("count", Integer, nullable=False),
    Column("update_bytes", BigInteger, nullable=False),
    Column("counts", LargeBinary, nullable=False),
    Column("reveal_head", LargeBinary(32)),
    Column("reveal_words", LargeBinary),
    Column("reveal_blob", LargeBinary(32)),
    Column("receipt", LargeBinary),
    Column("result", LargeBinary),
)
"""What passed between the coordinator and one gateway in a round. The partial's words are here where they are small,
which saves a sync, else in the blob store under ``reveal_blob``; both are forgotten when the round is closed."""

seals = Table(
    "seals",
    metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("secret", LargeBinary(32), nullable=False),
)
"""The seal secret of the open round in split mode; deleted when it is over."""

devices = Table(
    "devices",
    metadata,
    Column("id", String(48), primary_key=True),
    Column("site", String(48), nullable=False),
    Column("first_round", BigInteger, nullable=False),
    Column("last_round", BigInteger, nullable=False),
    Column("contributions", Integer, nullable=False),
)
"""Devices that contributed to a version."""

requests = Table(
    "requests",
    metadata,
    Column("message_id", LargeBinary(16), primary_key=True),
    Column("operator", String(48), nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("response", LargeBinary, nullable=False),
)
"""Operators' commands that were carried out, with their answers, until they expire."""

published = Table(
    "published",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("ref", LargeBinary, nullable=False),
)
"""Objects whose chunks the broker may hold."""
