"""Alembic migrations of the store, run by :mod:`selfpruner.store.schema`."""
