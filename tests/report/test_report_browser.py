"""The report in a real browser: nothing runs, nothing is fetched, answers wait for a click, and it all fits a phone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from exitwise.auditing.report import write_report
from tests.report_fixture import HOSTILE, add_judge, write_run

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",  # a click must not race a smooth scroll
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get("about:blank")  # the start page would go on loading into the log of the first test
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture
def page(browser, report) -> Iterator[Any]:
    """The report on a desktop screen; every test ends with nothing run, nothing fetched and no complaint."""
    resize(browser, 1280, 800)
    browser.get_log("performance")
    browser.get(report.as_uri())
    yield browser
    assert browser.execute_script("return typeof window.pwned") == "undefined"
    assert browser.get_log("browser") == []
    assert {url for url in requests(browser) if not url.startswith("data:")} == {report.as_uri()}


def resize(browser, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requests(browser) -> Iterator[str]:
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


def choose(browser, **fields: str) -> None:
    """Sets fields of the filter form as a user's input would."""
    script = """
        const form = document.getElementById("filters");
        for (const [name, value] of Object.entries(arguments[0])) form.elements[name].value = value;
        form.dispatchEvent(new Event("input"));
    """
    browser.execute_script(script, fields)


def count(browser) -> str:
    return browser.find_element(By.ID, "count").text


def fits(browser) -> bool:
    return browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_size(report):
    assert report.stat().st_size < 3_000_000


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_first_screen_is_the_answer(page, size):
    resize(page, *size)
    shown = [svg for svg in page.find_elements(By.CSS_SELECTOR, "svg.curve") if svg.is_displayed()]
    assert len(shown) == 1
    for node in (page.find_element(By.TAG_NAME, "h1"), shown[0], page.find_element(By.CSS_SELECTOR, "dl.exits")):
        assert node.rect["y"] + node.rect["height"] <= size[1]


