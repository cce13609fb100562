"""A server takes all the descriptors that it may have, and says when they are too few."""

from __future__ import annotations

import logging
import resource

import pytest

from fl_server.descriptors import check_file_limit, raise_file_limit


def test_the_soft_limit_is_lifted_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        limit = raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, hard)
        assert limit > 512
        assert raise_file_limit() == limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_for_the_fleet_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert check_file_limit(1024, 100)
        assert not caplog.records
        assert not check_file_limit(1024, 1000)
    assert "LimitNOFILE" in caplog.text
