"""The page in a real browser: what it shows, how it answers, and what it leaves alone."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Keys
from selenium.webdriver.remote.webelement import WebElement
from typer.testing import CliRunner

from search.base.metric import KL
from search.cli.main import app
from search.problem.run_directory import FRONT, PAGE
from search.results.gates import Gate
from search.results.page.content import PageContent
from search.results.page.document import render
from ssm_mp.artifact import read_artifact
from tests.browser import Browser, Tone
from tests.search.searched import EVIL, NAME, Searched, large


def left(searched: Searched) -> str:
    """The address of the page that the search left."""
    return (searched.run / PAGE).absolute().as_uri()


def written(content: PageContent, folder: Path) -> str:
    """The address of a page of its own."""
    path = folder / "report.html"
    path.write_text(render(content), encoding="utf-8")
    return path.as_uri()


def front_json(searched: Searched) -> list[dict[str, Any]]:
    """The front as the search answered it."""
    found: list[dict[str, Any]] = json.loads((searched.run / FRONT).read_text(encoding="utf-8"))["front"]
    return found


def point_of(window: Browser, trial: int) -> WebElement:
    """A point of the front in the chart."""
    return window.one(f'.front-points path[data-trial="{trial}"]')


def chosen(window: Browser) -> list[str]:
    """The heads of the chosen maps."""
    return window.texts(".map h3")


@pytest.mark.parametrize("tone", ["light", "dark"])
def test_it_opens_without_a_word_on_the_console_or_a_request_in_either_tone(
    searched: Searched, window: Browser, tone: Tone
) -> None:
    window.open(left(searched), tone)
    assert window.said() == []
    assert window.asked() == [left(searched)]
    paper = window.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 27)"}[tone]


def test_what_is_shown_on_hover_and_on_focus_is_what_front_json_says(searched: Searched, window: Browser) -> None:
    window.open(left(searched))
    kinds = {row["name"]: row["kind"] for row in searched.content().components}
    points = front_json(searched)
    assert len(window.all(".front-points path")) == len(points) > 1
    for point in points:
        window.run("document.getElementById('tooltip').hidden = true")
        window.hover(point_of(window, point["trial"]))
        window.until(lambda: window.one("#tooltip").is_displayed())
        said = window.texts("#tooltip > *")
        assert said[0].startswith(f"Trial {point['trial']}: ")
        assert said[1:5] == [
            f"{point['compression']:.3f}× smaller, {point['bytes']:,} bytes",
            f"{point['increase_percent']:+.3f} ± {1.96 * point['stderr_percent']:.3f} % (95 %)",
            f"perplexity {point['perplexity']:.4f} on {point['windows']} windows",
            f"origin: {point['origin']}",
        ]
        assert counted(window.texts("#tooltip li")) == held_by_kind(point["map"], kinds)
        spoken = point_of(window, point["trial"]).get_attribute("aria-label")
        assert spoken == "; ".join(said[:5])


def held_by_kind(chosen_map: Mapping[str, str], kinds: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """(kind, precision) → how many components."""
    found: dict[tuple[str, str], int] = {}
    for name, precision in chosen_map.items():
        found[kinds[name], precision] = found.get((kinds[name], precision), 0) + 1
    return found


def counted(lines: list[str]) -> dict[tuple[str, str], int]:
    """The same of lines such as `in_proj int8 ×3, fp16`."""
    found = {}
    for line in lines:
        kind, said = line.split(" ", 1)
        for part in said.split(", "):
            precision, _, count = part.partition(" ×")
            found[kind, precision] = int(count or 1)
    return found


def test_points_are_reached_chosen_and_compared_by_keys_alone(searched: Searched, window: Browser) -> None:
    window.open(left(searched))
    first, second = (point["trial"] for point in front_json(searched)[:2])
    window.one("#log-compression").send_keys(Keys.TAB)
    assert window.run("return document.activeElement.dataset.trial") == str(first)
    assert window.one("#tooltip").is_displayed()
    window.press(Keys.ARROW_LEFT)
    assert window.run("return document.activeElement.dataset.trial") == str(second)
    window.press(Keys.ENTER)
    window.until(lambda: [head.split(":")[0] for head in chosen(window)] == [f"ATrial {second}"])
    assert window.run("return document.activeElement.dataset.trial") == str(second)
    assert window.one("#told").get_property("textContent") == f"Chosen: trial {second}"
    window.press(Keys.ARROW_RIGHT, "c")
    window.until(lambda: len(chosen(window)) == 2)
    assert chosen(window)[1].startswith(f"BTrial {first}")


def test_every_control_and_every_point_of_the_front_has_a_name_that_can_be_read_aloud(
    searched: Searched, window: Browser
) -> None:
    window.open(left(searched))
    nodes = window.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "checkbox", "combobox", "searchbox", "textbox", "link", "region", "DisclosureTriangle"}
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert {"button", "checkbox", "searchbox", "textbox"} <= {node["role"]["value"] for node in found}
    spoken = [node["name"]["value"] for node in found if node["role"]["value"] == "button"]
    for point in front_json(searched):
        assert sum(name.startswith(f"Trial {point['trial']}: ") for name in spoken) == 1
    assert [node["role"]["value"] for node in found if not node.get("name", {}).get("value", "").strip()] == []


def test_a_chosen_map_is_copied_as_toml_and_its_command_exports_it(
    searched: Searched, window: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window.open(left(searched))
    window.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    winner = json.loads((searched.run / FRONT).read_text(encoding="utf-8"))["winner"]
    other = next(point for point in front_json(searched) if point["trial"] != winner)
    window.click(point_of(window, other["trial"]))
    window.until(lambda: chosen(window)[0].startswith(f"ATrial {other['trial']}"))
    window.one(".map summary").click()
    copied = []
    for button in window.all(".map .copy"):
        button.click()
        window.until(lambda: "copied" in window.texts(".said"))
        copied.append(window.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))
    command, toml = copied
    assert tomllib.loads(toml) == other["map"]
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "ssm-mp"
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    exported = tmp_path / "exports" / f"{NAME}-trial-{other['trial']}"
    assert read_artifact(exported).precision_map.to_json() == other["map"]


def test_two_maps_are_compared_where_they_differ(searched: Searched, window: Browser) -> None:
    window.open(left(searched))
    one, two = front_json(searched)[:2]
    differing = [name for name, held in one["map"].items() if two["map"][name] != held]
    assert differing
    window.click(point_of(window, one["trial"]))
    window.click(point_of(window, two["trial"]), Keys.SHIFT)
    window.until(lambda: len(chosen(window)) == 2)
    said = window.one("#difference").text
    assert said.startswith(f"B differs from A in {len(differing)} of {len(one['map'])} components: ")
    assert f"{two['bytes'] - one['bytes']:+,} bytes" in said
    window.pick("#components-table select", "only differences")
    assert sorted(window.texts("#components-table tbody th")) == sorted(differing)
    assert all("≠" in text for text in window.texts("#components-table td:nth-child(6)"))
    window.one("#alone").click()
    window.until(lambda: len(chosen(window)) == 1)


def test_tables_are_sorted_and_filtered(searched: Searched, window: Browser) -> None:
    window.open(left(searched))
    trials = searched.content().points
    window.one('#trials-table [data-key="perplexity"]').click()
    order = [f"trial {point.trial}" for point in sorted(trials, key=lambda point: point.perplexity)]
    assert window.texts("#trials-table tbody th") == order
    heading = window.one('#trials-table th[aria-sort="ascending"]')
    assert heading.text.startswith("perplexity")
    window.pick("#trials-table select", "the front")
    assert set(window.texts("#trials-table tbody th")) == {f"trial {p['trial']}" for p in front_json(searched)}
    window.pick("#trials-table select", "all trials")
    window.one('#trials-table input[type="search"]').send_keys("predicted front")
    named = [f"trial {point.trial}" for point in trials if point.origin == "predicted front"]
    assert sorted(window.texts("#trials-table tbody th")) == sorted(named)
    rows = searched.content().to_json()["sensitivities"]
    for key, kept, value in (
        ("cost", rows, lambda row: row["cost"]),
        ("each", [row for row in rows if row["saved"] > 0], lambda row: row["cost"] / row["saved"]),
    ):
        if key != "cost":  # by which they are sorted at first
            window.one(f'#sensitivities-table [data-key="{key}"]').click()
        costliest = max(kept, key=value)
        cells = window.texts("#sensitivities-table tbody tr:first-child > *")
        assert cells[:2] == [costliest["component"], f"{costliest['from']} → {costliest['precision']}"]


def test_axes_are_linear_or_logarithmic(searched: Searched, window: Browser) -> None:
    window.open(left(searched))
    before = [point.rect for point in window.all(".front-points path")]
    window.one("#log-increase").click()
    window.until(lambda: [point.rect for point in window.all(".front-points path")] != before)
    assert window.said() == []


def test_2000_trials_of_300_components_are_one_chart_and_a_page_of_rows(
    searched: Searched, window: Browser, tmp_path: Path
) -> None:
    content = large(searched.content(), 2000, 300)
    window.open(written(content, tmp_path))
    assert len(window.all("#front-chart svg")) == 1
    assert len(window.all("#trials-table tbody tr")) == 50
    assert window.run("return document.querySelectorAll('*').length") < 6000
    best = content.front[0]
    window.hover(point_of(window, best.trial))
    window.until(lambda: window.one("#tooltip").get_attribute("data-trial") == str(best.trial))
    window.one('#trials-table input[type="search"]').send_keys("1999")
    assert window.texts("#trials-table tbody th") == ["trial 1999"]
    window.one('[data-select="1999"]').click()
    window.until(lambda: chosen(window)[0].startswith("ATrial 1999"))
    assert window.said() == []


VARIANTS: dict[str, Callable[[PageContent], PageContent]] = {
    "no trial yet": lambda content: replace(content, points=[], certificate=None, growth=[], gates=[], probes=[]),
    "one trial": lambda content: replace(content, points=content.points[:1], certificate=None, growth=[(1, 0.0)]),
    "nothing within the budget": lambda content: replace(content, budget_percent=1e-9, certificate=None),
    "divergence": lambda content: replace(content, metric=KL),
    "latency": lambda content: replace(
        content, points=[replace(point, latency=1e-3 / (1 + point.trial)) for point in content.points]
    ),
    "stopped early": lambda content: replace(
        content, points=[*content.points[:-1], replace(content.points[-1], stopped="dominated", windows=4)]
    ),
    "for a runtime": lambda content: replace(content, target="gguf"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_searches_open_and_can_be_explored(
    searched: Searched, window: Browser, tmp_path: Path, variant: str
) -> None:
    content = VARIANTS[variant](searched.content())
    window.open(written(content, tmp_path))
    assert len(window.all(".front-points path")) == len(content.front)
    assert len(window.all("#trials-table tbody tr")) == len(content.points)
    for box in ("#log-increase", "#log-compression"):
        window.one(box).click()
    for button in window.all("#trials-table [data-compare]")[-1:]:
        button.click()
    heads = window.texts("#trials-table thead th")
    assert any(head.startswith("latency") for head in heads) == (variant == "latency")
    assert any("nats" in head for head in heads) == (variant == "divergence")
    assert ("as gguf" in " ".join(window.texts("#front-chart text"))) == (variant == "for a runtime")
    assert ("stopped early" in window.texts("#legend li")) == (variant == "stopped early")
    assert "NaN" not in window.one("body").text
    assert window.said() == []


def evil(content: PageContent) -> PageContent:
    """A page in which every text of the study tries to be more."""
    names = {row["name"]: f"{EVIL}{row['name']}" for row in content.components}
    points = [
        replace(point, origin=EVIL, map={names[name]: held for name, held in point.map.items()})
        for point in content.points
    ]
    drift = {"length": 8, "windows": 4, "grows": False, "buckets": []}
    return replace(
        content,
        name=EVIL,
        facts=[(EVIL, EVIL)],
        export=(EVIL, EVIL, EVIL),
        export_winner=EVIL,
        components=[{**row, "name": names[row["name"]], "kind": EVIL} for row in content.components],
        points=points,
        probes=[replace(probe, component=names[probe.component]) for probe in content.probes],
        said=EVIL,
        gates=[Gate(EVIL, "fail", EVIL)],
        beside=[EVIL],
        provenance={EVIL: EVIL},
        drift={EVIL: {"map": dict(points[0].map), "windows": drift, "long": None}},
    )


def test_a_script_in_a_name_shows_as_text(searched: Searched, window: Browser, tmp_path: Path) -> None:
    window.open(left(searched))
    assert window.texts("h1") == [NAME]
    window.open(written(evil(searched.content()), tmp_path))
    point = window.all(".front-points path")[0]
    window.hover(point)
    window.until(lambda: window.one("#tooltip").is_displayed())
    window.click(point)
    assert window.run("return window.hacked") is None
    assert window.all("img, body script:not(#content) ~ script ~ script, h1 *") == []
    for place in ("h1", "dt", "dd", ".said", "#verdict th + td", "#verdict li", "figcaption", "#components-table th"):
        assert any(EVIL in text for text in window.texts(place)), place
    assert EVIL in str(window.one(".map textarea").get_property("value"))
    assert any(f"origin: {EVIL}" in text for text in window.texts("#tooltip > *"))
    assert window.said() == []


def test_it_fits_a_narrow_window(searched: Searched, window: Browser) -> None:
    window.open(left(searched), width=520)
    assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")
