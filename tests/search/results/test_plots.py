"""Plots and report on made-up results: they say what the figures say."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from search.base.front import Point
from search.base.metric import KL
from search.cli.answers import fronted, inspected, listed, probed
from search.measure.probe import LOWEST, WIDEST, Probe
from search.results.plots.components import allocation_png, plot_allocation, plot_sensitivities
from search.results.plots.files import save
from search.results.plots.front import plot_front
from search.results.plots.style import precision_colours
from search.results.report import component_rows, front_json
from search.run.finish import describe
from ssm_mp.components import Component, find_components
from ssm_mp.evaluation.latency import Check, LatencyTable
from ssm_mp.precision_map import PrecisionMap, pinned_names
from ssm_mp.precisions.registry import PRECISIONS
from tests.ssm_mp.precisions.outside import OUTSIDE, register
from tests.tiny import ITERA, MAMBA, random_model

COMPONENTS = find_components(random_model(MAMBA))
POINTS = [
    Point(i, 2 + 0.2 * i, 3000 - 200 * i, 20 + 0.02 * i, 0.1 * i, 0.05, {"embedding": "int8"}, origin)
    for i, origin in enumerate(["uniform fp16", "conservative", "tpe", "tpe", "aggressive", "uniform int8"])
]


def texts(svg: Path) -> str:
    """What an SVG says: matplotlib writes each text as a comment beside its glyphs."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return " ".join(e.text or "" for e in ElementTree.parse(svg, parser).iter() if callable(e.tag))


@pytest.mark.parametrize("budget", [5.0, 0.5])
def test_the_front_shows_winner_budget_and_units(tmp_path: Path, budget: float) -> None:
    figure = plot_front(POINTS, budget, 4, "Certified on 512 unseen windows", 6000)
    png, svg = save(figure, tmp_path, "front")
    assert png.read_bytes()[:4] == b"\x89PNG"
    said = texts(svg)
    for expected in (
        "winner: trial 4",
        f"budget, +{budget:g} %",
        "compression over FP32 (×)",
        "increase over FP32 (%)",
    ):
        assert expected in said
    for name in ("uniform fp16", "conservative", "aggressive", "uniform int8", "Certified on 512 unseen windows"):
        assert name in said


@pytest.mark.parametrize("budget", [5.0, 0.5], ids=["broken axis", "one axis"])
@pytest.mark.parametrize("at", [(2.0, 0.49), (3.0, 0.49), (2.0, 0.0), (3.0, 0.0)])
def test_the_legend_covers_no_point_wherever_points_are(at: tuple[float, float], budget: float) -> None:
    cornered = replace(POINTS[0], trial=9, compression=at[0], increase_percent=at[1])
    figure = plot_front([*POINTS, cornered], budget, 4, "Certified", 6000)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) >= 6
    place = legend.get_window_extent()
    assert not any(axes.get_legend() for axes in figure.axes)
    for axes in figure.axes:
        assert not place.overlaps(axes.get_window_extent())
    assert figure.bbox.containsx(place.x0)
    assert figure.bbox.containsx(place.x1)


def test_a_map_that_was_stopped_early_is_marked_and_absent_names_are_not_in_the_legend(tmp_path: Path) -> None:
    halted = replace(POINTS[2], trial=9, windows=16, stopped="dominated")
    said = texts(save(plot_front([*POINTS, halted], 5.0, None, "", 6000), tmp_path, "front")[1])
    assert "stopped early" in said
    assert "cumulative" not in said
    assert "stopped early" not in texts(save(plot_front(POINTS, 5.0, None, "", 6000), tmp_path, "other")[1])


def test_the_front_says_whose_files_it_is_of(tmp_path: Path) -> None:
    aimed, plain = (
        texts(save(plot_front(POINTS, 5.0, None, "", 6000, target), tmp_path, "front")[1]) for target in ("gguf", None)
    )
    assert "smaller on disk as gguf" in aimed
    assert "as gguf" not in plain


TIMED = [replace(point, latency=0.01 + 0.001 * (point.trial % 3)) for point in POINTS]


