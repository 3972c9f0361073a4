"""Every draft, and the tiny targets they are built for."""

from __future__ import annotations

import pytest
from helpers.draft_cases import CASES, Case

from lkspec.targets.tiny import TinyTarget


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=["tiny_target", "tiny_gemma3", "tiny_gpt_oss"])
def target(request: pytest.FixtureRequest) -> TinyTarget:
    return request.getfixturevalue(request.param)
