"""The Space in a real browser, wide and narrow, by mouse and by keyboard, with files and names that are none."""

import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the Space needs gradio: pip install 'dinotok[demo]'")
pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: pip install playwright")

from benchmarks.space import NARROW, WIDE, browsing, is_done, open_page, perform, prepare, serving  # noqa: E402
from tests.spaces.hostile import write_hostile_files  # noqa: E402
from tests.tiny_pipelines import save_tiny_pipelines  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here"),
]
DIVIDED = "#comparison img[style*='clip-path']"
TOAST = "[data-testid=toast-body]"


@pytest.fixture(scope="module")
def address():
    with serving("--allow-folders") as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    page = open_page(browser, address)
    yield page
    page.context.close()


def set_number(page, name: str, value: int) -> None:
    field = page.locator(f"{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_all_tabs_work_fit_the_window_and_stay_on_this_machine(browser, address, size):
    outside: list[str] = []
    page = open_page(browser, address, size, outside)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    for action, results in (("reconstruct", "#maps"), ("mix", "#mix-pictures"), ("generate", "#drawn")):
        prepare(page, action)
        if action == "generate":
            set_number(page, "#steps", 2)
        perform(page, action)
        page.locator(f"{results} img").first.wait_for()
        for picture in page.locator(f"{results} img").all():
            assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), action
    assert (outside, problems) == ([], [])
    page.context.close()


def press_until(page, key: str, condition: str) -> None:
    for _ in range(60):
        page.keyboard.press(key)
        if page.evaluate(f"(() => {{ const at = document.activeElement; return {condition}; }})()"):
            return
    raise AssertionError(f"{condition} was not reached with {key}.")


def test_a_picture_is_reconstructed_and_compared_by_keyboard_alone(page):
    press_until(page, "Tab", "at.innerText.trim() === 'coffee'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator("#picture img").wait_for()
    press_until(page, "Tab", "at.id === 'reconstruct'")
    page.keyboard.press("Enter")
    while not is_done(page, "reconstruct"):
        page.wait_for_timeout(50)
    page.locator(DIVIDED).wait_for()
    press_until(page, "Tab", "at.type === 'range' && at.closest('#divider')")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    position = f"parseFloat(document.querySelector(\"{DIVIDED}\").style.clipPath.split(' ').pop())"
    page.wait_for_function(f"Math.abs({position} - 57) < 0.1")  # the browser rounds


def test_hostile_files_get_a_message_and_no_trace(page, tmp_path):
    for name, (path, words) in write_hostile_files(tmp_path).items():
        page.locator("#picture input[type=file]").set_input_files(path)
        page.locator("#picture img").wait_for(state="attached")
        page.locator("button#reconstruct").click()
        if words is None:
            facts = page.locator("#facts", has_text=f"{path.stat().st_size:,} bytes, 96 x 64")
            facts.wait_for()
            assert "PSNR" in facts.inner_text(), name
        else:
            toast = page.locator(TOAST)
            toast.wait_for()
            text = toast.inner_text()
            assert words in text and "Traceback" not in text, (name, text)
            page.locator("[data-testid=toast-close]").click()
            toast.wait_for(state="detached")
        page.get_by_label("Remove Image").first.click()
        page.locator("#picture img").wait_for(state="detached")


def test_files_of_the_server_cannot_be_asked_for(address):
    """Without a browser, a visitor may send any path."""
    picture = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    data = json.dumps({"data": [picture, "dinotok-tiny-vq", "", 256]}).encode()
    call = f"{address}gradio_api/call/reconstruct"
    request = urllib.request.Request(call, data, {"Content-Type": "application/json"})
    event = json.loads(urllib.request.urlopen(request).read())["event_id"]
    answer = urllib.request.urlopen(f"{call}/{event}").read().decode()
    assert answer.startswith("event: error") and "root:" not in answer and "PSNR" not in answer


def test_a_file_beyond_the_limit_is_refused_on_its_way(page, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(21 * 2**20))
    page.locator("#picture input[type=file]").set_input_files(path)
    toast = page.locator(TOAST)
    toast.wait_for()
    assert "20" in toast.inner_text() and not page.locator("#picture img").count()


def test_buttons_pressed_too_early_say_what_is_missing(page):
    page.locator("button#reconstruct").click()
    page.locator(TOAST).wait_for()
    assert "no picture yet" in page.locator(TOAST).inner_text()


def test_names_that_are_no_models_get_a_message_without_markup(page):
    prepare(page, "reconstruct")
    page.locator("#reconstruct-repository textarea, #reconstruct-repository input").fill(
        "<img src=x onerror=alert(1)>"
    )
    page.locator("button#reconstruct").click()
    page.locator(TOAST).wait_for()
    assert "<img src=x" in page.locator(TOAST).inner_text() and not page.locator(f"{TOAST} img").count()


def test_a_generator_of_ones_own_shows_its_classes_and_options_and_its_progress(page, tmp_path):
    folder = Path(save_tiny_pipelines(tmp_path)["autoregressive"])
    prepare(page, "generate")
    assert page.locator("#steps").is_visible() and not page.locator("#temperature").is_visible()
    set_number(page, "#steps", 7)
    field = page.locator("#generator-repository").get_by_label("Or any repository of the Hub")
    field.focus()
    field.press("Tab")  # the same generator still: nothing is set back
    page.wait_for_timeout(1000)
    assert page.locator("#steps input[type=number]").input_value() == "7"
    field.fill(str(folder))
    field.press("Tab")
    page.locator("#temperature").wait_for()
    assert not page.locator("#steps").is_visible()
    assert page.locator("#class input").input_value() == "tench, Tinca tinca"
    page.locator("button#generate").click()
    page.locator("#settings", has_text=re.compile("temperature 1")).wait_for()
    assert page.locator("#drawn img").count() == 4


def test_visitors_wait_in_a_queue_and_all_are_served(browser, address):
    pages = [open_page(browser, address) for _ in range(3)]
    for page in pages:
        prepare(page, "generate")
        set_number(page, "#steps", 8)
    for page in pages:
        page.locator("button#generate").click()
    seen: set[str] = set()
    while not all(is_done(page, "generate") for page in pages):
        for page in pages:
            seen.update(page.locator("#drawn .progress-text, #drawn .meta-text").all_inner_texts())
            page.wait_for_timeout(30)
    shown = " ".join(seen)
    assert re.search(r"queue: \d/\d", shown) and re.search(r"\d/8 steps", shown), shown
    for page in pages:
        page.context.close()
