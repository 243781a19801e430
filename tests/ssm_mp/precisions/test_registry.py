"""Which precisions there are, and that one more is one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ssm_mp.errors import PrecisionMapError
from ssm_mp.precisions.registry import PRECISIONS, get_precision, precisions_of
from tests.ssm_mp.precisions import outside


def test_every_line_leads_to_the_precision_of_its_name() -> None:
    assert {name: precision.name for name, precision in PRECISIONS.items()} == {name: name for name in PRECISIONS}


def test_the_widest_comes_first_and_it_is_the_one_that_pins_stand_at() -> None:
    bits = [precision.bits for precision in PRECISIONS.values()]
    sizes = [precision.bytes((256, 256), "weight") for precision in PRECISIONS.values()]
    assert bits == sorted(bits, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert next(iter(PRECISIONS)) == "fp16"


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(PrecisionMapError, match="'int7'.*'fp16', 'int8'"):
        get_precision("int7")


def test_one_more_line_is_one_more_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fp8" not in PRECISIONS
    assert precisions_of(4) == ("nf4g32", "int4g32", "nf4", "int4", "nf4g128", "int4g128")
    outside.register(monkeypatch)
    assert all(get_precision(name) is precision for name, precision in outside.OUTSIDE.items())
    assert precisions_of(8) == ("int8", "fp8")


def test_names_are_known_without_torch() -> None:
    script = (
        "import sys; from ssm_mp.precisions.registry import PRECISIONS; "
        "assert 'int8' in PRECISIONS and len(PRECISIONS) == len(list(PRECISIONS)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
