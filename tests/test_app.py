"""The demo: what it computes, on a tiny model; and the page itself, in a browser where there is one."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from explore import ExploreArguments, Explorer, Setting, demo_is_made, table
from peft_graft import DonorError

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"rows": 48, "mask_rows": 48, "calibration_rows": 32, "skip_train_samples": 64}


@pytest.fixture(scope="module")
def explorer(world: dict[str, str]) -> Iterator[Explorer]:
    made = Explorer(ExploreArguments(**world, **SMALL))  # type: ignore[arg-type]
    yield made
    made.close()


def test_a_point_is_what_was_asked_for(explorer: Explorer) -> None:
    point = explorer.run(Setting("magnitude", 0.05))
    assert point.entries == round(0.05 * explorer.eligible) == int(torch.tensor(point.place.counts).nansum())
    assert point.scores["loss"] < explorer.scores["base"]["loss"]
    assert point.bytes > 5 * point.entries
    assert explorer.scores["donor"]["agreement"] == 1
    assert f"**{point.entries:,}** of {explorer.eligible:,} entries" in table(explorer, point)
    assert table(explorer, None).count("\n") == 3


@pytest.mark.parametrize("selection", ["learned", "path_taylor"])
def test_rules_that_see_data(explorer: Explorer, selection: str) -> None:
    assert explorer.run(Setting(selection, 0.05)).alpha != 1


def test_what_was_measured_is_remembered_with_its_graft(explorer: Explorer) -> None:
    settings = Setting("magnitude", 0.1, "1"), Setting("random", 0.1, "2.5")
    points = [explorer.run(setting) for setting in settings]
    answers = []
    for setting, point in zip(settings, points, strict=True):
        assert explorer.run(setting) is point
        answers.append(explorer.ask("the film was great"))
    assert points[1].alpha == 2.5
    assert answers[0]["donor"] == answers[1]["donor"] and answers[0]["graft"] != answers[1]["graft"]
    assert sum(answers[0]["graft"].values()) == pytest.approx(1)
    assert list(answers[0]["base"]) == ["better", "worse"]


def test_a_curve_keeps_the_present_graft(explorer: Explorer) -> None:
    explorer.run(Setting("random", 0.2, "1"))
    present, shares = explorer.graft, []
    points = list(
        explorer.curve("magnitude", "1", (1e-9, 0.01, 0.3), progress=lambda share, what: shares.append(share))
    )
    assert explorer.graft is present
    assert shares == [0, 0.5]  # a density of no entry is passed over
    assert [point.setting.density for point in points] == [0.01, 0.3]
    lines = explorer.recovery().axes[0].get_lines()
    assert any("magnitude, alpha = 1" in str(line.get_label()) for line in lines)


def test_nothing_is_drawn_before_the_first_graft(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "points", {})
    assert explorer.recovery() is None


def test_wrong_settings_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"selection must be .* density must be .* alpha must be .* got 'much'"):
        Setting("best", 2.0, "much")


def test_no_sentence_is_refused(explorer: Explorer) -> None:
    with pytest.raises(ValueError, match="text must hold a sentence, got none"):
        explorer.ask("  ")


def test_a_base_needs_its_donor(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base and donor must be given together"):
        Explorer(ExploreArguments(base=world["base"]))
    assert demo_is_made(ExploreArguments(donor=world["donor"]))
    assert not demo_is_made(ExploreArguments(demo_dir=str(tmp_path)))


def test_a_donor_of_another_base_is_refused_at_once(world: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    other = AutoModelForSequenceClassification.from_pretrained(world["base"], num_hidden_layers=1)
    other.save_pretrained(tmp_path)
    with pytest.raises(DonorError, match="donor must hold every targeted tensor of the base"):
        Explorer(ExploreArguments(**(world | {"donor": str(tmp_path)}), **SMALL))  # type: ignore[arg-type]


# In a browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--window-size=1300,1500")


def _missing() -> str:
    """What the browser test lacks here, and how to get it."""
    packages = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    wanted = [f"pip install {' '.join(packages)}"] * bool(packages)
    return "; ".join(wanted + ["apt-get install chromium chromium-driver"] * bool(programs))


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """The address of the running demo, which has no donor yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {**SMALL, "port": port, "demo_dir": tmp_path / "demo"}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    server = subprocess.Popen([sys.executable, str(EXAMPLES / "app.py"), *flags], cwd=tmp_path)
    try:
        for _ in range(1000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the demo has stopped"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.page_load_strategy = "eager"
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(bool(_missing()), reason=f"the page needs a browser: {_missing()}")
def test_the_page(page: str, browser: Any, world: dict[str, str]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name: str) -> str:
        return browser.find_element(By.ID, name).text

    def until(condition: Any) -> None:
        WebDriverWait(browser, 300).until(lambda _: condition())

    def press(name: str) -> None:
        browser.find_element(By.ID, name).click()

    def shown(name: str) -> bool:
        return any(element.is_displayed() for element in browser.find_elements(By.ID, name))

    browser.get(page)
    until(lambda: shown("make") and "There is no donor yet" in text("status"))
    for name, path in world.items():
        box = browser.find_element(By.CSS_SELECTOR, f"#{name} textarea, #{name} input")
        box.clear()
        box.send_keys(path)
    press("open")
    until(lambda: "donor" in text("scores"))
    until(lambda: not shown("make"))
    assert "graft" not in text("scores")
    until(lambda: "density 0.001:" in text("budget"))

    slider = browser.find_element(By.CSS_SELECTOR, "#density input[type=range]")
    slider.send_keys(Keys.ARROW_RIGHT * 6)
    until(lambda: "density 0.0316:" in text("budget"))
    entries = text("budget").split()[2]
    press("graft")
    until(lambda: f"{entries} of" in text("scores"))
    first = text("scores")
    assert "graft" in first and "KiB" in first

    slider.send_keys(Keys.ARROW_RIGHT * 2)
    until(lambda: "density 0.1:" in text("budget"))
    press("graft")
    until(lambda: f"{entries} of" not in text("scores"))
    assert text("scores") != first
    until(lambda: all("%" in text(f"says-{name}") for name in ("base", "donor", "graft")))
    until(lambda: all(browser.find_elements(By.CSS_SELECTOR, f"#{name} img") for name in ("recovery", "where")))

    curve = browser.find_element(By.CSS_SELECTOR, "#recovery img").get_attribute("src")
    press("curve")
    until(lambda: browser.find_element(By.CSS_SELECTOR, "#recovery img").get_attribute("src") != curve)

    asked = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    outside = [message for message in asked if '"url":"http' in message and page.removeprefix("http://") not in message]
    assert asked and not outside, "the page asks for something outside of this machine"
