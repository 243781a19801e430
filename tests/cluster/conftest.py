"""The private Slurm and the private PostgreSQL, one of each for a whole test run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import debian
from tests.cluster.private_postgres import PrivatePostgres, private_postgres
from tests.cluster.private_slurm import PrivateSlurm, private_slurm
from tests.cluster.processes import private_directory


# First, so that the choice by marker and the grouping of xdist see the markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        item.add_marker("slow")
        item.add_marker("cluster")
        # One process runs all tests of a group, so that each daemon starts once.
        fixtures = getattr(item, "fixturenames", ())
        for group in ("slurm", "postgres"):
            if group in fixtures:
                item.add_marker(pytest.mark.xdist_group(group))
                break


def require(packages: Sequence[str], binaries: Sequence[str]) -> None:
    """Installs packages; where that is impossible the tests are skipped aloud, but never in CI."""
    try:
        debian.install(packages, binaries)
    except debian.NotInstallableError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run the cluster tests: {error}", pytrace=False)
        warnings.warn(f"THE CLUSTER TESTS DID NOT RUN: {error}", stacklevel=2)
        pytest.skip(f"THE CLUSTER TESTS DID NOT RUN: {error}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateSlurm]:
    require(debian.SLURM_PACKAGES, debian.SLURM_BINARIES)
    with private_directory("ssm-slurm") as directory, private_slurm(directory) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgres() -> Iterator[PrivatePostgres]:
    require(debian.POSTGRES_PACKAGES, debian.POSTGRES_BINARIES)
    with private_directory("ssm-postgres") as directory, private_postgres(directory) as server:
        yield server
