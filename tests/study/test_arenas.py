"""Arenas: every arm is treated alike, rules come before runs, and what was stopped goes on."""

from dataclasses import replace

import numpy as np
import pytest

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.runs.manifest import checkout_root
from crt_lib.runs.profiles import load_profile
from crt_lib.study import arena_runs, arenas, search as search_module
from crt_lib.study.arena_runs import best_try, keep_rules, run_arena
from crt_lib.study.arenas import OURS, Arena, find_arena, in_time_of
from crt_lib.study.ladder import changed
from crt_lib.study.search import documents_file
from crt_lib.study.standings import standings
from crt_lib.study.trial import run_trial
from crt_lib.text import lookup

NAMES = [name for name, arena in arenas.arenas().items() if OURS in arena.arms]
MEGABYTES = {f"bytes-{size}": size for size in (2, 4, 8)}  # of weights, by arena
LONGER = {"bytes-2-time"}  # each arm as long as OURS, not on as many tokens
FRESH = checkout_root() / "results/arenas/fresh"
RULES = "# Rules\n\nof all\n\n## \n\n## here\n\none\n\n## there\n\ntwo\n"


def at_use(profile) -> int:
    model = profile.model
    return sum(multiply_adds(model, profile.train.seq_len, (model.n_loops,)).values())


def size(profile) -> int:
    return sum(parameters_by_part(profile.model).values())


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(MEGABYTES) - LONGER))
def test_arms_are_as_large_or_compute_as_much_as_they_are_named(name):
    arms = find_arena(name).arms
    ours = arms[OURS]
    for arm in {"GPT-2, equal multiply-adds", "unshared blocks", "one wide loop"} & set(arms):
        assert at_use(arms[arm]) == pytest.approx(at_use(ours), rel=0.1), arm
    for arm in {"GPT-2, equal parameters", "one loop"} & set(arms):
        assert size(arms[arm]) == pytest.approx(size(ours), rel=0.1), arm
    if "unshared blocks" in arms:
        assert size(arms["unshared blocks"]) > 1.9 * size(ours)


@pytest.mark.parametrize("name", MEGABYTES)
def test_every_shape_of_an_arena_of_bytes_fits_and_none_wastes_a_tenth(name):
    arena = find_arena(name)
    assert set(arena.shapes) == set(arena.arms)
    for arm, shapes in arena.shapes.items():
        assert set(shapes) == set(arena.tries)
        for shape in shapes:
            bytes_of = 4 * size(arena.shaped(arm, shape))
            assert 0.9 < bytes_of / MEGABYTES[name] / 1e6 <= 1, (arm, shape)


def test_in_the_time_of_ours_each_arm_has_its_shape_and_as_many_updates_as_fit():
    longer, before = find_arena("bytes-2-time").arms, find_arena("bytes-2")
    runs = read_rows(FRESH.parent / "bytes-2/runs.csv")
    seconds = {arm: [r["cpu_seconds"] for r in runs if r["arm"] == arm] for arm in longer}
    for arm, profile in longer.items():
        assert profile.model == before.shaped(arm, "shallow").model
        fit = 920 * sum(seconds[OURS]) / sum(seconds[arm])
        assert profile.train.updates == pytest.approx(fit, rel=0.01)


def test_an_arena_has_all_six_arms_or_says_that_it_is_smaller():
    assert {name for name in NAMES if len(find_arena(name).arms) < 6} == {
        *("few-4m", *MEGABYTES, *LONGER)
    }


def test_rates_that_an_arena_takes_from_fresh_are_those_that_were_best_there():
    fresh = find_arena("fresh")
    best = {arm: best_try(FRESH, fresh, arm) for arm in fresh.arms}
    rates = {arm: fresh.tries[name]["max_lr"] for arm, name in best.items()}
    assert {arm: p.train.max_lr for arm, p in find_arena("few").arms.items()} == rates
    rates["GPT-2"] = rates["GPT-2, equal parameters"]
    for name in MEGABYTES:
        for arm, profile in find_arena(name).arms.items():
            assert profile.train.max_lr == rates[arm]


