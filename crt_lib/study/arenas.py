"""The arenas: one looped block against what people would use instead, by rules fixed beforehand.

The rules stand in results/arenas/rules.md. Every arm of an arena has the same tries to tune it,
the same seeds, which the tuning did not see, and the same data in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.study.ladder import Changes, changed
from crt_lib.study.search import NEVER
from crt_lib.study.trial import Trial
from crt_lib.text.lookup import LENGTH, STEPS, WORDS

SEEDS = (1, 2, 3)
TUNED_WITH = 0  # the seed of the tries
OURS = "crt2"
TWIN = "GPT-2, equal multiply-adds"
ONE_LOOP = {"n_loops": 1, "exit_loops": ()}
RATES: Changes = {f"rate {rate:g}": {"max_lr": rate} for rate in (4e-3, 8e-3, 1.6e-2, 3.2e-2)}
LITTLE = {"batch_size": 32, "weight_decay": 0.1}  # where a text is read many times
# the rate that was best for an arm in `fresh`, for the arenas that tune something else
RATES_OF_FRESH = {
    OURS: 1.6e-2,
    TWIN: 8e-3,
    "GPT-2, equal parameters": 8e-3,
    "unshared blocks": 1.6e-2,
    "one loop": 1.6e-2,
    "one wide loop": 8e-3,
}
LENGTHS = (460, 920, 1_840)  # updates
BEGIN = 0.35  # of the updates: when the further loops of LATE begin
LATE = f"4 loops from {BEGIN:.0%} on"
DEPTHS: Changes = {
    "1 loop": ONE_LOOP,
    "2 loops": {"n_loops": 2, "exit_loops": (1,)},
    "4 loops": {},
    LATE: {"loop_starts": (BEGIN,)},
}


@dataclass(frozen=True)
class Arena:
    """One question: the arms, what is tried to tune each, and how long that and the runs take."""

    question: str
    arms: dict[str, Profile]  # OURS and what it is held against
    tuning_updates: int = 0  # of a try; 0: those of its profile, as a run has
    documents: bool = True  # whether test is scored by document; else by kind of question
    # arms whose updates are timed beside those of OURS, which is trained also in their time where
    # they are faster
    timed: tuple[str, ...] = ()
    tries: Changes = field(default_factory=lambda: RATES)
    # the arena that this one asks again, with tries that are whole trainings of the first seed; no
    # training that was made there, or here before that rule, is made again
    again: str = ""

    def tuning(self) -> dict[str, list[Trial]]:
        """The tries of each arm."""
        made: dict[str, list[Trial]] = {arm: [] for arm in self.arms}
        for arm, profile in self.arms.items():
            for name, settings in self.tries.items():
                if self.again:
                    whole = _tried(profile, {**settings, "seed": SEEDS[0]})
                    made[arm].append(Trial(arm, whole))
                    continue
                updates = self.tuning_updates or profile.train.updates
                short = {**settings, "updates": updates, "seed": TUNED_WITH}
                short |= {"checkpoint_every": NEVER}
                made[arm].append(Trial(f"{arm}, {name}", _tried(profile, short)))
        return made

    def runs(self, tuned: dict[str, str]) -> dict[str, list[Trial]]:
        """Each arm's runs, with the best of its tries."""
        made: dict[str, list[Trial]] = {}
        for arm, best in tuned.items():
            settings = self.tries[best]
            made[arm] = [
                Trial(arm, _tried(self.arms[arm], {**settings, "seed": seed})) for seed in SEEDS
            ]
        return made

    def in_time(self, best: str, seconds: Mapping[str, float]) -> dict[str, list[Trial]]:
        """OURS with its `best` try and fewer updates, in the time of each faster one of `timed`.

        `seconds`: of an update, by arm. The names are those of `in_time_of`.
        """
        made: dict[str, list[Trial]] = {}
        for arm in self.timed:
            share = seconds[arm] / seconds[OURS]
            if share < 1:
                updates = round(share * (self.arms[OURS].train.updates or 0))
                short = {**self.tries[best], "updates": updates}
                made[in_time_of(arm)] = [
                    Trial(in_time_of(arm), _tried(self.arms[OURS], {**short, "seed": seed}))
                    for seed in SEEDS
                ]
        return made


def in_time_of(arm: str) -> str:
    """The name of the runs of OURS that are as long as those of `arm`."""
    return f"{OURS}, in the time of {arm}"


def length_arm(depth: str, updates: int) -> str:
    """The name of an arm of `lengths`."""
    return f"{depth}, {updates:,} updates"


