"""What is missing or stale under results/ is found, named with its command, and made again."""

import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from crt_lib.book.pipeline import SET_BY_PIPELINE
from crt_lib.checkpoint import read_state
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.study.arenas import arenas
from crt_lib.study.made import check, provenance, read_list, read_plan, remake

COMMITTED = Path(__file__).resolve().parents[2] / "results"


def results(tmp_path, *rows):
    """A results folder with a list of these rows (path, of, needs, command)."""
    fields = ("path", "of", "needs", "command")
    write_rows(
        tmp_path / "made.csv",
        [dict(zip(fields, row, strict=True)) | {"minutes": 1.5} for row in rows],
    )
    return tmp_path


def faults(folder):
    return [made.fault(folder) for made in read_list(folder)]


def test_everything_committed_is_there_and_as_the_code_expects():
    assert [made.path for made in read_list(COMMITTED) if made.fault(COMMITTED)] == []


def test_a_run_says_its_scored_update_and_whether_its_code_was_modified():
    small = COMMITTED / "small"
    git = json.loads((small / "crt2/manifest.json").read_text())["train"]["environment"]["git"]
    best = read_state(small / "crt2/checkpoints/best.safetensors")
    update, code = provenance(small / "crt2")
    assert update == f"{best['update']:,} of 4,500" and code == f"`{git['commit'][:7]}`"
    assert provenance(small / "released")[1].endswith("`, modified")
    assert provenance(small / "seeds/2")[0] == "not kept"
    assert provenance(small / "search.csv") == ("", "")


def test_a_table_without_a_column_is_stale_and_names_its_command(tmp_path):
    folder = results(tmp_path, ("a.csv", "", "x y", "make a"))
    assert faults(folder) == ["missing"]
    check(folder)  # what is missing is for `remake`
    write_rows(folder / "a.csv", [{"x": 1}])
    assert faults(folder) == ["stale: it lacks y"]
    with pytest.raises(InputError, match=r"a\.csv is stale: it lacks y; make it anew: make a"):
        check(folder)
    write_rows(folder / "a.csv", [{"x": 1, "y": 2}])
    assert faults(folder) == [None]


def test_a_measurement_of_another_checkpoint_is_stale(tmp_path):
    folder = results(tmp_path, ("decode.csv", "run", "checkpoint", "bench"))
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/best.safetensors.sha256").write_text("abc  best.safetensors\n")
    write_rows(folder / "decode.csv", [{"checkpoint": "sabc"}])
    assert faults(folder) == [None]
    write_rows(folder / "decode.csv", [{"checkpoint": "sabd"}])
    assert faults(folder) == ["stale: it measured another checkpoint than that of run"]


