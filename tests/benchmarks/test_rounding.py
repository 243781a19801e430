"""The rounding benchmark's rows, and that on its own calibration windows compensated rounding changes products less."""

from __future__ import annotations

import pytest

from benchmarks.rounding import BOOKS, COLUMNS, QLORA, Bench, line, rows_of
from ssm_mp.components import find_components
from ssm_mp.conversion.rounding import weight_of
from ssm_mp.precisions.compensate import DAMPINGS, output_error
from tests.tiny import HUGGING_FACE, random_model, some_windows


@pytest.fixture(scope="module")
def bench() -> Bench:
    model, windows = random_model(HUGGING_FACE), some_windows(64)
    free = tuple(component for component in find_components(model) if component.pin is None)
    return Bench.of(model, free, windows, windows)


def test_every_book_every_part_left_out_and_both_of_qloras_have_a_row() -> None:
    names = [row.name for row in rows_of()]
    assert names[: len(BOOKS)] == list(BOOKS)
    assert sum("damping" in name for name in names) == len(DAMPINGS)
    assert {book.name for book in QLORA} <= set(names)
    assert len(set(names)) == len(names) == len(BOOKS) + len(DAMPINGS) + 1 + len(QLORA)


def test_compensated_int3_changes_products_less_on_its_own_calibration_windows(bench: Bench) -> None:
    (row,) = rows_of(["int3"])
    nearest, better = bench.nearest(row), bench.compensated(row)
    assert better.keys() == bench.moments.keys()
    lost = []
    for name, moment in bench.moments.items():
        weight = weight_of(bench.model, name)
        lost.append([output_error(weight, ways[name].tensor(), moment.all) for ways in (nearest, better)])
        assert lost[-1][1] < 1.001 * lost[-1][0], name  # dt_proj has two inputs: nothing makes up for anything
    assert sum(after for _, after in lost) < 0.9 * sum(before for before, _ in lost)


def test_a_row_has_a_cell_of_every_column_but_what_stands_in_another_row(bench: Bench) -> None:
    book, part = (bench.measure(row) for row in rows_of() if row.name in ("nf3", "nf3, not improved"))
    assert len(book.cells) == len(part.cells) == len(COLUMNS)
    assert None not in book.cells
    assert [cell is None for cell in part.cells] == [True, False, True, False, False]
    assert book.cells[3] != part.cells[3]
    assert "\n".join(line(one) for one in (book, part)).count("±") == 8
