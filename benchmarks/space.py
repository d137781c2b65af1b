"""The Space in a real browser: time to the first page, time of every action, four visitors at once.

    python benchmarks/space.py [--rounds 3] [--visitors 4] [--screenshots docs/images]

Needs `pip install "dinotok[demo]" playwright` and Chromium. The server runs as on the Hub, in a process of its own and
without a network; requests of the page to anywhere else are refused and listed. Times are those that a visitor sees:
from the click to the picture on the page.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "space.json"
WIDE, NARROW = (1280, 900), (390, 844)
PATIENCE = 240  # seconds; of a server that starts on a busy machine, four times that
_CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What is on the page once an action is done: an element, and a word in it.
DONE = {"reconstruct": ("#facts", "PSNR"), "mix": ("#mix-facts", "PSNR"), "generate": ("#settings", "guidance_scale")}
TABS = {"reconstruct": "Reconstruct", "mix": "Edit tokens", "generate": "Generate"}
EXAMPLES = {"reconstruct": "cat", "mix": "cat and coffee"}


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """Run the Space's server, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(ROOT / "spaces" / "app.py"), "--host", "127.0.0.1", "--port", str(port), *arguments]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 4 * PATIENCE
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"The server did not start within {4 * PATIENCE} s.")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def browsing() -> Iterator[Browser]:
    """Run Chromium without a screen."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise FileNotFoundError("There is no chromium here.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_CHROMIUM_OPTIONS, timeout=1000 * PATIENCE)
        yield browser
        browser.close()


def open_page(browser: Browser, address: str, size: tuple[int, int] = WIDE, outside: list[str] | None = None) -> Page:
    """Open the page as a new visitor; requests to other machines are refused, and listed in `outside`."""
    refused = [] if outside is None else outside

    def route(request: Route) -> None:
        if request.request.url.startswith((address, "data:", "blob:")):
            request.continue_()
        else:
            refused.append(request.request.url)
            request.abort()

    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    page.route("**/*", route)
    page.goto(address)
    page.locator("#reconstruct").wait_for()
    return page


def prepare(page: Page, action: str) -> None:
    """Go to the tab of an action, and choose what it needs."""
    page.get_by_role("tab", name=TABS[action]).click()
    if action in EXAMPLES:
        page.get_by_role("button", name=EXAMPLES[action], exact=True).click()
        inputs = ["#picture"] if action == "reconstruct" else ["#first", "#second"]
        for name in inputs:
            page.locator(f"{name} img").wait_for()
    else:
        page.wait_for_function("document.querySelector('#class input')?.value")
    page.locator(f"button#{action}").wait_for()


def is_done(page: Page, action: str) -> bool:
    """Tell whether the result of an action is on the page."""
    selector, word = DONE[action]
    return word in (page.locator(selector).text_content() or "")


def perform(page: Page, action: str) -> float:
    """Click, wait for the result, and return the seconds."""
    start = time.perf_counter()
    page.locator(f"button#{action}").click()
    while not is_done(page, action):
        if time.perf_counter() - start > PATIENCE:
            raise TimeoutError(f"{action} was not done in {PATIENCE} s.")
        page.wait_for_timeout(20)
    return time.perf_counter() - start


def measure_actions(browser: Browser, address: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every action: the first, which loads the model, and the median of those after it."""
    rows = {}
    for action in DONE:
        seconds = []
        for _ in range(rounds + 1):
            page = open_page(browser, address)
            prepare(page, action)
            seconds.append(perform(page, action))
            page.context.close()
        rows[action] = {"first": round(seconds[0], 2), "median": round(statistics.median(seconds[1:]), 2)}
    return rows


def measure_crowd(browser: Browser, address: str, action: str, visitors: int) -> list[float]:
    """Seconds that each of several visitors waits who click at the same time, in the order of their results."""
    pages = [open_page(browser, address) for _ in range(visitors)]
    for page in pages:
        prepare(page, action)
    start = time.perf_counter()
    for page in pages:
        page.locator(f"button#{action}").click()
    waiting, seconds = list(pages), []
    while waiting and time.perf_counter() - start < PATIENCE:
        for page in [page for page in waiting if is_done(page, action)]:
            waiting.remove(page)
            seconds.append(round(time.perf_counter() - start, 2))
        pages[0].wait_for_timeout(20)
    if waiting:
        raise TimeoutError(f"{len(waiting)} of {visitors} visitors got nothing in {PATIENCE} s.")
    for page in pages:
        page.context.close()
    return seconds


def take_screenshots(browser: Browser, address: str, folder: Path) -> None:
    """Save every tab after its action, wide and narrow, as JPEG files of at most 200 KB."""
    for name, size in (("wide", WIDE), ("narrow", NARROW)):
        page = open_page(browser, address, size)
        for action in DONE:
            prepare(page, action)
            perform(page, action)
            page.wait_for_timeout(1500)  # pictures fade in, and the page scrolls to them
            path = folder / f"space_{action}_{name}.jpg"
            page.screenshot(path=path, full_page=True, type="jpeg", quality=72)
        page.context.close()


def measure(rounds: int, visitors: int, screenshots: Path | None) -> dict[str, Any]:
    """Measure everything; returns what goes into the results."""
    outside: list[str] = []
    with browsing() as browser:
        start = time.perf_counter()
        with serving() as address:
            started = time.perf_counter() - start
            pages = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                open_page(browser, address, outside=outside).context.close()
                pages.append(time.perf_counter() - start)
            actions = measure_actions(browser, address, rounds)
            crowd = {
                action: measure_crowd(browser, address, action, visitors) for action in ("reconstruct", "generate")
            }
            if screenshots is not None:
                take_screenshots(browser, address, screenshots)
    return {
        "settings": {"rounds": rounds, "visitors": visitors, "cpus": os.cpu_count(), "machine": platform.machine()},
        "server start": round(started, 2),
        "seconds": {
            "page": {"first": round(pages[0], 2), "median": round(statistics.median(pages[1:]), 2)},
            **actions,
        },
        f"{visitors} visitors at once": crowd,
        "requests to other machines": len(outside),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as tables in Markdown."""
    rows = ["| seconds | first, with loading | median after it |", "|---|---|---|"]
    rows += [f"| {name} | {row['first']} | {row['median']} |" for name, row in results["seconds"].items()]
    visitors = results["settings"]["visitors"]
    waits = results[f"{visitors} visitors at once"]
    rows += ["", f"| {visitors} visitors at once | seconds until each has the result |", "|---|---|"]
    rows += [f"| {action} | {', '.join(map(str, seconds))} |" for action, seconds in waits.items()]
    start, outside = results["server start"], results["requests to other machines"]
    return "\n".join([*rows, "", f"Server start: {start} s. Requests of the page to other machines: {outside}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--visitors", type=int, default=4)
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page")
    arguments = parser.parse_args()
    results = measure(arguments.rounds, arguments.visitors, arguments.screenshots)
    print(table(results))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
