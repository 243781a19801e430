"""A real browser for tests: Debian's Chromium without a window, driven by Selenium, with what it asked for and said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests import debian

Tone = Literal["light", "dark"]
T = TypeVar("T")
HUNG = 30.0
"""Seconds after which a page that does not answer never will."""


@dataclass(frozen=True, eq=False)
class Browser:
    """One browser with one window."""

    driver: Chrome

    def open(self, address: str, tone: Tone = "light", width: int = 1280, height: int = 1500) -> None:
        """Open a page of ours and wait until it has drawn itself."""
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": tone}]}
        )
        self.driver.set_window_size(width, height)
        self.said(), self.asked()  # of a page before
        self.driver.get(address)
        self.until(lambda: self.run("return document.documentElement.dataset.ready !== undefined"))

    def run(self, script: str, *arguments: object) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, found: Callable[[], T]) -> T:
        """Wait until something is true, and return it."""
        return WebDriverWait(self.driver, HUNG, 0.05).until(lambda _: found())

    def all(self, selector: str) -> list[WebElement]:
        """The elements that a selector names."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The first of them; there must be one."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Their texts, read at once, as they stand in the document."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector
        )
        return found

    def hover(self, element: WebElement) -> None:
        """Put the pointer on an element."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def click(self, element: WebElement, *held: str) -> None:
        """Click where an element is, whatever lies on it, with keys held down."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        chain = ActionChains(self.driver)
        for key in held:
            chain.key_down(key)
        chain.click(element)
        for key in held:
            chain.key_up(key)
        chain.perform()

    def pick(self, selector: str, text: str) -> None:
        """Take an option of a list."""
        Select(self.one(selector)).select_by_visible_text(text)

    def press(self, *keys: str) -> None:
        """Press keys, whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def said(self) -> list[str]:
        """What the console has said since it was asked last."""
        return [entry["message"] for entry in self._log("browser")]

    def asked(self) -> list[str]:
        """The addresses that were asked for since this was asked last, but for data that stand in the page itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]

    def _log(self, kind: Literal["browser", "performance"]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser; the test is skipped, but never in CI, where none can be installed."""
    try:
        debian.install(debian.CHROMIUM_PACKAGES, debian.CHROMIUM_BINARIES)
    except debian.NotInstallableError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run the tests of the page: {error}", pytrace=False)
        pytest.skip(f"THE TESTS OF THE PAGE DID NOT RUN: {error}")
    options = ChromeOptions()
    options.binary_location = debian.program("chromium")
    # as root it has no sandbox, and a container's /dev/shm is small
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(debian.program("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
