"""A browser for the tests of this room: Chromium and its driver, from the system's packages.

Without them (chromium, chromium-driver) the tests that open it are skipped.
"""

import shutil

import pytest
from tiny_rows import judged

from crt_lib.exits.choice import Choice, Choices
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import make_passage
from crt_lib.show.explorer_page import Explored

HOSTILE = 'the <b>cat</b> & </script><script>x()</script> sat\non "the" mat'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path):
    """Chromium, without a window, with a profile of its own."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.add_argument("--window-size=1500,1300")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def explored(scored):
    """A page's material, whose names and words try to be HTML."""
    model, data, trace = scored
    passage = make_passage(model, data.tokenizer, HOSTILE)
    rows = [
        judged("full depth", Policy(), 3.0, 0.0),
        judged("exit 2", Policy(fixed=2), 3.1, 0.1),
        judged("the paper's thresholds", Policy("confidence"), 3.2, 0.2),
        judged("gate", Policy("gate", 0.9, 0.9, 1.0, fixed=3), 3.3, 0.3),
        judged("margin", Policy(fixed=2), 3.1, 0.1),
    ]
    machine = {"device": "a machine", "isa": "AVX2", "threads": 2, "precision": "float32"}
    ways = {"full depth": (4, 1, 0), "exit 2": (2, 1, 0), "gate": (2.5, 1, 2)}
    ways["the paper's thresholds"] = 3.5, 3.5, 3
    decoded = [
        {"way": way, "batch": 1, "tokens_per_second": 1e3 / (loops + heads + 0.1 * asks)}
        | {"speedup": 5 / (loops + heads + 0.1 * asks), "decoded_loops": loops}
        | {"decoded_heads": heads, "decoded_asks": asks}
        | machine
        for way, (loops, heads, asks) in ways.items()
    ]
    choices = Choices(0.005, {"full": Choice(), "2": Choice(Policy(fixed=2), speedup=1.4)})
    return Explored("<script>x()</script>", trace, passage, None, rows, decoded, choices)
