# SPDX-License-Identifier: Apache-2.0
import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# Processes that run side by side share the cores, and so do the servers that they start: threads
# that wait for each other, on cores that others have, take several times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Looking for garbage walks all that torch and vLLM have imported, 700,000 objects: again and again
# while that is imported, and then six times for each engine. None of it is ever garbage, so it is
# set aside once. vLLM would do so for each engine, and at its end undo it for all.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


# A busy machine must not fail a test: no example has a time limit.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` a file is one process's, as its tests may share an engine. So are the files
    that build in this folder. (xdist 3.8 finds no ``xdist_group`` with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0]
            builds = name.startswith("tests/installed/") or name == "tests/test_build.py"
            return "builds" if builds else name

    return ByFile(config, log)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page's test needs selenium")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("the page's test needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--hide-scrollbars", "--window-size=1280,1600"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as chrome:
        yield chrome
