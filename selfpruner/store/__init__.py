"""The database: one SQLite file that one process writes and any number may read. See :mod:`selfpruner.store.store`."""
