"""The arenas: one looped block against what people would use instead, by rules fixed beforehand.

The rules stand in results/arenas/rules.md. Every arm of an arena has the same tries to tune it,
the same seeds, which the tuning did not see, and the same data in the same order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crt_lib.bench.table import rows_of
from crt_lib.config import GPT2Config
from crt_lib.files import InputError, sha256, write_text
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.study.ladder import Changes, changed
from crt_lib.study.search import NEVER, search
from crt_lib.study.trial import Row, Trial
from crt_lib.text.lookup import LENGTH, STEPS, WORDS

SEEDS = (1, 2, 3)
TUNED_WITH = 0  # the seed of the tries
OURS = "crt2"
ONE_LOOP = {"n_loops": 1, "exit_loops": ()}
RATES: Changes = {f"rate {rate:g}": {"max_lr": rate} for rate in (4e-3, 8e-3, 1.6e-2, 3.2e-2)}


@dataclass(frozen=True)
class Arena:
    """One question: the arms, what is tried to tune each, and how long that and the runs take."""

    question: str
    arms: dict[str, Profile]  # OURS and what it is held against
    tuning_updates: int  # of a try; a run has those of its profile
    documents: bool = True  # whether test is scored by document; else by kind of question
    tries: Changes = field(default_factory=lambda: RATES)

    def tuning(self) -> dict[str, list[Trial]]:
        """The tries of each arm."""
        made: dict[str, list[Trial]] = {arm: [] for arm in self.arms}
        for arm, profile in self.arms.items():
            for name, settings in self.tries.items():
                short = {**settings, "updates": self.tuning_updates, "seed": TUNED_WITH}
                short |= {"checkpoint_every": NEVER}
                made[arm].append(Trial(f"{arm}, {name}", changed(profile, short)))
        return made

    def runs(self, tuned: dict[str, str]) -> dict[str, list[Trial]]:
        """Each arm's runs, with the best of its tries."""
        made: dict[str, list[Trial]] = {}
        for arm, best in tuned.items():
            settings = self.tries[best]
            made[arm] = [
                Trial(arm, changed(self.arms[arm], {**settings, "seed": seed})) for seed in SEEDS
            ]
        return made


def arenas() -> dict[str, Arena]:
    """Every arena by name."""
    fresh = changed(load_profile("quick"), {"updates": 7_350, "eval_every": 0})
    fresh = changed(fresh, {"checkpoint_every": 250, "vocab_size": 2048, "precision": "bf16"})
    lookup = changed(
        fresh.replace(corpus="lookup", tokenizer="word"),
        {"d_model": 64, "embed_dim": 64, "n_cycles": 1, "max_seq_len": 96, "conv_noise": 0.6}
        | {"batching": "padded", "seq_len": LENGTH, "batch_size": 16, "updates": 6_000}
        | {"exits_trained": "all", "aux_weight": 0.5, "precision": "fp32"}
        | {"vocab_size": WORDS + STEPS},
    )
    return {
        "fresh": Arena(
            "One pass over fresh text: does looping pay where nothing can be learned by heart?",
            _arms(fresh.replace(corpus="prose"), wide=224, layers=(7, 2), narrow=132),
            tuning_updates=920,
        ),
        "lookup": Arena(
            "A language that needs k look-ups in a row: does a loop learn one of them?",
            _arms(lookup, wide=112, layers=(5, 2), narrow=56),
            tuning_updates=750,
            documents=False,
        ),
    }


def _arms(ours: Profile, *, wide: int, layers: tuple[int, int], narrow: int) -> dict[str, Profile]:
    """OURS, and of equal multiply-adds: `layers[0]` layers of a GPT-2, as many blocks of their own
    weights, one loop `wide` features wide; of equal parameters: one loop, and `layers[1]` layers of
    a GPT-2 `narrow` wide.
    """
    model, loops = ours.model, ours.model.n_loops
    unshared = {**ONE_LOOP, "n_prelude": loops - 1}
    return {
        OURS: ours,
        "GPT-2, equal multiply-adds": _gpt2(ours, model.d_model, layers[0]),
        "GPT-2, equal parameters": _gpt2(ours, narrow, layers[1]),
        "unshared blocks": changed(ours, unshared),
        "one loop": changed(ours, ONE_LOOP),
        "one wide loop": changed(ours, {**ONE_LOOP, "d_model": wide, "embed_dim": wide}),
    }