@pytest.mark.parametrize("view", ["one", "two"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_sideways_scroll(page, view, width):
    resize(page, width, 844)
    choose(page, view=view, **({"exit": "0"} if view == "one" else {"left": "0"}))
    for button in page.find_elements(By.CSS_SELECTOR, "button.reveal"):
        page.execute_script("arguments[0].click()", button)
    assert fits(page)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_the_exit_pareto(page, width, scheme):
    """One figure a screen; the front is coloured, dominated exits are grey, in the colours of the scheme."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    resize(page, width, 844)
    (figure,) = [svg for svg in page.find_elements(By.CSS_SELECTOR, "svg.pareto") if svg.is_displayed()]
    colours = {
        kind: {node.value_of_css_property("fill") for node in figure.find_elements(By.CSS_SELECTOR, f".point.{kind}")}
        for kind in ("front", "beaten")
    }
    utility, soft = {"light": ("21, 101, 165", "95, 91, 84"), "dark": ("109, 182, 242", "168, 164, 157")}[scheme]
    assert colours == {"front": {f"rgb({utility})"}, "beaten": {f"rgb({soft})"}}
    numbers = [node.text for node in figure.find_elements(By.CSS_SELECTOR, "text.exit")]
    assert sorted(map(int, numbers)) == list(range(13))
    assert fits(page)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_answers_wait_for_a_click(page):
    choose(page, exit="0", kind="harmful")
    assert page.find_elements(By.CSS_SELECTOR, ".answer-text") == []
    assert "window.pwned" not in page.find_element(By.TAG_NAME, "main").text
    buttons = page.find_elements(By.CSS_SELECTOR, "button.reveal")
    assert len(buttons) == 12
    buttons[0].click()
    assert [node.text for node in page.find_elements(By.CSS_SELECTOR, ".answer-text")] == [HOSTILE[0]]
    assert "no verdict in <b>Maybe</b>" in page.find_element(By.CSS_SELECTOR, ".answer-body").text
    buttons[0].click()
    assert page.find_elements(By.CSS_SELECTOR, ".answer-text") == []


def test_hostile_answers_are_shown_and_do_nothing(page):
    choose(page, exit="0", kind="harmful")
    for button in page.find_elements(By.CSS_SELECTOR, "button.reveal"):
        button.click()
    texts = page.execute_script("return [...document.querySelectorAll('.answer-text')].map(n => n.textContent)")
    assert texts[:3] == HOSTILE[:3]
    assert texts[3] == "before␀after ␛[31mred␇"
    assert texts[4] == "x" * 2000
    assert "⟨U+202E⟩" in texts[5]
    assert texts[7] == HOSTILE[7]
    assert "first 2,000 of 1,000,000 characters" in page.find_element(By.ID, "list").text
    assert page.find_elements(By.CSS_SELECTOR, "#list script, #list img[onerror], #list b") == []


def test_filters(page):
    assert count(page) == "468 answers to 36 prompts"
    choose(page, exit="5")
    assert count(page) == "36 answers to 36 prompts"
    choose(page, kind="vqa")
    assert count(page) == "12 answers to 12 prompts"
    choose(page, kind="", label="unscored", exit="")
    assert count(page) == "1 answer to 1 prompt"
    choose(page, label="", search="COCONUT number 1")
    assert count(page) == "39 answers to 3 prompts"
    page.find_element(By.ID, "clear").click()
    assert count(page) == "468 answers to 36 prompts"


def test_more_prompts(page):
    assert len(page.find_elements(By.CSS_SELECTOR, ".card")) == 20
    page.find_element(By.ID, "more").click()
    assert len(page.find_elements(By.CSS_SELECTOR, ".card")) == 36
    assert not page.find_element(By.ID, "more").is_displayed()
    assert "reveal" in page.switch_to.active_element.get_attribute("class")


def test_two_exits_side_by_side(page):
    page.find_element(By.CSS_SELECTOR, "input[value=two]").click()
    assert count(page) == "72 answers to 36 prompts"
    assert page.find_element(By.NAME, "left").get_attribute("value") == "11"
    assert page.find_element(By.NAME, "right").get_attribute("value") != "11"
    choose(page, right="5")
    pairs = [card.find_elements(By.CSS_SELECTOR, ".answer") for card in page.find_elements(By.CSS_SELECTOR, ".card")]
    assert {tuple(node.text.split("\n")[0] for node in pair) for pair in pairs} == {("exit 11 ◆ default", "exit 5")}
    left, right = pairs[0]
    assert left.rect["y"] == right.rect["y"]
    assert left.rect["x"] + left.rect["width"] <= right.rect["x"]
    page.find_element(By.NAME, "differ").click()
    differing = page.find_elements(By.CSS_SELECTOR, ".card")
    assert 0 < len(differing) < 36
    for card in differing:
        first, second = (chip.text.split()[-1] for chip in card.find_elements(By.CSS_SELECTOR, ".chip"))
        assert first != second


def test_keyboard_alone(page):
    choose(page, exit="0")
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        if "reveal" in (page.switch_to.active_element.get_attribute("class") or ""):
            break
    button = page.switch_to.active_element
    assert button.get_attribute("aria-expanded") == "false"
    assert button.value_of_css_property("outline-style") == "solid"
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    assert page.find_element(By.CSS_SELECTOR, ".answer-text").is_displayed()


def test_controls_have_names(page):
    page.find_element(By.CSS_SELECTOR, "input[value=two]").click()
    controls = page.find_elements(By.CSS_SELECTOR, "button, select, input, [role=region], svg[role=img]")
    assert [
        node.get_attribute("outerHTML") for node in controls if node.is_displayed() and not node.accessible_name
    ] == []


def test_print_hides_answers(page):
    page.find_element(By.CSS_SELECTOR, "button.reveal").click()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not page.find_element(By.CSS_SELECTOR, ".answer-text").is_displayed()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_answers_on_which_judges_split_come_first(browser, report, tmp_path):
    resize(browser, 1280, 800)
    browser.get(report.as_uri())
    assert not browser.find_element(By.NAME, "split").is_displayed()  # one judge
    run = write_run(tmp_path / "run")
    add_judge(run, {("harmful-007", 5), ("harmful-007", 6), ("harmful-009", 2)})
    browser.get(write_report(run).as_uri())
    cards = browser.find_elements(By.CSS_SELECTOR, ".card")
    told = [card.text.count("judges differ") for card in cards]
    assert told == [2, 1] + [0] * (len(cards) - 2)
    assert "harmful-007" in cards[0].text
    row = cards[0].find_elements(By.CSS_SELECTOR, ".answer")[5].text
    assert "exit 5" in row
    assert "guard: " in row
    box = browser.find_element(By.NAME, "split")
    assert box.is_displayed()
    box.click()
    assert count(browser) == "3 answers to 2 prompts"
    assert fits(browser)
    browser.get_log("performance")


def test_a_fused_exit_is_chosen_by_its_layers(browser, tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("completions.jsonl", "verdicts.refusal.jsonl", "metrics.json", "costs.json"):
        path = run / name
        path.write_text(path.read_text().replace('"exit": 12,', '"exit": "3+8",'))
    resize(browser, 1280, 800)
    browser.get(write_report(run).as_uri())
    choose(browser, exit="3+8")
    assert count(browser) == "36 answers to 36 prompts"
    browser.find_element(By.CSS_SELECTOR, "input[value=two]").click()
    choose(browser, left="3+8", right="5")
    blocks = browser.find_elements(By.CSS_SELECTOR, ".card")[0].find_elements(By.CSS_SELECTOR, ".answer")
    assert [block.text.split("\n")[0] for block in blocks] == ["exit 3+8", "exit 5"]
    browser.get_log("performance")
