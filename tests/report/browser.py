"""A real browser without a window: Debian's chromium, driven by selenium. It reaches no host.

Also a program, which takes a picture of a page's head and some of its sections:

    python tests/report/browser.py runs/demo/report.html launch/figures/report.png rollouts
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def programs() -> tuple[str, str]:
    """The browser and its driver. Without them the test is skipped, but where KATDS_NEEDS_BROWSER says that they are there it fails."""
    browser, driver = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    reason = "needs chromium and chromedriver; on Debian: apt-get install chromium chromium-driver"
    assert not os.environ.get("KATDS_NEEDS_BROWSER"), reason
    pytest.skip(reason)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A selenium driver."""
    browser, driver = programs()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "headless=new",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(f"--{flag}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which chromium refuses to be without as another user
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def load(driver: Any, path: Path, width: int = 1280, scheme: str = "light") -> list[dict[str, Any]]:
    """Opens a page; returns what the browser complains about."""
    prefer(driver, scheme)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(path.as_uri())
    found: list[dict[str, Any]] = driver.get_log("browser")
    return found


def prefer(driver: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def picture(page: Path, out: Path, sections: list[str], height: int = 1045) -> None:
    """A PNG of the upper `height` pixels of the page without its other sections."""
    with open_browser() as driver:
        load(driver, page.resolve(), width=1200)
        driver.execute_script(
            "document.querySelectorAll('main > section').forEach((s) => { s.hidden = !arguments[0].includes(s.id); })",
            [f"{name}-section" for name in sections],
        )
        size = {"width": 1200, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert driver.save_screenshot(str(out)), out


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
