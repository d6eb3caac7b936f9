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

CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll("h1, h2, h3, p, li, th, td, button, label, summary, code")]
  .filter((e) => e.offsetParent && e.textContent.trim()).map((e) => {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`];
  }).filter(([ratio]) => ratio < 4.5);
"""  # of WCAG 2.2, 1.4.3

AXE = """
const done = arguments[0];
axe.run(document, {resultTypes: ["violations"]}).then((found) => done(
    found.violations.filter((each) => ["serious", "critical"].includes(each.impact))
        .map((each) => [each.id, each.help, each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))])));
"""


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
