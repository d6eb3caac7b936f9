"""The report in a real browser, for the tests of what readers see."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,1000",
)  # fmt: skip


class Page:
    """An open report."""

    def __init__(self, driver: Any, file: Path, *, theme: str = "light", width: int = 1200) -> None:
        self.driver = driver
        media = [{"name": "prefers-color-scheme", "value": theme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        # So tall that every figure is in view.
        size = {"width": width, "height": 30_000, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(file.as_uri())
        self.run("try { localStorage.clear(); } catch {}")
        self.wait_drawn()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 60).until(lambda _: self.run(f"return {condition}"), condition)

    def wait_drawn(self) -> None:
        """Until every figure that is to be seen has been drawn."""
        self.wait(
            "[...document.querySelectorAll('section:not([hidden]) .figure')]"
            ".every((f) => f.dataset.drawn || f.querySelector('.plot').hidden)"
        )

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def figure(self, title: str) -> str:
        """The id of a figure of the data set that is chosen."""
        found: str = self.run(
            "return [...document.querySelectorAll('section:not([hidden]) .figure')]"
            ".find((f) => f.querySelector('h3').textContent === arguments[0]).id",
            title,
        )
        return found

    def seen(self, title: str) -> list[str]:
        """Names of the marks that a figure shows."""
        script = "return document.querySelector(`#${arguments[0]} .plot`).data.filter((t) => t.visible !== false)"
        found: list[str] = self.run(
            f"{script}.flatMap((t) => t.name ? [t.name] : t.y.filter((y) => typeof y === 'string'))", self.figure(title)
        )
        return sorted(set(found))

    def lines(self, table: str) -> list[str]:
        """The second and third column of the lines that a table shows."""
        found: list[str] = self.run(
            "return [...document.querySelector(`table[data-table=${arguments[0]}]`).tBodies[0].rows].filter((r) => !r.hidden)"
            ".map((r) => `${r.cells[1].textContent} ${r.cells[2].textContent} ${r.cells[3].textContent}`)",
            table,
        )
        return found

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]