@pytest.mark.parametrize(
    "name", ["depth.csv", "policies.csv", "traces/test.safetensors", "gate", "exits.json"]
)
def test_what_belongs_to_another_checkpoint_is_an_error_that_names_the_command(tmp_path, name):
    """Everything beside a checkpoint that was made of it says of which, as committed."""
    name = {"gate": "checkpoints/gate.safetensors"}.get(name, name)
    name = f"checkpoints/{name}" if name == "exits.json" else name
    (made,) = [made for made in read_list(COMMITTED) if made.path == f"small/crt2/{name}"]
    folder = results(tmp_path, (made.path, made.of, made.needs, made.command))
    for file in (made.path, "small/crt2/checkpoints/best.safetensors.sha256"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(COMMITTED / file, folder / file)
    check(folder)
    (folder / file).write_text(f"{'0' * 64}  best.safetensors\n")
    with pytest.raises(InputError, match=f"another checkpoint .*{re.escape(made.command)}"):
        check(folder)
    (folder / made.path).write_text("{}")
    assert "stale: it " in str(faults(folder))


def test_every_file_has_its_command():
    """A row of made.csv is a file, or a run's folder; the rest is named here, with its reason."""
    if not (COMMITTED.parent / ".git").exists():
        pytest.skip("only git knows which files are committed")
    known = {made.path for made in read_list(COMMITTED)}
    known |= {"made.csv", "README.md"}  # the list itself, and the page that shows it
    known |= {
        f"arenas/{name}/rules.sha256" for name in arenas()
    }  # notes of the runs, by `crt arena`
    listed = subprocess.run(
        ["git", "ls-files", "."], cwd=COMMITTED, capture_output=True, text=True, check=True
    ).stdout.split()
    files = [file for file in listed if (COMMITTED / file).exists()]
    assert [f for f in files if not {f, *map(str, Path(f).parents)} & known] == []


def test_no_command_sets_what_the_pipeline_does():
    for made in read_list(COMMITTED):
        words = shlex.split(made.command, comments=True)
        given = {word.partition("=")[0] for flag, word in pairwise(words) if flag == "-p"}
        assert not given.intersection(SET_BY_PIPELINE), made.command


def test_a_run_without_a_file_or_with_a_setting_that_is_gone(tmp_path):
    folder = results(tmp_path, ("run", "", "", "train"), ("run", "", "exits.csv", "train"))
    shutil.copytree(COMMITTED / "small/seeds/1", folder / "run")
    assert faults(folder) == [None, "missing: exits.csv"]
    config = json.loads((folder / "run/config.json").read_text())
    config["model"]["flux"] = 1
    (folder / "run/config.json").write_text(json.dumps(config))
    fault, _ = faults(folder)
    assert fault.startswith("stale: ") and "flux" in fault


def test_a_table_that_is_none(tmp_path):
    folder = results(tmp_path, ("t.csv", "run", "x", "bench"))
    for text in ("x\n1,2,3\n", "x\n1\n"):  # of the second there is no sum
        (folder / "t.csv").write_text(text)
        assert faults(folder)[0].startswith("stale: it cannot be read")


def test_a_search_lacks_the_trials_that_are_gone_or_were_changed(tmp_path):
    folder = results(tmp_path, ("search.csv", "", "", "search"))
    rows = read_rows(COMMITTED / "small/search.csv")
    wanted = [row for row in rows if row["budget"] == "3000 updates"]
    plan = [
        {"arm": row["arm"], "budget": row["budget"], "max_lr": row["max_lr"], "seeds": row["seed"]}
        for row in wanted
    ]
    write_rows(folder / "search_plan.csv", [row | {"documents": False} for row in plan])
    write_rows(folder / "search.csv", wanted)
    assert faults(folder) == [None]
    write_rows(folder / "search.csv", [*wanted[1:], wanted[0] | {"settings": "sother"}])
    assert faults(folder) == [f"missing: 1 of {len(wanted)} trainings, or changed"]
    assert sum(map(len, read_plan(folder / "search_plan.csv").values())) == len(wanted)


def test_what_is_missing_is_listed_made_once_a_command_and_not_again(tmp_path):
    write = f"echo called >> {tmp_path}/calls; for f in a b; do echo x > {tmp_path}/$f.csv; done"
    again = f"printf 'x\\n1\\n' > {tmp_path}/c.csv"
    folder = results(
        tmp_path, ("a.csv", "", "", write), ("b.csv", "", "", write), ("c.csv", "", "x", again)
    )
    said: list[str] = []
    assert remake(folder, run=False, echo=said.append) == 3
    assert len(said) == 4 and said[-1] == "0 of 3 are there; the others take 3 minutes"
    assert remake(folder, run=True, echo=said.append) == 0
    assert remake(folder, run=True, echo=said.append) == 0
    assert (folder / "calls").read_text() == "called\n"


def test_a_command_that_fails_ends_it_with_its_name(tmp_path):
    folder = results(tmp_path, ("a.csv", "", "", "exit 3"))
    with pytest.raises(InputError, match="failed: exit 3"):
        remake(folder, run=True, echo=lambda line: None)
    with pytest.raises(InputError, match=r"no .*made\.csv"):
        read_list(tmp_path / "nowhere")
