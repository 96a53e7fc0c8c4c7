# SPDX-License-Identifier: Apache-2.0
"""The live page in headless Chromium, per state of a server, wide and on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.page.states import FOUND, STATES, State, serving

PHONE = 390


def open_page(browser: Any, url: str, width: int, height: int = 1400, dark: bool = False) -> None:
    """Open it at a size, and wait until it has its data."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(url)
    wait(browser, lambda: not text(browser, "notice").startswith("Waiting"))
    browser.execute_async_script("setTimeout(arguments[0], 300)")


def wait(browser: Any, condition: Callable[[], Any]) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: condition())


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text)


def visible(browser: Any, name: str) -> bool:
    return bool(browser.find_element("id", name).is_displayed())


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest, browser: Any) -> Iterator[tuple[str, State, str]]:
    made = STATES[request.param]()
    with serving(made) as url:
        yield request.param, made, url
        browser.get("about:blank")  # it asks no more
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_state(browser: Any, state: tuple[str, State, str]) -> None:
    name, made, url = state
    for width in (1280, PHONE):
        open_page(browser, url, width, dark=name == "full")
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, "scrolls sideways"
        assert visible(browser, "shown") == (name != "silent")
    if name == "silent":
        assert "--disable-log-stats" in text(browser, "notice")
        return
    data = made.data(0)
    now, blocks = data["now"], data["blocks"]
    assert text(browser, "used_blocks").replace(",", "") == str(now["used_blocks"])
    usage = {"light": "0.4%", "full": "100%", "idle": "0%"}.get(name)
    assert usage is None or text(browser, "usage") == usage
    meter = browser.find_element("id", "meter")
    assert meter.get_attribute("aria-valuenow") == str(now["used_blocks"])
    assert meter.get_attribute("aria-valuemax") == str(blocks)
    widths = [part.size["width"] for part in meter.find_elements("tag name", "span")]
    assert name == "idle" or min(widths[:2]) >= 3, "little is seen, too"

    heat = browser.find_elements("css selector", "#heat tbody tr")
    kept = data["kept_pages"]
    assert len(heat) == (len(kept[0]) if kept else 0)
    if kept:
        cells = heat[1].find_elements("tag name", "td")
        assert [float(cell.get_attribute("data-value")) for cell in cells] == [
            layer[1] for layer in kept
        ]
        assert text(browser, "scale-most") == f"{max(map(max, kept)):.1f}"
        assert min(cell.size["width"] for cell in cells) >= 6

    engines = browser.find_elements("css selector", "#engines tbody tr")
    assert visible(browser, "engines") == (data["engines"] > 1)
    shown = [row.text.split()[0] for row in engines if row.is_displayed()]
    assert shown == (list(map(str, data["by_engine"])) if data["engines"] > 1 else [])
    held = browser.find_elements("css selector", "#contexts tbody tr")
    assert [row.text.split()[0] for row in held] == [c["name"] for c in data["contexts"]]
    why = text(browser, "why")
    assert ("will grow to" in why) == (name == "full") and (why == "nobody waits") == (
        now["waiting"] == 0
    )
    zoom = "what is in use" if name in ("idle", "light") else "the whole pool"
    assert text(browser, "zoom") == f"Chart shows {zoom}"
    assert browser.get_log("browser") == []


def test_keyboard(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    with serving(STATES["deep"]()) as url:
        open_page(browser, url, 1280)

        def press(*keys: str) -> None:
            for key in keys:
                browser.switch_to.active_element.send_keys(key)

        press("z")
        assert text(browser, "zoom") == "Chart shows all that would be in use"
        first = browser.find_element("css selector", "#heat td[tabindex='0']")
        browser.execute_script("arguments[0].focus()", first)
        assert text(browser, "heat-readout").startswith("layer 0, head 0: ")
        press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
        assert text(browser, "heat-readout").startswith("layer 1, head 1: ")
        press(Keys.ARROW_UP, Keys.ARROW_UP, "/")
        press("cmpl-nobody\n")
        wait(browser, lambda: "No such request" in text(browser, "lookup-body"))
        press(Keys.CONTROL + "a" + Keys.NULL, f"{FOUND}\n")
        wait(browser, lambda: "prefill 6,000 375 48 6.2% 2.4" in text(browser, "lookup-body"))
        assert len(browser.find_elements("css selector", ".bars i")) == 80
        assert "decode 6,940 434 57" in text(browser, "lookup-body")
        browser.get("about:blank")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
