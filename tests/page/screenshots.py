# SPDX-License-Identifier: Apache-2.0
"""Pictures of the page for the documents: ``python -m tests.page.screenshots docs/figures``."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.webdriver.common.by import By

from tests.conftest import chromium
from tests.page.states import FOUND, STATES, serving
from tests.page.test_page import open_page

PICTURES = (
    # File, state, width, height, dark; 0: as high as it is.
    ("page-light", "light", 1100, 700, False),
    ("page-full", "full", 1280, 0, True),
    ("page-phone", "deep", 390, 844, False),
)


def picture(browser: Any, state: str, width: int, height: int, dark: bool) -> Image.Image:
    """One of them, in few colours."""
    with serving(STATES[state]()) as url:
        open_page(browser, url, width, height or 1200, dark=dark)
        if state == "full":
            browser.find_element(By.ID, "lookup-id").send_keys(f"{FOUND}\n")
            browser.implicitly_wait(10)
            browser.find_element(By.CSS_SELECTOR, ".bars")
        if not height:
            height = browser.execute_script("return document.documentElement.scrollHeight")
            open_size(browser, width, height)
        image = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
        return image.convert("RGB").quantize(96, dither=Image.Dither.NONE)


def open_size(browser: Any, width: int, height: int) -> None:
    """The size of the window, and time to draw."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_async_script("setTimeout(arguments[0], 700)")


def main(folder: str) -> None:
    with chromium() as browser:
        for name, *arguments in PICTURES:
            path = Path(folder) / f"{name}.png"
            picture(browser, *arguments).save(path, optimize=True)
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
