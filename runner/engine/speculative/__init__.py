"""Speculative decoding: a small draft model proposes tokens, the target verifies several of them in one call."""
