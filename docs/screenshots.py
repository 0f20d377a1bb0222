"""Takes the pictures in docs/images/ from a finished run: the top of the report and its token view, light and dark.

Usage: kdpipe run quickstart && python docs/screenshots.py [RECIPE] [--workspace DIR] [--images DIR]
Needs Chromium, its driver (Debian: chromium, chromium-driver) and the `dev` extra.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from kdpipe.project import open_project
from kdpipe.recipe_file import load_recipe
from kdpipe.recipes_shipped import shipped_path
from kdpipe.report.writing import write_report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
MAX_BYTES = 300_000
PHONE = 390


def main() -> None:
    """Takes every picture; fails where one is too large for a repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--workspace", type=Path, default=Path("kdpipe-out"))
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images")
    args = parser.parse_args()
    path = Path(args.recipe) if args.recipe.endswith(".yaml") else shipped_path(args.recipe)
    project = open_project(load_recipe(path, ()), args.workspace.resolve())
    args.images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(project, page, commands=[f"kdpipe run {args.recipe}"])
        driver = open_browser(Path(folder) / "profile")
        try:
            for scheme in ("light", "dark"):
                take(driver, page, args.images, scheme)
        finally:
            driver.quit()
    for image in sorted(args.images.glob("report-*.png")):
        size = image.stat().st_size
        print(f"{image}  {size / 1000:.0f} kB")
        if size > MAX_BYTES:
            raise SystemExit(f"{image}: {size} bytes, expected at most {MAX_BYTES}")


def open_browser(profile: Path) -> webdriver.Chrome:
    """A headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def take(driver: webdriver.Chrome, page: Path, images: Path, scheme: str) -> None:
    """The pictures in one theme; those of a phone only in the light one."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    resize(driver, 1100, 1500)
    driver.get(f"file://{page}")
    driver.save_screenshot(str(images / f"report-top-{scheme}.png"))
    show_tokens(driver)
    driver.save_screenshot(str(images / f"report-tokens-{scheme}.png"))
    if scheme == "light":
        resize(driver, PHONE, 844)
        driver.get(f"file://{page}")
        driver.save_screenshot(str(images / "report-phone.png"))


def resize(driver: webdriver.Chrome, width: int, height: int) -> None:
    """Gives the page a window of this size, a phone's where it is narrow."""
    size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "mobile": width <= PHONE})


def show_tokens(driver: webdriver.Chrome) -> None:
    """Scrolls to the token view of the training samples and focuses the token that is disagreed about most."""
    resize(driver, 1100, 900)
    driver.execute_script(
        "const sets = [...document.querySelectorAll('#sets button')];"
        "sets.find((one) => one.textContent.startsWith('Training')).click();"
        "document.getElementById('tokens').scrollIntoView();"
        "document.querySelector('article .tok[tabindex=\"0\"]').focus({preventScroll: true});"
    )


if __name__ == "__main__":
    main()
