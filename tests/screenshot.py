"""The picture of a page for the documentation: python -m tests.screenshot runs/reference/report.html docs/report.png"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from tests.browser import browser

_WIDTH, _HEIGHT = 1240, 1500


def shoot(page: Path, picture: Path) -> None:
    """Take a picture of a page as it opens, with the pointer on a point of the front."""
    with browser() as window:
        window.open(page.absolute().as_uri(), width=_WIDTH, height=_HEIGHT)
        points = window.all(".front-points path")
        window.hover(points[-1])
        window.run("scrollTo(0, 0)")
        shot = window.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    picture.write_bytes(base64.b64decode(shot))


if __name__ == "__main__":
    shoot(Path(sys.argv[1]), Path(sys.argv[2]))
