"""A pytest plugin for bench/gpu.py: a short selection of tests, and a time after which the rest is skipped.

FLEXDIT_SHORT_TESTS=N keeps N tests: of every test function the first case, then the last, then those between.
FLEXDIT_PYTEST_DEADLINE is seconds since the epoch.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict

import pytest


def shortened(names: list[str], count: int) -> list[int]:
    """Indices of at most `count` names 'function[case]': each function's first, its last, then the others."""
    cases = defaultdict(list)
    for i, name in enumerate(names):
        cases[name.split("[")[0]].append(i)
    ranked = []
    for indices in cases.values():
        order = [indices[0], *indices[-1:], *indices[1:-1]] if len(indices) > 1 else indices
        ranked += [(rank, i) for rank, i in enumerate(order)]
    return [i for _, i in sorted(ranked)[:count]]


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    count = os.environ.get("FLEXDIT_SHORT_TESTS")
    if count is None:
        return
    kept = [items[i] for i in shortened([item.nodeid for item in items], int(count))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


_not_reached = []


def pytest_runtest_setup(item):
    deadline = os.environ.get("FLEXDIT_PYTEST_DEADLINE")
    if deadline is not None and time.time() > float(deadline):
        _not_reached.append(item.nodeid)
        pytest.skip("no time was left")


def pytest_terminal_summary(terminalreporter):
    if _not_reached:
        terminalreporter.write_line(f"NOT REACHED: {len(_not_reached)} tests")
