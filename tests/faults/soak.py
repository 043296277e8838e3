"""Soak: hours of generation, and a long training that is stopped often; memory stays flat."""

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import kills
import psutil
from base import Base
from harness import Case, Child, Kind, Lost, command, contents, same

ROWS, NEW, SEEDS = 8, 64, 12  # of a round of generation
UPDATES, STOPS, EVERY = 20_000, 12, 250  # of the training: SIGTERMs, updates between checkpoints
FLAT = 1.05  # of the largest of the first half; what memory may come to in the second


def kinds(base: Base, hours: float, seed: int) -> Iterator[Kind]:
    """The kinds of this module."""
    texts = Kind(
        f"soak: {hours:g} h of generation", "a seed's text stays what it was; memory flat", ()
    )
    texts.cases = [Case(f"{ROWS} rows", partial(generation, texts, hours * 3600))]
    yield texts
    trained = Kind("soak: a long training", "stopped or not, the same files; memory flat", ())
    trained.cases = [Case(f"{UPDATES} updates", partial(training, trained, base, seed))]
    yield trained


def generation(kind: Kind, seconds: float, folder: Path) -> None:
    """Rounds of sampled text, each of one of a few seeds, by the exit that `crt generate` takes."""
    child = Child(partial(write_texts, seconds, folder / "rounds.json"), folder)
    done = child.wait(seconds + 600)
    assert done.status == 0, done.err[-500:]
    rounds = json.loads((folder / "rounds.json").read_text())
    first: dict[int, str] = {}
    for number, (digest, _) in enumerate(rounds):
        if first.setdefault(number % SEEDS, digest) != digest:
            raise Lost(f"round {number} wrote another text than the first of its seed")
    kind.holds += f"; {len(rounds) * ROWS * NEW:,} tokens, {flat([at for _, at in rounds])}"


def write_texts(seconds: float, out: Path) -> None:
    """Write (digest, resident bytes) of each round to `out`."""
    from crt_lib import generate, load
    from crt_lib.exits.decode import Sampling
    from crt_lib.exits.policy import Policy

    model, tokenizer = load(kills.ROOT / "results/demo")
    words = tokenizer.encode("The river runs to the sea , and the town was built in 1843 . It")
    prompts = [list(words[: 3 + row]) for row in range(ROWS)]  # of every length
    policy, sampling = Policy(fixed=2), Sampling(temperature=1.0, top_p=0.9)
    process, end, rounds = psutil.Process(), time.monotonic() + seconds, []
    while time.monotonic() < end or len(rounds) < 2 * SEEDS:
        seed = len(rounds) % SEEDS
        texts = generate(model, prompts, NEW, policy=policy, sampling=sampling, seed=seed)
        said = json.dumps([text.tokens for text in texts]).encode()
        rounds.append((hashlib.sha256(said).hexdigest(), process.memory_info().rss))
    out.write_text(json.dumps(rounds))


def training(kind: Kind, base: Base, seed: int, folder: Path) -> None:
    """The training in one go, its memory read until its last update, after which it reads all rows.

    Then again, stopped by SIGTERM and gone on.
    """
    changes = [f"updates={UPDATES}", f"checkpoint_every={EVERY}", "eval_every=2000", "keep_every=0"]
    words = kills.train_words(folder / "run", base.corpus, *changes)
    begun, child, read = time.monotonic(), Child(command(*words), folder), []
    while (status := child.ended(0.5)) is None:
        resident = child.process.memory_info().rss
        if _updates_made(folder / "run/timing.jsonl") < UPDATES:
            read.append(resident)
    assert status == 0, child.said()
    seconds, whole = time.monotonic() - begun, contents(folder)
    shutil.rmtree(folder / "run")
    rng, stopped = random.Random(seed), 0
    while stopped < STOPS:
        child = Child(command(*words), folder)
        status = child.ended(rng.uniform(0.5, 1) * seconds / STOPS)
        if status is not None:
            assert status == 0, child.said()
            break
        child.stop(signal.SIGTERM)
        stopped += 1
    done = Child(command(*words), folder).wait()
    assert done.status == 0, done.err[-500:]
    same(folder, whole, f"after {stopped} stops:")
    kind.holds += f"; {UPDATES:,} updates, {stopped} stops, {flat(read)}"


def _updates_made(timing: Path) -> int:
    """The update of the last whole row of a timing.jsonl; 0 without one."""
    if not timing.exists():
        return 0
    rows = timing.read_bytes()[-1000:].splitlines(keepends=True)
    whole = [row for row in rows[1:] if row.endswith(b"\n")]
    return json.loads(whole[-1])["update"] if whole else 0


def flat(resident: list[int]) -> str:
    """Memory at the ends in words; AssertionError where the second half is above FLAT."""
    start, half = len(resident) // 20, len(resident) // 2  # what it begins with, left out
    before, after = max(resident[start:half]), max(resident[half:])
    begun, most = resident[start] / 2**20, after / 2**20
    said = f"{begun:.0f} MiB at 5 % of the time, at most {most:.0f} in the second half"
    assert after <= FLAT * before, f"memory grows: {said}"
    return said
