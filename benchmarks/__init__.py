"""Measurements that need the real model, and their numbers. See README.md for commands and results."""
