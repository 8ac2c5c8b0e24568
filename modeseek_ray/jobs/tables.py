"""The schema. `migrations/` brings a database to it; a test compares the two.

Times are seconds since 1970 as floats. `jobs.version` counts changes of state and is what
compare-and-swap compares; progress does not raise it.
"""

from __future__ import annotations

import json
from functools import partial

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    desc,
)

metadata = MetaData()

# NaN is not JSON; PostgreSQL would refuse it and clients could not read it.
to_json_text = partial(json.dumps, allow_nan=False, ensure_ascii=False)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("max_running_jobs", Integer),  # None = the installation's limit alone
    Column("max_bytes", BigInteger),  # of uploaded files; None = no quota
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("max_files", Integer),  # kept at a time; None = no quota
    Column("requests_per_minute", Integer),  # None = the installation's limit
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),  # the public half of the key
    Column("tenant_id", String(64), ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenants.id"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("owned", Boolean, nullable=False),  # False: registered in place, never deleted by us
    Column("sha256", String(64)),
    Column("job_id", String(64)),  # the job whose result this is
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
    Index("files_by_tenant", "tenant_id", "created_at"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),  # order of acceptance
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant_id", String(64), ForeignKey("tenants.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("desired", String(8), nullable=False),  # run, cancel or pause
    Column("priority", Integer, nullable=False),
    Column("config", JSON, nullable=False),  # the request's body
    Column(
        "file_ids", JSON, nullable=False
    ),  # ids the job reads: such files cannot be deleted while it lives
    Column("created_at", Float, nullable=False),
    Column("state_at", Float, nullable=False),  # when the present state began
    Column("cancel_at", Float),  # when cancelling was asked for
    Column("finished_at", Float),
    Column("attempt", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("fruitless_attempts", Integer, nullable=False),  # since the last newly committed step
    Column("last_event", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("committed_step", Integer),
    Column("total_steps", Integer),
    Column("tokens_per_s", Float),
    Column("eta_s", Float),
    Column("section", Text),
    Column("section_until", Float),  # past this, a living driver counts as stuck
    Column("hyperparameters", JSON),  # what "auto" became
    Column("trained_tokens", BigInteger),
    Column("fine_tuned_model", Text),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON),
    Column("resumed_from", String(64)),  # the failed job this one goes on with
    # Along the line without a look at the rows: `agenda.py` reads it in every pass.
    Index("jobs_in_line", "state", "desired", desc("priority"), "number", "tenant_id"),
    Index("jobs_by_tenant", "tenant_id", "number"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", String(64), ForeignKey("tenants.id"), primary_key=True),
    Column("key", String(256), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("created_at", Float, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("token_sha256", String(64), nullable=False),
    Column("submission_id", Text),
    Column("created_at", Float, nullable=False),
    Column("heartbeat_at", Float),
    Column("lease_until", Float, nullable=False),
    Column("start_step", Integer),  # the committed step it began from
    Column("last_sequence", Integer, nullable=False),  # newest of the driver's own event numbers stored
    Column("ended_at", Float),
    Column("outcome", Text),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("sequence", Integer, primary_key=True),  # 1, 2, 3 ... without a gap
    Column("created_at", Float, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("attempt", Integer),
    Column("attempt_sequence", Integer),
    UniqueConstraint("job_id", "attempt", "attempt_sequence", name="events_once"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
    UniqueConstraint("job_id", "attempt", "step", name="checkpoints_once"),
)

models = Table(
    "models",
    metadata,
    Column("name", String(512), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenants.id"), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("path", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", JSON, nullable=False),
    Column("secret", Text, nullable=False),  # in clear: it signs, so a hash would not do
    Column("old_secret", Text),  # still signs until old_secret_until
    Column("old_secret_until", Float),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("deleted_at", Float),
    Index("webhook_endpoints_by_tenant", "tenant_id", "created_at"),
)

# The outbox: a row is written in the transaction that ends the job, and stays until it is delivered.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("endpoint_id", String(64), ForeignKey("webhook_endpoints.id"), primary_key=True),
    Column("event_id", String(64), primary_key=True),
    Column("event_type", String(64), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("next_at", Float),  # when to try (again); None = delivered, or given up
    Column("delivered_at", Float),
    Column("problem", Text),  # why the last try failed
    Index("webhook_deliveries_due", "next_at"),
)

# Inference engines: one process that answers for one model. Rows of ended ones stay for a while.
engines = Table(
    "engines",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", Text, nullable=False),  # as it was asked for
    Column("model_path", Text, nullable=False),
    Column("state", String(16), nullable=False),  # wanted, launched, ready, stopping, ended
    Column("created_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),  # when an answer was last asked for, to within seconds
    Column("token_sha256", String(64)),  # of the engine's token; None = not launched yet
    Column("submission_id", Text),
    Column("cluster_status", String(16)),  # what the cluster last said about the process
    Column("address", Text),  # http://host:port, where it answers
    Column("active", Integer, nullable=False),  # answers it was writing at its last heartbeat
    Column("heartbeat_at", Float),
    Column("lease_until", Float, nullable=False),
    Column("stopping_at", Float),
    Column("ended_at", Float),
    Column("outcome", Text),
    Column("error", JSON),  # why it could not start: code, message, mend, param
    Index("engines_by_state", "state", "model_path"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Float, nullable=False),
)
