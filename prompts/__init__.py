"""Jinja2 templates of the LLM operators, one per operator, plus the system prompt and the repair turn."""
