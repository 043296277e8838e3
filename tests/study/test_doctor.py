"""`crt doctor` says what is in the way of the two commands, and ends with 1 only then."""

import shutil
import sys
from importlib import metadata, util

import pytest

from crt_lib.commands import studies
from crt_lib.files import write_rows
from crt_lib.study import doctor

NAMES = ["python", "packages", "processor", "precision", "memory", "GPU", "disk", "WikiText-2"]


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(doctor, "update_seconds", lambda precision: 0.3)


def said() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine()}


def test_here_nothing_is_in_the_way_and_the_time_follows_the_pace(monkeypatch, tmp_path):
    times = tmp_path / "tests.csv"
    write_rows(times, [{"seconds": 600, "update_seconds": 0.2}])
    monkeypatch.setattr(doctor, "TESTS", times)
    found = said()
    assert list(found) == [*NAMES, "commands"]
    assert not any(finding.broken for finding in found.values())
    quick = found["commands"].found
    monkeypatch.setattr(doctor, "update_seconds", lambda precision: 0.6)
    minutes = [
        [int(of.split()[0].rstrip(",")) for of in text.split("about ")[1:]]
        for text in (quick, said()["commands"].found)
    ]
    for before, after in zip(*minutes, strict=True):
        assert after == pytest.approx(2 * before, abs=1) and before > 0
    assert len(minutes[0]) == 2 and "make test: about" in quick


def test_without_its_time_nothing_is_said_of_the_tests(monkeypatch):
    monkeypatch.setattr(doctor, "TESTS", "nowhere.csv")
    found = said()["commands"]
    assert "make reproduce: about" in found.found and "make test" not in found.found
    assert not found.broken


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("python", lambda p: p.setattr(sys, "version_info", (3, 10, 9, "final", 0))),
        ("memory", lambda p: p.setattr(doctor, "machine_memory", lambda: 10**9)),
        ("disk", lambda p: p.setattr(doctor, "NEEDS_DISK", 1e18)),
        ("commands", lambda p: p.setattr(shutil, "which", lambda name: None)),
    ],
)
def test_what_is_in_the_way_is_marked(monkeypatch, what, change):
    change(monkeypatch)
    found = said()
    assert [name for name, finding in found.items() if finding.broken] == [what]
    assert str(found[what]).endswith("[!]")


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "no_such_package", "pip install it")
    found = said()["packages"]
    assert "no no_such_package: pip install it" in found.found and not found.broken
    for name in ("numpy", "tokenizers", "accelerate"):
        assert f"{name} {metadata.version(name)}" in found.found


def test_without_a_needed_package_nothing_works(monkeypatch):
    there = [name for name in doctor.PACKAGES if name != "accelerate"]
    monkeypatch.setattr(util, "find_spec", there.__contains__)
    found = said()["packages"]
    assert found.broken and "no accelerate: pip install crt-lm" in found.found


def test_outside_a_checkout_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "checkout_root", lambda: tmp_path)
    assert "no checkout here" in said()["commands"].found


def test_a_checkout_without_results_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(doctor, "checkout_root", lambda: tmp_path)
    found = said()["commands"]
    assert "unknown" in found.found and not found.broken


def test_a_data_root_without_the_text_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CRT_DATA_ROOT", str(tmp_path))
    assert "not there" in said()["WikiText-2"].found


def test_the_command_ends_with_1_where_something_is_in_the_way(monkeypatch, capsys):
    import typer

    for broken in (False, True):
        finding = doctor.Finding("disk", "none", broken)
        monkeypatch.setattr(doctor, "examine", lambda f=finding: iter([f]))
        with pytest.raises(typer.Exit) as ended:
            studies.doctor()
        assert ended.value.exit_code == int(broken)
    assert capsys.readouterr().out.count("disk") == 2