def test_a_front_of_three_objectives_shows_its_latencies_and_the_fastest(tmp_path: Path) -> None:
    said = texts(save(plot_front(TIMED, 5.0, 4, "Certified", 6000), tmp_path, "front")[1])
    for expected in ("predicted latency of a prefill (ms)", "fastest of the front", "11.00 ms"):
        assert expected in said
    without = texts(save(plot_front(POINTS, 5.0, 4, "Certified", 6000), tmp_path, "other")[1])
    assert "latency" not in without
    assert "fastest" not in without
    for budget, points in ((0.05, TIMED), (50.0, TIMED), (5.0, TIMED[:1])):  # broken axis; one point
        save(plot_front(points, budget, None, "", 6000), tmp_path, "more")


def test_answers_say_latencies_in_milliseconds_and_how_far_predictions_are_off() -> None:
    table = LatencyTable(
        2, 64, "cpu", 1, 31, 0.0125, 0.005, {"a": {"fp16": 0.001}}, (Check(0.01, 0.011), Check(0.02, 0.02))
    )
    answer = front_json(TIMED, TIMED, {"perplexity": 20.0, "bytes": 6000}, 5.0, None, table)
    assert answer["latency"]["prediction_error"] == {
        "median": pytest.approx(0.05), "worst": pytest.approx(0.1), "spearman": pytest.approx(1), "maps": 2,
    }  # fmt: skip
    assert answer["fastest"] == 3  # of the two fastest the smaller
    said = fronted(answer)
    for expected in ("latency ms", "12.000", "batch 2, length 64: FP32 12.500 ms", "5.0% (median)", "fastest: trial 3"):
        assert expected in said
    plain = front_json(POINTS, POINTS, {"perplexity": 20.0, "bytes": 6000}, 5.0, None)
    assert plain.keys() == answer.keys() - {"latency", "fastest"}
    assert "latency" not in fronted(plain)


def test_a_front_without_a_certificate_is_not_called_empty() -> None:
    assert describe(None, any_within=True) == "Not certified yet."
    assert "No map is within the budget" in describe(None, any_within=False)


def test_an_empty_study_can_be_drawn(tmp_path: Path) -> None:
    assert "no map" in texts(save(plot_front([], 5.0, None, "no map", 6000), tmp_path, "front")[1])


def test_sensitivities_show_each_component_the_costliest_on_top(tmp_path: Path) -> None:
    probes = [
        Probe("embedding", "int8", WIDEST, "fp16", 0.002, 1e-4, 0),
        Probe("embedding", "fp16", LOWEST, "int8", -0.001, 1e-4, 0),
    ]
    probes.append(Probe("layers.0.ssm.in_proj", "int8", WIDEST, "fp16", 0.004, 1e-4, 0))
    figure = plot_sensitivities(probes, COMPONENTS)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-1].startswith("layers.0.ssm.in_proj → int8")
    assert "perplexity cost" in texts(save(figure, tmp_path, "s")[1])


def test_sensitivities_of_a_study_that_is_judged_by_kl_are_in_nats_in_every_place(tmp_path: Path) -> None:
    components = model_of(40)
    figure = plot_sensitivities(probed_from_both_ends(components, ["int8"]), components, metric=KL)
    said = texts(save(figure, tmp_path, "s")[1])
    assert "others, together" in said
    assert "KL to FP32 cost of the lower precision (nats)" in said
    assert re.search(r"± [\d.e-]+ nats, ", said)
    assert not re.search(r"± [\d.e-]+ %", said)


@pytest.mark.parametrize("config", [MAMBA, ITERA], ids=["mamba", "itera"])
def test_the_allocation_shows_every_kind_with_its_bytes(tmp_path: Path, config: object) -> None:
    components = find_components(random_model(config))  # type: ignore[arg-type]
    chosen = PrecisionMap.uniform("int8", components)
    said = texts(save(plot_allocation(components, chosen, "static"), tmp_path, "a")[1])
    for kind in {component.kind for component in components}:
        assert kind in said
    assert "int8" in said
    assert "kB" in said
    assert allocation_png(components, chosen, "static")[:4] == b"\x89PNG"