@pytest.mark.parametrize("name", sorted(set(NAMES) - LONGER))
def test_every_arm_has_the_same_text_training_tries_and_seeds(name):
    arena = find_arena(name)
    tuning = arena.tuning()
    shared = {(p.corpus, p.tokenizer) for p in arena.arms.values()}
    own_rates = {arm: p.train.max_lr for arm, p in arena.arms.items()}
    trained = {repr(p.train.replace(max_lr=1.0)) for p in arena.arms.values()}
    rates_are_tried = all("max_lr" in settings for settings in arena.tries.values())
    assert len(set(own_rates.values())) == 1 or not rates_are_tried
    assert len(shared) == len(trained) == 1
    assert arena.arms[OURS].train.precision != "auto"  # which would follow an arm's width
    for arm, trials in tuning.items():
        if arena.again:
            assert {t.profile.train.seed for t in trials} == {arenas.SEEDS[0]}
            assert {t.profile.train.updates for t in trials} == {arena.arms[arm].train.updates}
            continue
        assert [t.arm for t in trials] == [f"{arm}, {name}" for name in arena.tries]
        assert {t.profile.train.seed for t in trials} == {arenas.TUNED_WITH}
        updates = arena.tuning_updates or arena.arms[arm].train.updates
        assert {t.profile.train.updates for t in trials} == {updates}
    best = next(iter(arena.tries))
    for trials in arena.runs(dict.fromkeys(arena.arms, best)).values():
        assert [t.profile.train.seed for t in trials] == list(arenas.SEEDS)
        assert {t.profile.train.updates for t in trials} == {arena.arms[OURS].train.updates}
    assert arenas.TUNED_WITH not in arenas.SEEDS


def test_an_arena_runs_by_the_rules_that_it_began_with(tmp_path):
    rules = tmp_path / "rules.md"
    with pytest.raises(InputError, match=r"no .*rules\.md"):
        keep_rules(tmp_path, "here")
    rules.write_text(RULES)
    with pytest.raises(InputError, match="no section 'nowhere'"):
        keep_rules(tmp_path, "nowhere")
    keep_rules(tmp_path, "here")
    rules.write_text(RULES.replace("two", "three"))
    keep_rules(tmp_path, "here")  # of another arena
    for other in (RULES.replace("one", "three"), RULES.replace("of all", "of most")):
        rules.write_text(other)
        with pytest.raises(InputError, match="does not say of here"):
            keep_rules(tmp_path, "here")
    keep_rules(tmp_path, "here", new_rules=True)
    keep_rules(tmp_path, "here")
    note = tmp_path / "here/rules.sha256"
    assert len(note.read_text().splitlines()) == 2
    note.unlink()
    keep_rules(tmp_path, "here")  # as new, since nothing has run
    note.unlink()
    (tmp_path / "here/tuning.csv").write_text("arm\n")
    with pytest.raises(InputError, match="when its runs began"):
        keep_rules(tmp_path, "here")


@pytest.fixture
def tiny(tmp_path, monkeypatch, here):
    """An arena of two arms on a folder's text, its rules, and the folder; it trains here."""
    text = tmp_path / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    for split, lines in (("train", 400), ("valid", 40), ("test", 40)):
        words = rng.choice(["the", "river", "runs", "to", "a", "sea", "slowly"], (lines, 9))
        (text / f"{split}.txt").write_text("\n\n".join(" ".join(line) for line in words) + "\n\n")
    base = load_profile("smoke").replace(corpus=str(text), tokenizer="bpe:300")
    base = changed(base, {"updates": 4, "seq_len": 16, "batch_size": 2, "vocab_size": 300})
    arms = {OURS: base, "one loop": changed(base, {"n_loops": 1, "exit_loops": ()})}
    tries = {f"rate {rate:g}": {"max_lr": rate} for rate in (1e-4, 1e-2)}
    made = Arena("Which?", arms, tuning_updates=2, tries=tries)
    monkeypatch.setattr(arenas, "arenas", lambda: {"tiny": made})
    (tmp_path / "rules.md").write_text("# Rules\n\n## tiny\n\nnone\n")
    return made, tmp_path


