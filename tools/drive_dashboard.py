"""Drive the dashboard with a real browser, headless Chromium, by keyboard only: what a person does and sees.

    python tools/drive_dashboard.py FOLDER [--quick]

A whole compression of digits-mlp; and, unless --quick, SmolLM2 started, paused and resumed, and another run of it aborted.
What the page shows is checked against the journals on disk.  FOLDER gets the workspace, and pictures of every view: wide and
narrow, light and dark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from reports.phase8_compression.dashboard import CHAIN

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SMOLLM2 = """name: small SmolLM2
steps:
  - {name: rounding, try: ["rounding:bits=4,group=64,clip=mse"]}
gates: ["kl <= 1"]
text: selftext
tokens: 63
most_tokens: 63
"""
SIZES = {"wide": (1280, 1000), "narrow": (390, 844)}


@contextlib.contextmanager
def served(workspace: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A dashboard of its own: its address and its process, which is interrupted in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "agentforge", "dashboard", "--workspace", str(workspace), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _healthy(address), "the dashboard answers")
        yield address, process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/_stcore/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What `condition` gives as soon as that is true.  Raises AssertionError if it is not in time."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A headless Chromium with a new profile, without background network requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    for argument in ("headless=new", "no-sandbox", "no-first-run", *(f"disable-{what}" for what in quiet)):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        driver.set_window_size(*SIZES["wide"])
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(folder / "profile", ignore_errors=True)


class Page:
    """The dashboard as somebody without a mouse has it."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        until(lambda: "Workspace" in self.text, "the page is there")

    @property
    def text(self) -> str:
        """All that is on the page to be read, what grids say of themselves to screen readers included."""
        script = "const main = document.querySelector('[data-testid=stMain]'); if (!main) return '';"
        script += "return [main.innerText, ...[...main.querySelectorAll('canvas')].map(e => e.textContent)].join('\\n')"
        return str(self.driver.execute_script(script))

    def fill(self, label: str, text: str) -> None:
        """Type into a field, in place of what is there, and leave it."""
        from selenium.webdriver.common.keys import Keys

        field = self._field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.ENTER)

    def choose(self, label: str, option: str) -> None:
        """Choose from a list by typing."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.common.keys import Keys

        def chosen() -> bool:
            with contextlib.suppress(WebDriverException):  # redrawn while it is typed into
                if self._field(label).get_attribute("value") != option:
                    self._field(label).send_keys(Keys.CONTROL, "a")
                    self._field(label).send_keys(option, Keys.ENTER)
                time.sleep(0.5)
                return bool(self._field(label).get_attribute("value") == option)
            return False

        until(chosen, f"{label} is {option}")

    def _field(self, label: str) -> Any:
        return until(lambda: self._all(f"input[aria-label*={json.dumps(label)}]"), f"a field {label}")[0]

    def _all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def new_run(self, name: str, model: str, chain: str) -> None:
        """Start a run."""
        from selenium.webdriver.common.keys import Keys

        if not self._all("details[open]"):
            self._press("summary", "New run", Keys.ENTER)
        self.fill("Name of the run", name)
        self.choose("Model", model)
        self.choose("Chain", chain)
        self.press("Start")
        self.says(f"chain {chain}, begun")

    def view(self, name: str) -> None:
        """Change to another view."""
        self._press("input[type=radio]", name, " ")

    def press(self, label: str) -> None:
        """Press a button, once it can be pressed."""
        from selenium.webdriver.common.keys import Keys

        self._press("button", label, Keys.ENTER)

    def check(self, label: str) -> None:
        """Check a box."""
        self._press("input[type=checkbox]", label, " ")

    def _press(self, selector: str, label: str, key: str) -> None:
        from selenium.common.exceptions import StaleElementReferenceException, WebDriverException

        # The words are the last line of an element's text; an icon's name may stand before them.
        script = "return [...document.querySelectorAll(arguments[0])].find(e => !e.disabled && (e.innerText.trim() || "
        script += "e.closest('label')?.innerText.trim() || '').split('\\n').pop() === arguments[1])"

        def pressed() -> bool:
            try:
                found = self.driver.execute_script(script, selector, label)
                if found is not None:
                    self.driver.execute_script("arguments[0].focus()", found)
                    self.driver.switch_to.active_element.send_keys(key)
                return found is not None
            except (StaleElementReferenceException, WebDriverException):  # redrawn just now
                return False

        until(pressed, f"{label} can be pressed")

    def says(self, *texts: str, seconds: float = 60) -> None:
        """Wait until all of these texts are on the page."""
        try:
            until(lambda: all(text in self.text for text in texts), f"the page says {texts}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says:\n{self.text}") from None

    def pictures(self, folder: Path, name: str) -> None:
        """The whole page as it is, wide and narrow, light and dark; no part of it may be wider than the window."""
        for scheme in ("light", "dark"):
            feature = [{"name": "prefers-color-scheme", "value": scheme}]
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
            for size, (width, height) in SIZES.items():
                metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "narrow"}
                self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                time.sleep(0.7)
                tall = int(self.driver.execute_script("return document.querySelector('[data-testid=stMain]').scrollHeight"))
                self.driver.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride", {**metrics, "height": min(tall + 60, 6000)}
                )
                time.sleep(1.3)
                over = self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
                assert over <= 0, f"{name}, {size}: {over} pixels too wide"
                self.driver.save_screenshot(str(folder / f"{name}-{size}-{scheme}.png"))
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def journal(workspace: Path, name: str) -> dict[str, Any]:
    """A run's journal."""
    found: dict[str, Any] = json.loads((workspace / name / "out" / "journal.json").read_text(encoding="utf-8"))
    return found