def _ours() -> dict[str, Profile]:
    """`crt2` as it is in the arenas, by their text."""
    base = changed(load_profile("quick"), {"updates": 7_350, "eval_every": 0})
    base = changed(base, {"checkpoint_every": 250, "vocab_size": 2048, "precision": "bf16"})
    with_prelude = {"n_prelude": 1, "aux_weight": 0.1}
    prose = changed(base.replace(corpus="prose"), with_prelude)
    little = changed(prose.replace(corpus="wikitext-2"), {**LITTLE, "updates": 4_290})
    larger = changed(
        little.replace(tokenizer="bpe:4096"),
        {"d_model": 240, "embed_dim": 240, "n_heads": 6, "vocab_size": 4096}
        | {"updates": 4_460, "max_lr": 1e-2},
    )
    lookup = changed(
        base.replace(corpus="lookup", tokenizer="word"),
        {"d_model": 64, "embed_dim": 64, "n_cycles": 1, "max_seq_len": 96, "conv_noise": 0.6}
        | {"batching": "padded", "seq_len": LENGTH, "batch_size": 16, "updates": 6_000}
        | {"exits_trained": "all", "aux_weight": 0.5, "precision": "fp32"}
        | {"vocab_size": WORDS + STEPS},
    )
    return {"fresh": prose, "few": little, "few-4m": larger, "lookup": lookup}


def arenas() -> dict[str, Arena]:
    """Every arena by name."""
    ours = _ours()
    prose, few = _arms(ours["fresh"]), _arms(ours["few"])
    few = {arm: changed(profile, {"max_lr": RATES_OF_FRESH[arm]}) for arm, profile in few.items()}
    larger = changed(_gpt2(ours["few-4m"], 240, 8), {"max_lr": 4e-3})
    return {
        "fresh": Arena(
            "One pass over fresh text: does looping pay where nothing can be learned by heart?",
            prose,
            tuning_updates=700,
            timed=(TWIN, "one loop"),
        ),
        "fresh-2": Arena(
            "The same with every arm's rate chosen on whole trainings: does looping pay then?",
            prose,
            timed=(TWIN, "one loop"),
            tries={name: RATES[name] for name in ("rate 0.008", "rate 0.016")},
            again="fresh",
        ),
        "lengths": Arena(
            "How long must a training be for a loop to pay, at equal tokens and in equal time?",
            {
                length_arm(name, updates): changed(ours["fresh"], {**depth, "updates": updates})
                for name, depth in DEPTHS.items()
                for updates in LENGTHS
            },
            timed=tuple(length_arm(depth, LENGTHS[0]) for depth in DEPTHS if depth != LATE),
            tries={name: RATES[name] for name in ("rate 0.008", "rate 0.016")},
            again="lengths",
        ),
        "few": Arena(
            "Many passes through little text: does a shared block learn less of it by heart?",
            few,
            tries=_dropouts(0.0, 0.1),
        ),
        "few-4m": Arena(
            "How well does a model of four million parameters read WikiText-2?",
            {OURS: ours["few-4m"], TWIN: larger},
            tries=_dropouts(0.1, 0.2),
        ),
        "lookup": Arena(
            "A language that needs k look-ups in a row: does a loop learn one of them?",
            _arms(ours["lookup"], wide=112, layers=(5, 2), narrow=56),
            tuning_updates=750,
            documents=False,
        ),
    }


def _arms(
    ours: Profile, *, wide: int = 192, layers: tuple[int, int] = (8, 4), narrow: int = 124
) -> dict[str, Profile]:
    """OURS, and of equal multiply-adds: `layers[0]` layers of a GPT-2, as many blocks of their own
    weights, one loop `wide` features wide; of equal parameters: one loop, and `layers[1]` layers of
    a GPT-2 `narrow` wide.
    """
    model = ours.model
    assert isinstance(model, ModelConfig)  # it is a CRT
    unshared = {**ONE_LOOP, "n_prelude": model.n_prelude + model.n_loops - 1}
    return {
        OURS: ours,
        TWIN: _gpt2(ours, model.d_model, layers[0]),
        "GPT-2, equal parameters": _gpt2(ours, narrow, layers[1]),
        "unshared blocks": changed(ours, unshared),
        "one loop": changed(ours, ONE_LOOP),
        "one wide loop": changed(ours, {**ONE_LOOP, "d_model": wide, "embed_dim": wide}),
    }


def _dropouts(*shares: float) -> Changes:
    """Tries of these rates of dropout, of the embedding too."""
    return {f"dropout {p:g}": {"dropout": p, "embed_dropout": p} for p in shares}


def _tried(profile: Profile, settings: dict[str, Any]) -> Profile:
    """`changed`, without a dropout of the embedding where the model has but one rate."""
    if not hasattr(profile.model, "embed_dropout"):
        settings = {name: of for name, of in settings.items() if name != "embed_dropout"}
    return changed(profile, settings)


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
