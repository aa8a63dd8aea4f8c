"""The screenshot of `trimtab playground`: the demo's models, one click in a headless Chromium.

    python benchmarks/playground.py

Needs the artifacts of `make demo`, and Debian's packages `chromium` and `chromium-driver`. Writes
`docs/playground.png`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 600  # until a machine that is busy has answered


@contextmanager
def chromium(width: int = 800, height: int = 720) -> Iterator[Any]:
    """A headless Chromium with a profile of its own, driven by selenium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "headless=new", "no-sandbox", "disable-gpu", "disable-background-networking",
            "disable-sync", "no-first-run", "hide-scrollbars", "disable-dev-shm-usage",
            f"user-data-dir={profile}", f"window-size={width},{height}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def playground(base_url: str, *flags: str, folder: Path) -> Iterator[str]:
    """A `trimtab playground` in a folder with modules of reward functions; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trimtab", "playground", "--base-url", base_url, *flags]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port)}
    page = subprocess.Popen(command, cwd=folder, env=env)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: urllib.request.urlopen(address, timeout=5), page)
        yield address
    finally:
        page.terminate()
        page.wait()


def wait_for(true: Any, process: subprocess.Popen[Any] | None = None) -> Any:
    """What `true` returns once it is something, asked again while it raises OSError."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, "it has ended"
        try:
            if found := true():
                return found
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"nothing in {SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("artifacts/smollm2"))
    parser.add_argument("--value-model", type=Path, default=Path("artifacts/value_model"))
    parser.add_argument("--image", type=Path, default=ROOT / "docs/playground.png")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import serve
    from PIL import Image
    from selenium.webdriver.common.by import By

    os.environ["VLLM_PLUGINS"] = "mavis"
    rewards = ["--reward_funcs", "positivity=rewards:positivity", "rarity=rewards:rarity"]
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(args.base, args.value_model, Path(folder, "log")) as server,
        playground(server, *rewards, folder=ROOT / "examples") as address,
        chromium(height=1340) as driver,
    ):
        driver.get(address)
        button = "//button[normalize-space()='Send']"
        [send] = wait_for(lambda: driver.find_elements(By.XPATH, button))
        send.click()
        wait_for(lambda: driver.find_elements(By.XPATH, "//*[contains(@class, 'mark-symbol')]"))
        time.sleep(2)  # until the plot stands
        driver.save_screenshot(args.image)
    Image.open(args.image).convert("P", palette=Image.Palette.ADAPTIVE).save(args.image)
    print(args.image)


if __name__ == "__main__":
    main()
