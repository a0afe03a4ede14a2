"""What of the end-to-end tests is for the full matrices only."""

from __future__ import annotations

import pytest

TWICE = {"test_a_group_that_is_killed_comes_back_and_no_request_fails", "test_a_request_can_be_traced_at_once"}
"""Behind Serve's ingress they go the same way as behind the router's own server but for the first step."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `TWICE` through Serve's ingress are part of `make test-all`."""
    for item in items:
        if item.name.endswith("[serve]") and any(item.name.startswith(name) for name in TWICE):
            item.add_marker(pytest.mark.full)
