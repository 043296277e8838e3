"""The README's tables are what the files under results/ say."""

import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from crt_lib import InputError
from crt_lib.files import read_rows, write_rows
from crt_lib.runs.manifest import update_manifest
from crt_lib.show import arenas as shown
from crt_lib.show.arenas import looping_headline
from crt_lib.show.demo import AIMED, missed_bars
from crt_lib.show.notebooks import lessons, notebook_table, record_times
from crt_lib.show.pages import BLOCKS, PAGES, update_page
from crt_lib.show.trained import small_results

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_are_up_to_date(page, tmp_path):
    copy = Path(shutil.copy(ROOT / page, tmp_path))
    assert not update_page(copy, ROOT / "results"), "run `crt report`"


def test_every_block_stands_on_one_page():
    pages = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
    assert sorted(re.findall(r"<!-- begin (\w+) -->", pages)) == sorted(BLOCKS)


def test_a_stale_number_is_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    names = ["words", "step"]
    blocks = "".join(f"<!-- begin {name} -->\n1.08\n<!-- end {name} -->\n" for name in names)
    readme.write_text(f"before\n{blocks}after\n")
    assert update_page(readme, ROOT / "results")
    text = readme.read_text()
    assert "1.08" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert not update_page(readme, ROOT / "results")


def test_other_seeds_of_the_small_run_are_averaged_in(tmp_path):
    shutil.copytree(ROOT / "results" / "small", tmp_path / "small", ignore=_heavy)
    rows = read_rows(ROOT / "results" / "small" / "crt2" / "results.csv")
    shutil.rmtree(tmp_path / "small" / "seeds", ignore_errors=True)
    alone = small_results(tmp_path)
    write_rows(
        tmp_path / "small" / "seeds" / "7" / "results.csv",
        [row | {"bits_per_byte": (row["bits_per_byte"] or 0) + 0.2} for row in rows],
    )
    both = small_results(tmp_path)
    (last,) = (
        row["bits_per_byte"]
        for row in rows
        if (row["split"], row["protocol"], row["exit"]) == ("test", "honest", 4)
    )
    assert f"| {last:.3f} |" in alone and f"| {last + 0.1:.3f} |" in both
    assert "`crt2`: update 4,000 of 4,500, seed 0, " in alone
    assert "`crt2`: update 4,000 of 4,500, mean of seeds 0, 7, " in both
    assert "at most 0.200 bits apart" in both


def _heavy(folder, names):
    return [name for name in names if name in ("checkpoints", "traces", "figures")]


def test_a_missing_block_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin claims -->\nwith no end")
    with pytest.raises(InputError, match="<!-- begin claims --> without its end"):
        update_page(page, ROOT / "results")


def test_times_come_from_a_finished_run_of_the_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr("crt_lib.show.notebooks.update_seconds", lambda precision: 0.25)
    entry = {
        "status": "done",
        "seconds": 12.5,
        "peak_memory_bytes": 2_000_000_000,
        "environment": {"device": "a processor", "isa": "AVX2", "cpu_count": 2},
    }
    spans = {"03_train": (0, 40), "01_data": (1, 20), "02_model": (30, 50), "04_more": (70, 79)}
    day = datetime(2026, 11, 29, tzinfo=UTC)
    entries = {
        name: entry
        | {
            at: (day + timedelta(seconds=seconds)).isoformat()
            for at, seconds in zip(("started", "finished"), span, strict=True)
        }
        for name, span in spans.items()
    }
    update_manifest(tmp_path / "smoke", "smoke", entries)
    record_times(tmp_path / "smoke", tmp_path)
    row, *others = read_rows(tmp_path / "notebooks.csv")
    assert [other["ended"] for other in others] == [50, 40, 59]  # for 20 s none ran
    assert row == {
        "notebook": "01_data",
        "profile": "smoke",
        "seconds": 12.5,
        "ended": 20,
        "peak_memory_bytes": 2_000_000_000,
        "device": "a processor",
        "isa": "AVX2",
        "cpu_count": 2,
        "update_seconds": 0.25,
    }
    update_manifest(tmp_path / "smoke", "smoke", {"02_model": entry | {"status": "failed"}})
    for folder in ("smoke", "quick"):
        with pytest.raises(InputError, match="no finished run"):
            record_times(tmp_path / folder, tmp_path)


def test_the_table_of_notebooks_asks_their_questions(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "results").mkdir()
    row = {"notebook": "02_model", "profile": "quick", "seconds": 9.6, "isa": "AVX2"}
    write_rows(tmp_path / "results" / "notebooks.csv", [row | {"cpu_count": 2}])
    lines = notebook_table(tmp_path / "results").splitlines()
    assert len(lines) == 2 + len(list((ROOT / "notebooks").glob("[0-9]*.ipynb")))
    assert "quick, two on 2 AVX2 cores" in lines[0]
    assert lines[3].startswith("| [02_model](notebooks/02_model.ipynb) | Which parts")
    assert lines[3].endswith("| 10 s |") and lines[2].endswith("|  |")
    assert all(line.split("|")[2].strip() for line in lines)


@pytest.mark.parametrize(
    ("seeds", "interval", "words"),
    [
        (1, (None, None, None), ["so far nothing", "(one seed) than one loop", "not its repet"]),
        (3, (-0.01, -0.03, 0.01), ["so far nothing", "+0.010, 3 seeds: within the noise)"]),
        (3, (0.01, 0.005, 0.015), ["so far nothing", "0.010 bits per byte more (+0.005 to +0"]),
        (3, (-0.01, -0.02, -0.005), ["so far little", "0.010 bits per byte fewer (-0.020"]),
        (3, (-0.1, -0.2, -0.05), ["so far something", "0.100 bits per byte fewer (-0.200"]),
    ],
)
def test_what_looping_is_good_for_follows_the_runs(seeds, interval, words, monkeypatch):
    measured = shown.standings

    def with_runs(name, folder):
        of = dict(zip(("mean", "low", "high"), interval, strict=True)) | {"seeds": seeds}
        return [
            row
            | (of if (name, row["arm"]) == ("fresh-2", "one loop") else {})
            | ({"seeds": seeds} if row["arm"] == "crt2" else {})
            for row in measured(name, folder)
        ]

    monkeypatch.setattr(shown, "standings", with_runs)
    said = looping_headline(ROOT / "results")
    assert all(word in said for word in words), said
    assert ("not its repetition" in said) == ("so far nothing" in said)


def test_an_arm_that_has_not_run_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(shown, "standings", lambda name, folder: [{"arm": "crt2"}])
    with pytest.raises(InputError, match="no run of one loop, unshared blocks: crt arena fresh-2"):
        looping_headline(ROOT / "results")


def test_every_notebook_is_in_one_lesson_with_its_exercises():
    text = lessons(ROOT / "results")
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        head = path.stem[:2]
        assert text.count(f"[{head}](notebooks/{path.name})") == 1, path
        assert re.search(rf"{head}: 1", text), path


def test_a_bar_that_is_reached_is_not_called_missed(monkeypatch):
    assert "**Exit 2 at 1.6x" in missed_bars(ROOT / "results")
    monkeypatch.setitem(AIMED, "exit 2", 1.2)
    with pytest.raises(InputError, match="no longer missed"):
        missed_bars(ROOT / "results")
