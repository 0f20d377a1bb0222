"""Takes the pictures in docs/images/ from a finished run: report and token view, light and dark, and MLflow's page.

Usage: kdpipe run quickstart && python benchmarks/screenshots.py [RECIPE] [--workspace DIR] [--images DIR]
Needs Chromium, its driver (Debian: chromium, chromium-driver) and the `dev` extra.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import (
    element_to_be_clickable,
    text_to_be_present_in_element,
)
from selenium.webdriver.support.ui import WebDriverWait

from kdpipe.pipeline.project import Project, open_project
from kdpipe.recipe.file import load_recipe, shipped_path
from kdpipe.report.writing import write_report
from kdpipe.tracking.memory import read_memory
from kdpipe.tracking.mirror import settle
from kdpipe.tracking.page import free_port

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
ASSISTANT = "mlflow.assistant.chat_panel.close"


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
            take_mlflow(driver, project, args.images)
        finally:
            driver.quit()
    for image in sorted(args.images.glob("*.png")):
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
    prefer(driver, scheme)
    resize(driver, 1100, 1500)
    driver.get(f"file://{page}")
    driver.save_screenshot(str(images / f"report-top-{scheme}.png"))
    show_tokens(driver)
    driver.save_screenshot(str(images / f"report-tokens-{scheme}.png"))
    if scheme == "light":
        resize(driver, PHONE, 844)
        driver.get(f"file://{page}")
        driver.save_screenshot(str(images / "report-phone.png"))


def take_mlflow(driver: webdriver.Chrome, project: Project, images: Path) -> None:
    """The run's own page in MLflow, served over the workspace as `kdpipe ui` does."""
    settle(project.workspace)
    memory = read_memory(project.run.path)
    if memory is None or memory.run_id is None:
        raise SystemExit(f"{project.run.name}: not in MLflow; run it with tracking on")
    port = free_port("127.0.0.1", 5900)
    command = [sys.executable, "-m", "kdpipe.cli.app", "ui", "--workspace", str(project.workspace)]
    page = subprocess.Popen([*command, "--port", str(port)])
    try:
        while not asked(port, "/health"):
            if page.poll() is not None:
                raise SystemExit("kdpipe ui: ended before its page answered")
            time.sleep(0.2)
        run = json.loads(asked(port, f"/api/2.0/mlflow/runs/get?run_id={memory.run_id}"))["run"]
        experiment = f"http://127.0.0.1:{port}/#/experiments/{run['info']['experiment_id']}"
        prefer(driver, "light")
        resize(driver, 1400, 640)
        wait = WebDriverWait(driver, 60)
        driver.get(f"{experiment}/runs")
        click(wait, "//*[text()='Model training']")
        driver.get(f"{experiment}/runs/{memory.run_id}")
        click(wait, f"//*[@data-component-id='{ASSISTANT}']")
        driver.refresh()  # with the width that the panel left
        wait.until(text_to_be_present_in_element((By.TAG_NAME, "body"), "Accuracy: "))
        wait.until(text_to_be_present_in_element((By.TAG_NAME, "body"), "Headline/evaluate.accuracy"))
        driver.save_screenshot(str(images / "mlflow.png"))
    finally:
        page.terminate()
        page.wait(timeout=30)


def asked(port: int, path: str) -> bytes:
    """What the page answers, empty while it does not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", path)
        return connection.getresponse().read()
    return b""


def click(wait: WebDriverWait[webdriver.Chrome], place: str) -> None:
    """Clicks on what is at this XPath, once it can be."""
    wait.until(element_to_be_clickable((By.XPATH, place))).click()


def prefer(driver: webdriver.Chrome, scheme: str) -> None:
    """Makes the page that of a user with this color scheme."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


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
