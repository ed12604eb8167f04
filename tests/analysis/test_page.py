"""Tests of report.html in a headless Chromium, on a report over 200 runs that must be quick."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from analysis.records.campaign import load_campaign
from analysis.records.collectives import load_collectives
from analysis.records.scaling import load_scaling
from analysis.report import Records, report
from support.launch import ROOT

pytestmark = pytest.mark.slow

PUBLISHED = ROOT / "results" / "published"
RECORDS = PUBLISHED / "trec6" / "runs"
NUM_SEEDS = 5
MOST_SECONDS = 60.0  # 10 to 20 on an undisturbed core: only what grows with the square is caught
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def copy_with_seed(record: Path, folder: Path, seed: int) -> None:
    """A committed record under another seed, its accuracies a little off."""
    run = json.loads((record / "run.json").read_text())
    run["run_id"] = run["run_id"].replace("-seed0-", f"-seed{seed}-")
    run["config"]["seed"] = seed
    rounds = [json.loads(line) for line in (record / "rounds.jsonl").read_text().splitlines()]
    for row in rounds:
        if "accuracy" in row:
            row["accuracy"] -= 0.01 * seed
    copy = folder / run["run_id"]
    copy.mkdir(parents=True)
    (copy / "run.json").write_text(json.dumps(run))
    (copy / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    shutil.copy(record / "partition.json", copy)
    (copy / "DONE").touch()


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a report over 210 runs, and the CPU seconds it took."""
    folder = tmp_path_factory.mktemp("report")
    for record in RECORDS.iterdir():
        for seed in range(NUM_SEEDS):
            copy_with_seed(record, folder / "records", seed)
    start = time.process_time()
    report(Records(campaign=load_campaign(folder / "records")), folder / "out")
    return folder / "out", time.process_time() - start


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(reported: tuple[Path, float], browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The page as it opens from its file; whatever the test does must leave the console empty."""
    browser.get("about:blank")  # where it was another test, at another place of the same page
    browser.get((reported[0] / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_report_over_200_runs_is_quick(reported: tuple[Path, float]) -> None:
    out, seconds = reported
    assert len(list((out.parent / "records").iterdir())) >= 200
    assert seconds < MOST_SECONDS


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_seen_and_nothing_runs_over_the_edge(
    page: webdriver.Chrome, width: int
) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    images = page.find_elements(By.CSS_SELECTOR, "figure img")
    assert len(images) >= 8
    for image in images:
        assert image.is_displayed()
        assert int(image.get_property("naturalWidth")) > 600
        assert 0 < image.rect["width"] <= width
        assert image.get_attribute("alt")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_filters_narrow_the_runs_down(page: webdriver.Chrome) -> None:
    assert shown(page) == ("210 of 210 runs", 210)
    Select(page.find_element(By.NAME, "method")).select_by_value("fedara")
    assert shown(page) == ("10 of 210 runs", 10)  # two partitions at five seeds
    Select(page.find_element(By.NAME, "seed")).select_by_value("3")
    assert shown(page) == ("2 of 210 runs", 2)
    Select(page.find_element(By.NAME, "dataset")).select_by_value("trec6")
    assert shown(page) == ("2 of 210 runs", 2)
    Select(page.find_element(By.NAME, "method")).select_by_value("")
    assert shown(page) == ("42 of 210 runs", 42)


def test_keyboard_alone_filters_the_runs(page: webdriver.Chrome) -> None:
    assert [tab(page).text for _ in range(3)] == ["Tables", "Figures", "Runs"]
    press(page, Keys.ENTER)  # follows the link, past all that could take the focus on the way
    assert tab(page).get_attribute("name") == "method"
    press(page, "lora_a2")
    assert shown(page) == ("10 of 210 runs", 10)
    assert tab(page).get_attribute("name") == "dataset"
    assert tab(page).get_attribute("name") == "seed"
    press(page, Keys.ARROW_DOWN)
    assert shown(page) == ("2 of 210 runs", 2)
    assert tab(page).get_attribute("aria-label") == "Runs"


def test_a_row_of_a_table_leads_to_its_runs(page: webdriver.Chrome) -> None:
    Select(page.find_element(By.NAME, "method")).select_by_value("lora")
    row = page.find_element(By.XPATH, "//tr[td[3]='fedara' and td[1]='trec6']")
    summary = row.find_element(By.TAG_NAME, "summary")
    assert summary.text == "5 runs"
    summary.send_keys(Keys.ENTER)
    behind = row.find_element(By.CSS_SELECTOR, "details p")
    assert behind.text.startswith("commit ")
    assert " processes, " in behind.text
    links = behind.find_elements(By.TAG_NAME, "a")
    assert len(links) == 5
    link = links[2]
    run_id = link.text
    accuracy = row.find_elements(By.TAG_NAME, "td")[4]
    assert run_id in accuracy.get_attribute("title").split()
    link.send_keys(Keys.ENTER)  # the filter hides this run: it must be shown all the same
    target = page.find_element(By.CSS_SELECTOR, "#runs tr:target")
    assert target.is_displayed()
    assert target.find_element(By.TAG_NAME, "td").text == run_id
    assert shown(page) == ("210 of 210 runs", 210)


def test_micro_benchmarks_have_a_page_with_their_launches(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    """The published ones: there are no runs of rounds to filter."""
    collectives, scaling = (
        load_collectives(PUBLISHED / "micro"),
        load_scaling(PUBLISHED / "scaling"),
    )
    report(Records(collectives=collectives, scaling=scaling), tmp_path)
    page = browser
    page.get((tmp_path / "report.html").as_uri())
    for figure in ("collectives_density_overlap_1", "collectives_scaling", "scaling"):
        assert page.find_element(By.ID, figure).is_displayed()
    assert page.find_elements(By.CSS_SELECTOR, "#runs, #filters") == []
    for row in ("//tr[td[1]='MPICH' and td[2]='4' and td[3]='5e+07']", "//tr[td[1]='weak']"):
        found = page.find_element(By.XPATH, row)
        found.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
        link = found.find_element(By.TAG_NAME, "a")
        run_id = link.text
        link.send_keys(Keys.ENTER)
        target = page.find_element(By.CSS_SELECTOR, "#launches tr:target")
        assert target.find_element(By.TAG_NAME, "td").text == run_id
    assert page.get_log("browser") == []


def shown(page: webdriver.Chrome) -> tuple[str, int]:
    """What the browser of runs says that it shows, and how many rows are seen."""
    rows = page.execute_script(
        "return [...document.querySelectorAll('#runs tbody tr')].filter(r => r.offsetHeight).length"
    )
    return page.find_element(By.ID, "shown").text, rows


def press(page: webdriver.Chrome, keys: str) -> None:
    ActionChains(page).send_keys(keys).perform()


def tab(page: webdriver.Chrome) -> WebElement:
    """What has the focus after the tab key; it must be seen to have it."""
    press(page, Keys.TAB)
    element = page.switch_to.active_element
    assert element.value_of_css_property("outline-style") != "none"
    return element
