"""The arenas: one looped block against what people would use instead, by rules fixed beforehand.

The rules stand in results/arenas/rules.md; arenas.toml, beside this file, has the arms. Every arm
of an arena has the same tries to tune it, the same seeds, which the tuning did not see, and the
same data in the same order.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crt_lib.config import GPT2Config
from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.study.ladder import Changes, changed
from crt_lib.study.search import NEVER
from crt_lib.study.trial import Trial

SEEDS = (1, 2, 3)
TUNED_WITH = 0  # the seed of the tries
OURS = "crt2"
TWIN = "GPT-2, equal multiply-adds"
LISTED = tomllib.loads(Path(__file__).with_name("arenas.toml").read_text(encoding="utf-8"))
LIKE_OURS = ("vocab_size", "n_heads", "max_seq_len", "dropout")  # of a GPT-2


@dataclass(frozen=True)
class Arena:
    """One question: the arms, what is tried to tune each, and how long that and the runs take."""

    question: str
    arms: dict[str, Profile]  # OURS and what it is held against
    tries: Changes
    tuning_updates: int = 0  # of a try; 0: those of its profile, as a run has
    documents: bool = True  # whether test is scored by document; else by kind of question
    # arms whose updates are timed beside those of OURS, which is trained also in their time where
    # they are faster
    timed: Sequence[str] = ()
    # the arena that this one asks again, with tries that are whole trainings of the first seed; no
    # training that was made there, or here before that rule, is made again
    again: str = ""
    # what a try changes of an arm beside what it changes of all
    shapes: Mapping[str, Changes] = field(default_factory=dict)

    def tuning(self) -> dict[str, list[Trial]]:
        """The tries of each arm."""
        return {arm: [self._try(arm, name) for name in self.tries] for arm in self.arms}

    def _try(self, arm: str, name: str) -> Trial:
        profile, settings = self.arms[arm], self.settings(arm, name)
        if self.again:
            return Trial(arm, _tried(profile, {**settings, "seed": SEEDS[0]}))
        updates = self.tuning_updates or profile.train.updates
        short = {"updates": updates, "seed": TUNED_WITH, "checkpoint_every": NEVER}
        return Trial(f"{arm}, {name}", _tried(profile, settings | short))

    def settings(self, arm: str, name: str) -> dict[str, Any]:
        """What the try of that name changes of an arm."""
        return self.tries[name] | self.shapes.get(arm, {}).get(name, {})

    def shaped(self, arm: str, name: str) -> Profile:
        """An arm with the try of that name."""
        return _tried(self.arms[arm], self.settings(arm, name))

    def runs(self, tuned: dict[str, str]) -> dict[str, list[Trial]]:
        """Each arm's runs, with the best of its tries."""
        return {a: _seeds(a, self.arms[a], self.settings(a, best)) for a, best in tuned.items()}

    def in_time(self, best: str, seconds: Mapping[str, float]) -> dict[str, list[Trial]]:
        """OURS with its `best` try and fewer updates, in the time of each faster one of `timed`.

        `seconds`: of an update, by arm. The names are those of `in_time_of`.
        """
        made, ours = {}, self.arms[OURS]
        for arm in self.timed:
            share, name = seconds[arm] / seconds[OURS], in_time_of(arm)
            if share < 1:
                updates = round(share * (ours.train.updates or 0))
                made[name] = _seeds(name, ours, {**self.settings(OURS, best), "updates": updates})
        return made


def _seeds(arm: str, profile: Profile, settings: dict[str, Any]) -> list[Trial]:
    """A training with each of SEEDS."""
    return [Trial(arm, _tried(profile, {**settings, "seed": seed})) for seed in SEEDS]


def in_time_of(arm: str) -> str:
    """The name of the runs of OURS that are as long as those of `arm`."""
    return f"{OURS}, in the time of {arm}"


def arenas() -> dict[str, Arena]:
    """Every arena by name."""
    base, made = changed(load_profile("quick"), LISTED["base"]), {}
    for name, said in LISTED["arenas"].items():
        before = LISTED["arenas"][said.get("again", said.get("like", name))]
        of = {of: value for of, value in (before | said).items() if of != "like"}
        ours = changed(base, before["ours"] | of.pop("ours"))
        arms = {arm: _arm(ours, settings) for arm, settings in of.pop("arms").items()}
        made[name] = Arena(arms=arms, **of)
    return made


def _arm(ours: Profile, settings: dict[str, Any]) -> Profile:
    if "n_layers" in settings:
        like = {name: getattr(ours.model, name) for name in LIKE_OURS}
        ours = ours.replace(model=GPT2Config(**like))
    return changed(ours, settings)


def _tried(profile: Profile, settings: dict[str, Any]) -> Profile:
    """`changed`, without a dropout of the embedding where the model has but one rate."""
    if not hasattr(profile.model, "embed_dropout"):
        settings = {name: of for name, of in settings.items() if name != "embed_dropout"}
    return changed(profile, settings)


def find_arena(name: str) -> Arena:
    """The arena of that name; raises InputError for an unknown one."""
    known = arenas()
    if name not in known:
        raise InputError(f"unknown arena {name!r}; choose one of {', '.join(known)}")
    return known[name]
