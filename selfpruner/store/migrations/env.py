"""Alembic's entry point: runs the migrations on the caller's connection and in the caller's transaction."""

from alembic import context

from selfpruner.store.tables import DatabaseTable

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=DatabaseTable.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