def test_an_arena_tunes_runs_and_ranks_and_does_nothing_twice(tiny, monkeypatch):
    arena, folder = tiny
    rows = run_arena("tiny", folder, echo=lambda _: None)
    assert len(read_rows(folder / "tiny/tuning.csv")) == 4
    made = sorted((row["arm"], row["seed"]) for row in rows)
    assert made == sorted((arm, seed) for seed in arenas.SEEDS for arm in arena.arms)
    table = {row["arm"]: row for row in standings("tiny", folder)}
    assert list(table) == list(arena.arms)
    documents = read_rows(documents_file(folder / "tiny/runs.csv"))
    for arm, row in table.items():
        nats = [of["nll"] for of in documents if of["arm"] == arm]
        sizes = [of["bytes"] for of in documents if of["arm"] == arm]
        assert row["bits"] == pytest.approx(sum(nats) / np.log(2) / sum(sizes))
        assert (row["seeds"], row["tries"]) == (3, 2)
        assert row["tokens"] == 4 * 16 * 2
    behind = table["one loop"]
    assert behind["mean"] == pytest.approx(table[OURS]["bits"] - behind["bits"], abs=1e-4)
    assert behind["low"] < behind["mean"] < behind["high"]
    assert table[OURS]["mean"] is None

    monkeypatch.setattr("crt_lib.study.search.run_trial", None)  # nothing can be trained
    assert run_arena("tiny", folder, echo=lambda _: None) == rows


def test_a_kept_training_that_is_done_is_only_scored_again(tiny):
    _, folder = tiny
    rows = run_arena("tiny", folder, echo=lambda _: None)
    path = folder / "tiny/runs.csv"
    write_rows(path, rows[:-1])
    kept = {file: file.read_bytes() for file in folder.glob("tiny/checkpoints/*/timing.jsonl")}
    again = run_arena("tiny", folder, echo=lambda _: None)
    assert [row["valid_loss"] for row in again] == [row["valid_loss"] for row in rows]
    assert len(kept) == 4 + 6
    assert all(file.read_bytes() == made for file, made in kept.items())


def test_a_run_that_broke_is_left_out_and_not_tried_again(tiny, monkeypatch):
    _, folder = tiny
    path = folder / "tiny/runs.csv"
    rows = run_arena("tiny", folder, echo=lambda _: None)
    rows.sort(key=lambda row: row["arm"] != OURS)
    broken = rows[0] | {"valid_loss": float("inf"), "test_bits": None}
    write_rows(path, [broken, *rows[1:]])
    of_broken = {name: broken[name] for name in ("arm", "seed")}
    documents = read_rows(documents_file(path))
    kept = [row for row in documents if not of_broken.items() <= row.items()]
    write_rows(documents_file(path), kept)
    monkeypatch.setattr("crt_lib.study.search.run_trial", None)  # nothing can be trained
    assert len(run_arena("tiny", folder, echo=lambda _: None)) == len(rows)
    assert {row["arm"]: row["seeds"] for row in standings("tiny", folder)} == {
        OURS: 2,
        "one loop": 3,
    }


def test_ours_is_trained_again_in_the_time_of_a_faster_arm(tiny, monkeypatch):
    arena, folder = tiny
    timed = replace(arena, timed=tuple(arm for arm in arena.arms if arm != OURS))
    monkeypatch.setattr(arenas, "arenas", lambda: {"tiny": timed})
    monkeypatch.setattr(arena_runs, "TURNS", 3)
    measured = {row["arm"]: row for row in arena_runs.measure_pace(timed)}
    assert list(measured) == list(arena.arms)
    assert all(row["low"] <= row["median"] <= row["high"] for row in measured.values())
    pace = [{"arm": OURS, "median": 2.0}, {"arm": "one loop", "median": 1.0}]
    write_rows(folder / "tiny/pace.csv", pace)  # kept as it is
    rows = run_arena("tiny", folder, echo=lambda _: None)
    assert read_rows(folder / "tiny/pace.csv") == pace
    short = [row for row in rows if row["arm"] == in_time_of("one loop")]
    made = sorted((row["seed"], row["updates"]) for row in short)
    assert made == [(seed, 2) for seed in arenas.SEEDS]
    ours, behind = standings("tiny", folder)
    assert ours["in_time"] is None
    both = behind["in_time"]
    assert both["low"] < both["mean"] < both["high"] and both["mean"] != behind["mean"]
    slower = {OURS: 1.0, "one loop": 1.5}
    assert timed.in_time(next(iter(arena.tries)), slower) == {}


