"""One file per revision, numbered in order: ``v0001_....py`` holds revision ``0001``."""
