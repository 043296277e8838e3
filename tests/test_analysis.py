"""The analysis of a run: made once, read again, made anew for another checkpoint."""

import math

import pytest

from crt_lib import load_profile
from crt_lib.analysis import analyse, named_policies, passage_of
from crt_lib.exits import CRITERIA, Policy
from crt_lib.runs import load_trained_model, run_profile
from crt_lib.trace import apply_policy

SMOKE = load_profile("smoke")


def settings(**changes):
    train = SMOKE.train.replace(updates=4, eval_every=0, **changes)
    return SMOKE.replace(train=train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "run"
    run_profile(settings(), out, progress=False)
    return out


def test_made_read_and_made_anew(folder):
    made = analyse(folder, tokens=600)
    assert len(made.valid.loss) == len(made.test.loss) == 600
    files = sorted(path.name for path in (folder / "traces").iterdir())
    assert files == ["test.safetensors", "valid.safetensors"]
    stamp = (folder / "traces" / "test.safetensors").stat().st_mtime_ns

    read = analyse(folder, tokens=600)
    assert (folder / "traces" / "test.safetensors").stat().st_mtime_ns == stamp
    assert (read.test.loss == made.test.loss).all()
    for mine, other in ((read.depth, made.depth), (read.policies, made.policies)):
        assert [row.keys() for row in mine] == [row.keys() for row in other]
        assert mine[0] == pytest.approx(other[0])

    run_profile(settings(seed=1), folder, resume=False, progress=False)
    anew = analyse(folder, tokens=600)
    assert (anew.test.loss != made.test.loss).any()


def test_policies_are_judged_on_test(folder):
    found = analyse(folder, tokens=600)
    rows = {row["policy"]: row for row in found.policies}
    assert set(rows) == {*named_policies(found.valid), "chance, calibrated", "oracle"}
    assert {f"{name}, calibrated" for name in CRITERIA} < set(rows)
    early = apply_policy(found.test, Policy(fixed=1))
    assert rows["exit 1"]["loss"] == pytest.approx(early.loss)
    for row in rows.values():
        assert row["low"] <= row["above"] <= row["high"]
    # with a fixed exit every token of the context leaves there too: both ways are the same
    assert rows["exit 1"]["taken_above"] == pytest.approx(rows["exit 1"]["read_above"], abs=1e-4)
    assert rows["full depth"]["taken_above"] == 0


def test_the_passage_of_a_closed_vocabulary_is_the_models_own(folder):
    model, tokenizer, trained = load_trained_model(folder)
    passage = passage_of(model, tokenizer, trained)
    assert len(passage.about["tokens"]) == len(passage.loss) == SMOKE.model.max_seq_len - 1
    assert tokenizer.encode(passage.about["text"]).tolist()
    assert math.isfinite(passage.loss.sum())
