"""SIGKILL, SIGTERM and Ctrl-C at random moments of commands that write."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import STOPPING, Case, Child, Kind, Lost, command, contents, same

from crt_lib.checkpoint import read_metrics, read_state
from crt_lib.files import locked

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
SMOKE = ("--profile", "smoke")
OFTEN = ("updates=30", "checkpoint_every=3", "eval_every=5", "keep_every=10")
TABLES = ("policies.csv", "depth.csv")  # that `crt explore` makes of traces
OLD_TABLE = b"policy,loss\nold,1.0\n"
CHAIN = 3  # kills, at most, until a folder is left to end
TRAIN_IN_A_NOTEBOOK = """\
from crt_lib import load_profile
from crt_lib.runs.run import run_profile
profile = load_profile('smoke')
profile = profile.replace(train=profile.train.replace(updates=20, checkpoint_every=2, seed=seed))
run = run_profile(profile, results + '/run', progress=False)
assert run is not None"""


@dataclass
class Subject:
    """A command that is killed: what its folder holds before, and its words."""

    name: str
    prepare: Callable[[Path], None]
    words: Callable[[Path], list[str]]
    share: int  # of a hundred kills
    patch: Callable[[Path], None] | None = None
    # what must hold after each kill, of the folder and of what an undisturbed one holds
    holds: Callable[[Path, dict[str, str]], None] | None = None

    @property
    def short(self) -> str:
        """Its name as a folder's."""
        return "-".join(re.findall(r"\w+", self.name))

    def begin(self, folder: Path) -> Child:
        """The command, begun in `folder`."""
        patch = self.patch and partial(self.patch, folder)
        return Child(command(*self.words(folder), patch=patch), folder)


def text(folder: Path) -> None:
    """A small corpus."""
    rng = random.Random(0)
    words = ["the", "river", "runs", "to", "a", "sea", "slowly"]
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in (("train", 400), ("valid", 80), ("test", 80)):
        sentences = [" ".join(rng.choices(words, k=9)) for _ in range(lines)]
        (folder / f"{split}.txt").write_text("\n\n".join(sentences) + "\n\n")


def train_words(out: Path, corpus: Path, *changes: str) -> list[str]:
    """Of a short training of a BPE model on `corpus`."""
    sets = [f"--set=train.{change}" for change in (*OFTEN, *changes)]
    where = ["--corpus", str(corpus), "--tokenizer", "bpe:300", "--out", str(out)]
    return ["train", *SMOKE, "--quiet", *where, *sets]


def smoke_arms(_: Path) -> None:
    """Two arms of the smoke profile for `crt search`, whose own take minutes each."""
    from crt_lib import load_profile
    from crt_lib.study import ladder

    arms = {name: load_profile("smoke", name) for name in ("crt2", "paper")}
    ladder.choose_arms = lambda names: {name: arms[name] for name in names}


def tiny_arena(corpus: Path, _: Path) -> None:
    """An arena of two arms on `corpus`."""
    from crt_lib import load_profile
    from crt_lib.study import arenas
    from crt_lib.study.ladder import changed

    base = load_profile("smoke").replace(corpus=str(corpus), tokenizer="bpe:300")
    base = changed(base, {"updates": 12, "seq_len": 16, "batch_size": 2, "vocab_size": 300})
    arms = {arenas.OURS: base, "one loop": changed(base, {"n_loops": 1, "exit_loops": ()})}
    tries = {f"rate {rate:g}": {"max_lr": rate} for rate in (1e-4, 1e-2)}
    made = arenas.Arena("Which?", arms, tuning_updates=2, tries=tries)
    arenas.arenas = lambda: {"tiny": made}


def arena_rules(folder: Path) -> None:
    """The rules that it runs by."""
    (folder / "rules.md").write_text("# Rules\n\n## tiny\n\nnone\n")


def notebook(folder: Path, name: str = "01_train") -> None:
    """A notebook that trains."""
    from tiny_notebooks import write_notebook

    parameters = "profile: str = ''\nresults: str = ''\nfresh: bool = False\nseed: int = 0"
    write_notebook(folder / "books", name, TRAIN_IN_A_NOTEBOOK, parameters=parameters)


def two_notebooks(folder: Path) -> None:
    """Two of them; the second finds what the first has trained."""
    notebook(folder)
    notebook(folder, "02_again")


def of_results(folder: Path) -> None:
    """The results that claims are held against; links, which a command replaces, not changes."""

    def link(source: str, target: str) -> None:
        Path(target).symlink_to(source)

    shutil.copytree(ROOT / "results", folder / "results", copy_function=link)


def subjects(run: Path, corpus: Path) -> list[Subject]:
    """Every command that is killed; `run`: a finished training on `corpus`."""

    def copy(folder: Path) -> None:
        shutil.copytree(run, folder / "run")

    def with_tables(folder: Path) -> None:
        """As a checkout has it: tables of traces that are not there."""
        copy(folder)
        for name in TABLES:
            (folder / "run" / name).write_bytes(OLD_TABLE)

    def nothing(_: Path) -> None:
        """An empty folder."""

    def search(f: Path) -> list[str]:
        how = ["--lr", "1e-3", "--seed", "0", "--seed", "1", "--updates", "4", "--jobs", "2"]
        return ["search", "crt2", "paper", *how, "--out", str(f / "search.csv")]

    def sweep(f: Path) -> list[str]:
        where = ["--notebooks", str(f / "books"), "--out", str(f / "out")]
        return ["sweep", "01", "--grid", "seed=0,1", *SMOKE, *where, "--jobs", "2"]

    def reproduce(f: Path) -> list[str]:
        return ["reproduce", *SMOKE, "--notebooks", str(f / "books"), "--out", str(f / "out")]

    def arena(f: Path) -> list[str]:
        return ["arena", "tiny", "--out", str(f)]

    tiny = partial(tiny_arena, corpus)
    return [
        Subject("train", nothing, lambda f: train_words(f / "run", corpus), 40),
        Subject("search", nothing, search, 8, smoke_arms),
        Subject("arena", arena_rules, arena, 8, tiny),
        Subject("sweep", notebook, sweep, 8),
        Subject("reproduce", two_notebooks, reproduce, 3),
        Subject("export", copy, lambda f: ["export", str(f / "run"), str(f / "hf")], 10),
        Subject("explore --html", copy, explore, 8),
        Subject("explore --html, tables kept", with_tables, explore, 4, holds=tables_stand),
        Subject("claims", of_results, lambda f: ["claims", "--results", str(f / "results")], 11),
    ]