def compress_digits(page: Page, workspace: Path) -> None:
    """A whole compression of digits-mlp, from the choice of the chain to the last accepted artifact."""
    page.new_run("digits", "digits-mlp", "digits.yaml (workspace)")
    page.says("running")
    page.says("every step was accepted", "lossless, try 1: accepted", seconds=120)
    rows = journal(workspace, "digits")["attempts"]
    assert [row["decision"] for row in rows] == ["accepted", "rejected", "accepted", "accepted"]
    for row in rows:
        kept = row["measured"]["retention"]
        page.says(f"{row['measured']['bytes']['value']:,}", f"measured {kept['value']:.4g} ± {kept['stderr']:.2g}")
    assert (workspace / "digits" / "out" / "artifact" / "model.safetensors").is_file()


def drive_smollm2(page: Page, workspace: Path, pictures: Path) -> None:
    """Start, pause, resume to the end; start another one and abort it."""
    page.new_run("smollm2", "smollm2-135m", "smollm2.yaml (workspace)")
    tensors = workspace / "smollm2" / "out" / "step-1.partial" / "tensors"
    until(lambda: len(list(tensors.glob("*.safetensors"))) >= 40, "40 tensors are finished")
    page.says("tensors finished", "a second")
    page.press("Pause")
    page.says("paused", "Resume continues from what is finished")
    finished = {piece.name: piece.stat().st_mtime_ns for piece in tensors.glob("*.safetensors")}
    print(f"smollm2: paused with {len(finished)} tensors finished")
    page.pictures(pictures, "smollm2-paused")
    page.press("Resume")
    until(lambda: len(list(tensors.glob("*.safetensors"))) > len(finished), "it goes on")
    kept = [name for name, at in finished.items() if (tensors / name).stat().st_mtime_ns == at]
    assert len(kept) == len(finished), "what was finished was made again"
    page.says("finished", "every step was accepted", seconds=240)
    (row,) = journal(workspace, "smollm2")["attempts"]
    for name in ("kl", "perplexity"):
        measured = row["measured"][name]
        page.says(f"{measured['value']:.4g} ± {measured['stderr']:.2g}")
    page.pictures(pictures, "smollm2-finished")
    page.new_run("aborted", "smollm2-135m", "smollm2.yaml (workspace)")
    out = workspace / "aborted" / "out"
    until(lambda: list(out.glob("*.partial/tensors/*")), "a tensor is finished")
    page.check("Abort for good")
    page.press("Abort")
    page.says("aborted", "ended for good")
    assert not list(out.glob("*.partial")), "something half-written is left"
    page.pictures(pictures, "smollm2-aborted")


def main() -> int:
    """Drive it, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="digits-mlp alone")
    options = parser.parse_args()
    if CHROMIUM is None or DRIVER is None:
        parser.error("chromium and chromedriver are not here; install both")
    workspace = options.folder.resolve() / "workspace"
    workspace.mkdir(parents=True)
    (workspace / "digits.yaml").write_text(CHAIN, encoding="utf-8")
    (workspace / "smollm2.yaml").write_text(SMOLLM2, encoding="utf-8")
    with served(workspace) as (address, process), browser(options.folder) as driver:
        page = Page(driver, address)
        compress_digits(page, workspace)
        page.pictures(options.folder, "digits")
        print("digits-mlp: compressed, every figure is the journal's")
        if not options.quick:
            drive_smollm2(page, workspace, options.folder)
            print("smollm2-135m: started, paused, resumed, finished; another one aborted")
        for view, there in {"Compare": "tries", "Frontier": "on the frontier", "Reports": "Download"}.items():
            page.view(view)
            page.says(there)
            page.pictures(options.folder, view.lower())
    print(process.stdout.read() if process.stdout else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
