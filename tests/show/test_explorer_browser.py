"""Notebook 07 in a real browser: Jupyter Lab runs it, a slider moves, the numbers change."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
from waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
NOTEBOOK = "07_exit_explorer.ipynb"
SETTINGS = {  # all cells are drawn, in view or not; nothing is fetched
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture
def lab(tmp_path):
    """The address of a Jupyter Lab that serves a copy of the notebook."""
    served = tmp_path / "served"
    served.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # so that whatever shows was run here
            cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, served / NOTEBOOK)
    for name, value in SETTINGS.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--no-browser", "--allow-root", "--ServerApp.token=crt", f"--ServerApp.port={port}"]
    words += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={served}"]
    words += ["--ServerApp.ip=127.0.0.1"]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(f"{address}/api/status?token=crt"), "Jupyter Lab did not start")
        yield address
    finally:
        server.terminate()
        server.wait(PATIENCE)
        log.close()


def test_a_moved_slider_changes_the_numbers(browser, lab):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def texts(selector):
        """Read in one call: between two, the page may have drawn the element anew."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return browser.execute_script(script, selector)

    def numbers():
        return "".join(texts("table.crt-numbers"))

    def mean_loops():
        return float(re.search(r"mean loops\s+([\d.]+) of", numbers())[1])

    browser.get(f"{lab}/doc/tree/{NOTEBOOK}?token=crt&reset")
    wait_for(
        lambda: browser.execute_script(
            "return !!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell'))"
        ),
        "the notebook did not open",
    )
    wait_for(lambda: _idle(lab), "the kernel did not start")
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def ended():
        prompts = texts(".jp-CodeCell .jp-InputPrompt")
        return all(re.fullmatch(r"\[\d+\]:", prompt.strip()) for prompt in prompts)

    wait_for(lambda: ended() and bool(numbers()), "the explorer did not show")
    before = numbers()
    sliders = {
        slider.find_element(By.CSS_SELECTOR, ".widget-label").text: slider
        for slider in browser.find_elements(By.CSS_SELECTOR, ".widget-slider")
    }
    assert {"tau0", "tau_min", "decay"} <= set(sliders)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", sliders["tau0"])
    started = mean_loops()
    sliders["tau0"].find_element(By.CSS_SELECTOR, ".noUi-handle").send_keys(Keys.HOME)
    wait_for(lambda: numbers() not in ("", before), "the numbers did not change")
    assert mean_loops() == 1.0 < started  # at threshold 0 every token leaves at the first exit


def _answers(url):
    try:
        return urllib.request.urlopen(url, timeout=PATIENCE).status == 200
    except OSError:
        return False


def _idle(address):
    """Whether the notebook's kernel waits for work."""
    with urllib.request.urlopen(f"{address}/api/sessions?token=crt", timeout=PATIENCE) as answer:
        sessions = json.load(answer)
    return bool(sessions) and sessions[0]["kernel"]["execution_state"] == "idle"
