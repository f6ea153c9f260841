"""The command line, ``selfpruner``: :mod:`selfpruner.cli.app` and a file for each group of commands."""
