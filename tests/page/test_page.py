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


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest, browser: Any) -> Iterator[tuple[str, State, str]]:
    browser.get("about:blank")  # what is open may ask a server that is gone
    browser.get_log("browser")
    made = STATES[request.param]()
    with serving(made) as url:
        yield request.param, made, url
        browser.get("about:blank")  # it asks no more
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


SHOWN = """
const all = (selector, of) => [...document.querySelectorAll(selector)].map(of);
const first = (row) => row.firstElementChild.textContent;
return {
  text: Object.fromEntries(all("[id]", (e) => [e.id, e.textContent.trim()])),
  shown: document.getElementById("shown").checkVisibility(),
  engines: all("#engines tbody tr", first), contexts: all("#contexts tbody tr", first),
  engines_shown: document.getElementById("engines").checkVisibility(),
  meter: ["now", "max"].map((a) => document.getElementById("meter").getAttribute(`aria-value${a}`)),
  parts: all("#meter span", (e) => e.getBoundingClientRect().width),
  heat: all("#heat tbody tr", (row) => [...row.cells].slice(1).map((c) => Number(c.dataset.value))),
  cell: Math.min(...all("#heat td", (e) => e.getBoundingClientRect().width)),
  width: document.documentElement.scrollWidth,
}
"""
"""All of it at once: the page draws anew every two seconds."""


def test_every_state(browser: Any, state: tuple[str, State, str]) -> None:
    name, made, url = state
    open_page(browser, url, PHONE, dark=name == "full")
    assert browser.execute_script(SHOWN)["width"] <= PHONE, "scrolls sideways"
    open_page(browser, url, 1280, dark=name == "full")
    page = browser.execute_script(SHOWN)
    text = page["text"]
    assert page["width"] <= 1280 and page["shown"] == (name != "silent")
    if name == "silent":
        assert "--disable-log-stats" in text["notice"]
        return
    data = made.data(0)
    now, blocks, kept = data["now"], data["blocks"], data["kept_pages"]
    assert text["used_blocks"].replace(",", "") == str(now["used_blocks"])
    usage = {"light": "0.4%", "full": "100%", "idle": "0%"}.get(name)
    assert usage is None or text["usage"] == usage
    assert page["meter"] == [str(now["used_blocks"]), str(blocks)]
    assert name == "idle" or min(page["parts"][:2]) >= 3, "little is seen, too"
    assert page["heat"] == [list(heads) for heads in zip(*kept, strict=True)]
    if kept:
        assert text["scale-most"] == f"{max(map(max, kept)):.1f}" and page["cell"] >= 6
    assert page["engines_shown"] == (data["engines"] > 1)
    assert page["engines"] == list(map(str, data["by_engine"]))
    assert page["contexts"] == [held["name"] for held in data["contexts"]]
    assert ("will grow to" in text["why"]) == (name == "full")
    assert (text["why"] == "nobody waits") == (now["waiting"] == 0)
    zoom = "what is in use" if name in ("idle", "light") else "the whole pool"
    assert text["zoom"] == f"Chart shows {zoom}"
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