def _gpt2(like: Profile, width: int, layers: int) -> Profile:
    model = GPT2Config(
        vocab_size=like.model.vocab_size,
        d_model=width,
        n_heads=like.model.n_heads,
        n_layers=layers,
        max_seq_len=like.model.max_seq_len,
        dropout=like.model.dropout,
    )
    return like.replace(model=model)


def find_arena(name: str) -> Arena:
    """The arena of that name; raises InputError for an unknown one."""
    known = arenas()
    if name not in known:
        raise InputError(f"unknown arena {name!r}; choose one of {', '.join(known)}")
    return known[name]


def run_arena(
    name: str,
    folder: Path,
    *,
    jobs: int = 1,
    new_rules: bool = False,
    only: Sequence[str] = (),
    echo: Callable[[str], None] = print,
) -> list[Row]:
    """Tune every arm of an arena and run it with every seed; the rows of `folder`/`name`/runs.csv.

    What is there is not made again, and a training that was stopped goes on. `only`: these arms.
    The rules are `folder`/rules.md: raises InputError when they are not what they were when the
    arena's runs began (unless `new_rules`), for an unknown arena or arm, and as `search`.
    """
    arena, own = find_arena(name), folder / name
    for arm in only:
        if arm not in arena.arms:
            raise InputError(f"unknown arm {arm!r} of {name}; choose from {', '.join(arena.arms)}")
    keep_rules(folder, name, new_rules)
    how: dict[str, Any] = {"jobs": jobs, "threads": 1, "echo": echo, "keep": own / "checkpoints"}
    tries = {arm: t for arm, t in arena.tuning().items() if not only or arm in only}
    search([t for trials in tries.values() for t in trials], own / "tuning.csv", **how)
    runs = arena.runs({arm: best_try(own, arena, arm) for arm in tries})
    # seed by seed, so that what is there first can be compared
    ordered = [trials[i] for i in range(len(SEEDS)) for trials in runs.values()]
    return search(ordered, own / "runs.csv", documents=arena.documents, **how)


def keep_rules(folder: Path, name: str, new_rules: bool = False) -> None:
    """Note the rules that an arena's runs begin under; raises InputError when they were others.

    They are what rules.md says of all arenas, and its section on this one. rules.sha256 has a line
    for each version that runs were made under.
    """
    rules, note = folder / "rules.md", folder / name / "rules.sha256"
    if not rules.is_file():
        raise InputError(f"no {rules}; an arena runs by the rules that are written there")
    general, *sections = rules.read_text(encoding="utf-8").split("\n## ")
    of_arena = [section for section in sections if section.split()[:1] == [name]]
    if not of_arena:
        raise InputError(f"{rules} has no section {name!r}; write its rules before its runs")
    now = sha256("\n## ".join([general, *of_arena]).encode())
    before = note.read_text().splitlines() if note.is_file() else []
    begun = before or any((folder / name / table).exists() for table in ("tuning.csv", "runs.csv"))
    if begun and before[-1:] != [now] and not new_rules:
        raise InputError(
            f"{rules} does not say of {name} what it said when its runs began; restore it and "
            f"{note.name}, or write there why it changed and give --new-rules"
        )
    if before[-1:] != [now]:
        write_text(note, "\n".join([*before, now]) + "\n")


def best_try(own: Path, arena: Arena, arm: str) -> str:
    """The try of an arm with the lowest loss on all of valid; raises InputError before all ran."""
    rows = rows_of(own / "tuning.csv")
    found = {
        name: row["valid_loss"]
        for name, trial in zip(arena.tries, arena.tuning()[arm], strict=True)
        if (row := trial.row(rows))
    }
    if len(found) < len(arena.tries):
        raise InputError(f"{arm} has {len(found)} of its {len(arena.tries)} tries; run the arena")
    return min(found, key=found.__getitem__)


def ran(name: str, folder: Path) -> dict[str, list[tuple[Trial, Row]]]:
    """The runs of each arm of an arena that are in `folder`/`name`/runs.csv, with their rows.

    Without those that broke, and those of an arm as it was before.
    """
    arena, own = find_arena(name), folder / name
    rows = rows_of(own / "runs.csv")
    begun = [arm for arm in arena.arms if any(row["arm"] == arm for row in rows)]
    runs = arena.runs({arm: best_try(own, arena, arm) for arm in begun})
    found = {arm: [(t, row) for t in of if (row := t.row(rows))] for arm, of in runs.items()}
    whole = {arm: [r for r in of if r[1]["valid_loss"] < math.inf] for arm, of in found.items()}
    return {arm: of for arm, of in whole.items() if of}
