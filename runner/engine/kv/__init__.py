"""KV caches of rows that decode together; no padding, no copies when rows join, leave or are trimmed."""