def model_of(layers: int) -> tuple[Component, ...]:
    return find_components(SimpleNamespace(config=replace(MAMBA, n_layers=layers)))


def probed_from_both_ends(components: Sequence[Component], precisions: Sequence[str], seed: int = 0) -> list[Probe]:
    effects = np.random.default_rng(seed).exponential(1e-3, (len(components), len(precisions), 2))
    return [
        probe
        for component, of_component in zip(components, effects, strict=True)
        for precision, (down, up) in zip(precisions, of_component, strict=True)
        for probe in (
            Probe(component.name, precision, WIDEST, "fp16", down, 1e-4, 0),
            Probe(component.name, "fp16", LOWEST, precision, -up, 1e-4, 0),
        )
    ]


def pixels(figure: Figure) -> tuple[int, int]:
    width, height = figure.get_size_inches() * 150
    return int(width), int(height)


def labels_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    layers=st.one_of(st.integers(1, 12), st.integers(1, 800)),
    precisions=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_pictures_of_any_number_of_components_and_precisions_are_below_4000_pixels(
    layers: int, precisions: int, seed: int
) -> None:
    components = model_of(layers)
    sample = components[:: max(1, len(components) * precisions // 500)]
    names = [f"p{i}" for i in range(precisions)]
    figure = plot_sensitivities(probed_from_both_ends(sample, names, seed), components)
    assert max(pixels(figure)) < 4000
    assert len(labels_of(figure)) <= min(60 + precisions, len(sample) * precisions)
    chosen = np.random.default_rng(seed).choice(["fp16", "int8", "nf4", "int3"], len(components))
    allocation = PrecisionMap(tuple((c.name, str(p)) for c, p in zip(components, chosen, strict=True)))
    assert max(pixels(plot_allocation(components, allocation, "static"))) < 4000


@pytest.mark.parametrize("count", [3, 61, 62, 300, 1000])
def test_the_60_costliest_are_shown_and_the_others_summed(count: int, tmp_path: Path) -> None:
    components = model_of(111)[:count]
    probes = probed_from_both_ends(components, ["int8"])
    figure = plot_sensitivities(probes, components)
    labels = labels_of(figure)
    costliest = sorted((p for p in probes if p.end == WIDEST), key=lambda p: p.log_increase)
    if count <= 61:  # one other takes no more room than a sum of one
        assert [label.split(" ")[0] for label in labels] == [p.component for p in costliest]
        return
    assert [label.split(" ")[0] for label in labels[1:]] == [p.component for p in costliest[-60:]]
    others = costliest[:-60]
    share = sum(c.count for c in components if c.name in {p.component for p in others})
    total = sum(c.count for c in components)
    assert labels[0] == f"{len(costliest) - 60} others, together → int8  ({share / total:.1%})"
    summed = 100 * math.expm1(sum(p.log_increase for p in others))
    error = 1.96e-2 * math.exp(sum(p.log_increase for p in others)) * math.sqrt(len(others))
    raised = {p.component: p.log_increase for p in probes if p.end == LOWEST}
    back = -100 * math.expm1(sum(raised[p.component] for p in others))
    assert f"{summed:+.3g} ± {error:.2g} %, {back:+.3g} ±" in texts(save(figure, tmp_path, "s")[1])
    assert figure.axes[0].get_xlim()[1] < 3  # the sum does not hide what single components cost


def test_what_is_summed_is_summed_for_each_precision(tmp_path: Path) -> None:
    components = model_of(110)
    figure = plot_sensitivities(probed_from_both_ends(components, ["int8", "nf4", "int3"]), components)
    sums = [label for label in labels_of(figure) if "others, together" in label]
    assert sorted(label.split("→ ")[1].split(" ")[0] for label in sums) == ["int3", "int8", "nf4"]
    assert sum(int(label.split()[0]) for label in sums) == 3 * len(components) - 60
    assert all(path.stat().st_size > 0 for path in save(figure, tmp_path, "s"))


def test_long_names_leave_room_for_the_picture(tmp_path: Path) -> None:
    long = [replace(component, name="x" * 300 + component.name) for component in COMPONENTS]
    figure = plot_sensitivities(probed_from_both_ends(long, ["int8"]), long)
    save(figure, tmp_path, "s")
    assert figure.axes[0].get_position().width > 0.4
    assert all("…" in label and len(label) < 80 for label in labels_of(figure))


@pytest.mark.parametrize(("layers", "rows"), [(1, 2), (40, 41), (41, 22), (110, 38)])
def test_the_allocation_of_many_layers_shows_neighbours_in_one_row(layers: int, rows: int, tmp_path: Path) -> None:
    components = model_of(layers)
    chosen = PrecisionMap.uniform("int8", components)
    figure = plot_allocation(components, chosen, "static")
    assert len(labels_of(figure)) == rows
    assert labels_of(figure)[-1].endswith(str(layers - 1))
    shown = [line.get_text() for line in figure.axes[0].texts]
    sizes = [float(line.split("\n")[1].split()[0]) * (1e6 if "MB" in line else 1e3) for line in shown]
    assert sum(sizes) == pytest.approx(chosen.bytes(components, "static"), rel=0.1)  # figures are rounded
    assert save(figure, tmp_path, "a")[0].stat().st_size > 0


def test_answers_hold_their_figures() -> None:
    rows = component_rows(COMPONENTS, pinned_names(COMPONENTS))
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    content = {
        "family": "mamba", "layout": "positions", "config": {"d_model": 16}, "parameters": 10, "fp32_bytes": 40,
        "components": rows, "file_types": {"bfloat16": 10}, "file_bytes": 20,
    }  # fmt: skip
    assert "layers.0.ssm.A_log" in inspected(content)
    assert "pinned" in inspected(content)
    assert "20 in the file (bfloat16)" in inspected(content)
    certificate = {"verdict": "certified", "winner": 4, "increase_percent": 0.4, "upper_percent": 0.6, "windows": 512}
    answer = front_json(POINTS, POINTS, {"perplexity": 20.0, "bytes": 6000}, 5.0, certificate)
    assert answer["winner"] == 4
    assert "* 4" in fronted(answer)
    assert "certified: +0.400 %" in fronted(answer)
    probe = Probe("embedding", "int8", WIDEST, "fp16", 0.002, 1e-4, 1e-3).to_json()
    assert "fp16 → int8" in probed({"probes": [probe]})
    assert listed({"finished": 3, "verified": True, "map": {}}).splitlines() == ["finished  3", "verified  yes"]


def test_every_precision_has_a_colour_of_its_own_and_groups_have_the_hue_of_their_book() -> None:
    colours = precision_colours()
    assert list(colours) == list(PRECISIONS)
    assert len(set(colours.values())) == len(colours)
    for name, colour in colours.items():
        hue, lightness, _ = colorsys.rgb_to_hls(*(part / 255 for part in bytes.fromhex(colour[1:])))
        book, _, group = name.partition("g")
        own = colorsys.rgb_to_hls(*(part / 255 for part in bytes.fromhex(colours[book][1:])))
        assert hue == pytest.approx(own[0], abs=0.02)
        assert (lightness > own[1]) == (group == "128")
        assert (lightness < own[1]) == (group == "32")


def test_precisions_from_outside_have_colours_of_their_own_and_take_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = precision_colours()
    register(monkeypatch)
    colours = precision_colours()
    assert {name: colours[name] for name in before} == before
    assert len(set(colours.values())) == len(colours)
    names = list(OUTSIDE)
    held = {c.name: names[i % len(names)] for i, c in enumerate(COMPONENTS) if c.pin is None}
    precision_map = PrecisionMap.from_rules({"*": "fp16", **held}, COMPONENTS)
    _, svg = save(plot_allocation(COMPONENTS, precision_map, "none"), tmp_path, "allocation")
    assert all(name in texts(svg) for name in names)
