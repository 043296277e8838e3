"""The explorer's page: small, whole, closed to what is in its data, and served to nobody else."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import pytest
from bs4 import BeautifulSoup
from typer.testing import CliRunner

from crt_lib import InputError
from crt_lib.cli import app
from crt_lib.runs.manifest import checkout_root
from crt_lib.show.explorer_page import LIMIT, framed, page_of
from crt_lib.show.serving import server_of

STORED = checkout_root() / "results" / "small" / "crt2"


def data_of(page):
    return json.loads(BeautifulSoup(page, "html.parser").find(id="data").string)


def test_names_and_words_are_no_part_of_the_page(explored):
    page = page_of(explored)
    soup = BeautifulSoup(page, "html.parser")
    assert len(soup.find_all("script")) == 2 and not soup.find_all("b")
    assert page.count("</script>") == 2
    assert soup.title.string == "Exit explorer: <script>x()</script>"
    data = data_of(page)
    assert data["about"]["name"] == "<script>x()</script>"
    assert "".join(data["words"]["tokens"]) == explored.passage.about["text"]


def test_a_page_asks_for_nothing_and_allows_only_its_own_parts(explored):
    page = page_of(explored)
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all(src=True) and not soup.find_all("link")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    rules = soup.find("meta", attrs={"http-equiv": True})["content"]
    assert rules.startswith("default-src 'none'; ") and "unsafe" not in rules


def test_no_text_but_the_passage(scored, explored):
    """Strings of the data are names, words of the passage, and arrays in base64."""

    def strings(value):
        if isinstance(value, dict):
            value = value.values()
        elif isinstance(value, str):
            return [value]
        elif not isinstance(value, list):
            return []
        return [text for each in value for text in strings(each)]

    data = data_of(page_of(explored))
    for apart in ("words", "about", "machine"):
        data.pop(apart)
    names = {*scored[2].scores, *explored.policies, *data["colors"]}
    for text in set(strings(data)) - names:
        assert re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", text)
    tokens = data["trace"]["tokens"]
    assert tokens == len(scored[2].loss)


def test_a_smaller_page_holds_fewer_tokens(explored):
    page = page_of(explored)
    small = page_of(explored, len(page.encode()) - 5_000)
    tokens = data_of(small)["trace"]["tokens"]
    assert len(small.encode()) <= len(page.encode()) - 5_000
    assert 0 < tokens < data_of(page)["trace"]["tokens"]
    with pytest.raises(InputError, match="holds no token"):
        page_of(explored, 1_000)


def test_without_measurements_there_is_a_page_too(explored):
    data = data_of(page_of(replace(explored, judged=(), decoded=())))
    assert data["pace"] is None and data["machine"] is None and data["judged"] == []
    assert set(data["calibrated"]) == set(explored.trace.scores)


def test_a_frame_holds_the_page(explored):
    page = page_of(explored)
    assert BeautifulSoup(framed(page), "html.parser").iframe["srcdoc"] == page


@contextmanager
def served(page):
    with server_of(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_page_and_nothing_else_is_served_to_this_machine():
    with served("<p>ä</p>") as server:
        assert server.server_address[0] == "127.0.0.1"
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{address}/") as answer:
            assert answer.read().decode() == "<p>ä</p>"
        for path in ("/index.html", "/../etc/passwd", "/favicon.ico"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(address + path)
            assert caught.value.code == 404
        with pytest.raises(InputError, match="cannot be had"):
            server_of("", server.server_port)
    with pytest.raises(InputError, match="port 70000 cannot be had"):
        server_of("", 70_000)


def test_the_command_writes_one_file(tmp_path):
    """Of the stored run, with all tokens of its trace."""
    file = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["explore", str(STORED), "--html", str(file)])
    assert done.exit_code == 0, done.output
    page = file.read_text("utf-8")
    assert len(page.encode()) <= LIMIT
    data = data_of(page)
    assert data["trace"]["tokens"] == data["about"]["of"] == 50_000
    rows = {row["name"]: row for row in data["judged"]}
    assert rows["the paper's thresholds"]["taken_above"] > 0.01
    assert rows["gate"]["tokens_per_second"] and data["pace"]


def test_ctrl_c_ends_the_server():
    words = ["explore", str(STORED), "--no-browser"]
    server = subprocess.Popen(
        [sys.executable, "-m", "crt_lib.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = server.stdout.readline().split()[0]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    with urllib.request.urlopen(address) as answer:
        assert b"Exit explorer" in answer.read()
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=60) == ("", "") and server.returncode == 130


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = CliRunner().invoke(app, ["explore", str(tmp_path / "absent")])
    assert done.exit_code == 2