def test_a_try_can_shape_each_arm_and_the_tokens_of_the_best_shapes_are_timed(tiny, monkeypatch):
    arena, folder = tiny
    narrow, wide = ({"d_model": width, "embed_dim": width} for width in (16, 24))
    shapes = {OURS: dict(zip(arena.tries, (narrow, wide), strict=True))}
    shaped = replace(arena, shapes=shapes)
    monkeypatch.setattr(arenas, "arenas", lambda: {"tiny": shaped})
    monkeypatch.setattr("crt_lib.bench.tokens.NEW", 4)
    run_arena("tiny", folder, only=[OURS], echo=lambda _: None)
    assert not (folder / "tiny/tokens.csv").exists()  # before every arm is tuned
    run_arena("tiny", folder, echo=lambda _: None)
    for row in standings("tiny", folder):
        profile = shaped.shaped(row["arm"], row["best"])
        own = shapes.get(row["arm"], {}).get(row["best"], {})
        assert profile == changed(arena.arms[row["arm"]], {**arena.tries[row["best"]], **own})
        assert row["parameters"] == size(profile) and row["multiply_adds"] == at_use(profile)
        assert 0 < row["ms"] < 1000
    widths = {row["parameters"] for row in read_rows(folder / "tiny/tuning.csv")}
    assert len(widths) == 3  # two shapes of ours, one of the other arm


def test_the_arena_of_look_ups_reads_lines_of_that_language():
    ours = find_arena("lookup").arms[OURS]
    assert ours.train.seq_len == lookup.LENGTH
    assert ours.model.vocab_size == lookup.WORDS + lookup.STEPS


def test_look_ups_are_asked_again_three_times_as_long_and_otherwise_the_same():
    first, again = find_arena("lookup"), find_arena("lookup-2")
    assert list(again.arms) == list(first.arms) and not again.documents
    for arm, profile in again.arms.items():
        own = first.arms[arm]
        assert profile == own.replace(train=own.train.replace(updates=3 * own.train.updates))


def test_lengths_differ_in_depth_and_updates_alone():
    arena = find_arena("lengths")
    of = {name: p.train.replace(updates=None, loop_starts=()) for name, p in arena.arms.items()}
    assert len(set(map(repr, of.values()))) == 1
    for name, profile in arena.arms.items():
        depth, updates = name.removesuffix(" updates").rsplit(", ", 1)
        assert profile.train.updates == int(updates.replace(",", ""))
        assert profile.model.n_loops == int(name[0])
        assert bool(profile.train.loop_starts) == ("from" in depth)
        assert profile.model.head_loops == tuple(range(1, profile.model.n_loops + 1))
    assert set(arena.timed) < set(arena.arms)


def test_an_arena_that_asks_again_makes_nothing_that_was_made(tiny, monkeypatch):
    arena, folder = tiny
    ran = []
    monkeypatch.setattr(search_module, "run_trial", lambda t, *a: ran.append(t) or run_trial(t, *a))
    run_arena("tiny", folder, echo=lambda _: None)
    assert [t.seed for t in ran[4:]] == [seed for seed in arenas.SEEDS for _ in arena.arms]
    best = {arm: arena_runs.best_try(folder / "tiny", arena, arm) for arm in arena.arms}
    second = replace(arena, again="tiny", tuning_updates=0)
    monkeypatch.setattr(arenas, "arenas", lambda: {"tiny": arena, "second": second})
    (folder / "rules.md").write_text("# Rules\n\n## tiny\n\nnone\n\n## second\n\nnone\n")
    ran.clear()
    rows = run_arena("second", folder, echo=lambda _: None)
    tried = [t for t in ran if t.seed == arenas.SEEDS[0]]
    other = {arm: next(name for name in arena.tries if name != best[arm]) for arm in arena.arms}
    expected = {(arm, arena.tries[other[arm]]["max_lr"]) for arm in arena.arms}
    assert {(t.arm, t.profile.train.max_lr) for t in tried} == expected
    assert len(rows) == 6
    first = read_rows(folder / "tiny/runs.csv")
    again = {arm: arena_runs.best_try(folder / "second", second, arm) for arm in arena.arms}
    for arm in arena.arms:
        if again[arm] == best[arm]:  # all of its runs are those that were there
            mine = [row for row in rows if row["arm"] == arm]
            assert mine == [row for row in first if row["arm"] == arm]


def test_a_run_needs_all_tries_and_known_names(tiny):
    arena, folder = tiny
    with pytest.raises(InputError, match="unknown arena 'nowhere'"):
        run_arena("nowhere", folder)
    with pytest.raises(InputError, match="unknown arm 'three loops'"):
        run_arena("tiny", folder, only=["three loops"])
    with pytest.raises(InputError, match="0 of its 2 tries"):
        arena_runs.best_try(folder / "tiny", arena, OURS)
