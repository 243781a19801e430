"""Settings of all tests: one thread each, so that parallel tests do not fight over the cores; one seed each."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# no deadline, and no complaint of slow draws: how fast a machine is says nothing about the code
settings.register_profile("project", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

# a shell's background jobs ignore interrupts, and would hand that down to the commands that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The numbers that a test draws do not depend on the tests that its process ran before."""
    torch.manual_seed(1)
    np.random.seed(1)
