"""Another machine, as `--for` on a command line describes it."""

from __future__ import annotations

import argparse
from typing import Final

from runner.machine import Machine
from runner.manifest.values import parse_size

METAVAR: Final = "memory=SIZE[,device=gpu|cpu]"

_LEAST_MEMORY: Final = 2**20
"""Bytes below which no machine is meant: somebody left the unit out."""


def machine_of(text: str) -> Machine:
    """`memory=16GiB,device=cpu`, as a type for argparse."""
    given = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        given[key.strip()] = value.strip()
    if unknown := given.keys() - {"memory", "device"}:
        raise argparse.ArgumentTypeError(
            f'there is no "{min(unknown)}"; give memory=SIZE, and device=gpu or device=cpu'
        )
    device = given.get("device", "gpu")
    if device not in ("gpu", "cpu"):
        raise argparse.ArgumentTypeError(f'device is gpu or cpu, not "{device}"')
    try:
        memory = parse_size(given.get("memory", ""))
    except ValueError:
        raise argparse.ArgumentTypeError("give memory=SIZE, such as memory=16GiB") from None
    if memory < _LEAST_MEMORY:
        raise argparse.ArgumentTypeError(f"memory={given['memory']} is {memory} bytes: give a unit, such as 16GiB")
    return Machine(memory, float32=device == "cpu")