def tables_stand(folder: Path, whole: dict[str, str]) -> None:
    """Each table is the old one or the new one, and beside new traces only the new one."""
    found = contents(folder)
    for name in (f"run/{name}" for name in TABLES):
        new = found.get(name) == whole[name]
        if not new and (name not in found or (folder / name).read_bytes() != OLD_TABLE):
            raise Lost(f"{name} is neither the old table nor the new one")
        if not new and "run/traces/test.safetensors" in found:
            raise Lost(f"{name} is of other traces than those beside it")


def at(folder: Path) -> None:
    """Work in that folder."""
    os.chdir(folder)


def explore(folder: Path) -> list[str]:
    """The page of the run in `folder`."""
    return ["explore", str(folder / "run"), "--html", str(folder / "page.html")]


def undisturbed(subject: Subject, kept: Path) -> tuple[dict[str, str], float]:
    """What the command leaves, and its seconds; of one run in `kept` for all who ask."""
    made = kept / f"{subject.short}.json"
    with locked(made):
        if not made.exists():
            folder = kept / subject.short
            folder.mkdir()
            subject.prepare(folder)
            begun = time.monotonic()
            done = subject.begin(folder).wait()
            assert done.status == 0, f"{subject.name}, undisturbed: {done.err[-500:]}"
            seconds = time.monotonic() - begun
            made.write_text(json.dumps([contents(folder), seconds]))
    whole, seconds = json.loads(made.read_text())
    return whole, seconds


def sigkills(subject: Subject, kills: int, seed: int, kept: Path) -> Kind:
    """`kills` SIGKILLs at random moments; a folder is left to end after at most CHAIN of them.

    `kept`: of `undisturbed`.
    """

    def cases() -> Iterator[Case]:
        whole, seconds = undisturbed(subject, kept)
        rng = random.Random(f"{seed} {subject.name}")

        def chain(faults: int, folder: Path) -> None:
            done, moments = 0, []
            for number in itertools.count():
                own = folder / f"{number}"
                own.mkdir()
                subject.prepare(own)
                while done < faults:
                    child = subject.begin(own)
                    moments.append(round(rng.uniform(0, seconds), 2))
                    status = child.ended(moments[-1])
                    if status is not None:
                        break
                    child.kill()
                    done += 1
                    if subject.holds:
                        subject.holds(own, whole)
                end = subject.begin(own).wait()
                assert end.status == 0, f"after kills at {moments} s: {end.err[-300:]}"
                same(own, whole, f"after kills at {moments} s:")
                if done == faults:
                    return

        for begin in range(0, kills, CHAIN):
            faults = min(CHAIN, kills - begin)
            yield Case(f"kills {begin + 1} to {begin + faults}", partial(chain, faults), faults)

    holds = "the same command goes on to the same files, bit for bit; nothing it started lives on"
    if subject.holds:
        holds += "; after each kill the old tables or the new ones"
    return Kind(f"SIGKILL: `crt {subject.name}`", holds, cases())


def stops(subject: Subject, seed: int, kept: Path) -> Kind:
    """SIGTERM and Ctrl-C, each at a random moment; `kept`: of `undisturbed`."""

    def cases() -> Iterator[Case]:
        rng = random.Random(f"{seed} {subject.name}")
        whole, seconds = undisturbed(subject, kept)
        for number in (signal.SIGTERM, signal.SIGINT):
            if seconds < 1:
                yield Case("it ends in under a second", lambda _: None, 0)
                break
            case = partial(stop, subject, number, rng.uniform(0.3, 0.8) * seconds, whole)
            yield Case(number.name, case)

    holds = f"out in {STOPPING:g} s, the state saved; goes on to the same"
    return Kind(f"SIGTERM, Ctrl-C: `crt {subject.name}`", holds, cases(), alone=True)


def stop(
    subject: Subject, number: signal.Signals, moment: float, whole: dict[str, str], folder: Path
) -> None:
    """Stop the command after `moment` seconds, then let it end."""
    subject.prepare(folder)
    child = subject.begin(folder)
    if child.ended(moment) is None:
        taken, done = child.stop(number)
        assert "Traceback" not in done.err, f"a traceback: {done.err[-300:]}"
        if done.status == 0:  # it was at its end
            same(folder, whole, "status 0, though it was stopped:")
        assert taken < STOPPING, f"{taken:.1f} s until it had stopped"
        if subject.name == "train":
            kept = read_state(folder / "run/checkpoints/last.safetensors")["update"]
            made = read_metrics(folder / "run")[-1]["update"]
            if kept != made:
                raise Lost(f"{made} updates were made, {kept} are kept")
    end = subject.begin(folder).wait()
    assert end.status == 0, f"stopped after {moment:.2f} s: {end.err[-300:]}"
    same(folder, whole, f"stopped after {moment:.2f} s:")
