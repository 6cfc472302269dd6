"""What all Python tests share: hypothesis profiles, and a header that says what this run does and does not cover."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

import hbfp

# No deadline anywhere: no test may depend on time. CI draws the same examples every time, so that a red build is a
# change of ours.
PHASES = [phase for phase in Phase if phase is not Phase.explain]  # minutes of reruns for a remark on line numbers
settings.register_profile("fast", max_examples=40, deadline=None, phases=PHASES)
settings.register_profile("ci", max_examples=150, deadline=None, phases=PHASES, derandomize=True, print_blob=True)
settings.register_profile(
    "slow", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_report_header() -> list[str]:
    """A level that did not run is not a level that passed: both are named."""
    info = hbfp.info()
    not_run = [f"{name} ({state})" for name, state in info["levels"].items() if name != info["level"]]
    return [
        f"hbfp {info['version']}: level {info['level']}, {info['num_threads']} threads",
        f"levels this run does not cover: {', '.join(not_run) or 'none'} (HBFP_LEVEL=<level> chooses one)",
    ]


@pytest.fixture(autouse=True)
def _default_threads():
    """A test that sets the number of threads must not set it for the others."""
    yield
    hbfp.set_num_threads(None)
