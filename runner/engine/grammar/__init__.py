"""Structured output: rows whose text has to match a JSON Schema, a regular expression or a grammar."""
