"""The analysis of a run: made once, read again, made anew for another checkpoint."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
from closeness import OF_A_MODEL, roundings

from crt_lib import load_profile
from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.exits.trace import apply_policy
from crt_lib.runs.run import run_profile
from crt_lib.runs.trained import load_trained
from crt_lib.study.analysis import analyse
from crt_lib.study.policies import calibrate_taken, judge_policies, policies_of, taken_losses

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
    tables = made.depth, made.policies
    assert len(made.valid.loss) == len(made.test.loss) == 600
    files = sorted(path.name for path in (folder / "traces").iterdir())
    assert files == ["test.safetensors", "valid.safetensors"]
    stamp = (folder / "traces" / "test.safetensors").stat().st_mtime_ns

    read = analyse(folder, tokens=600)
    assert (folder / "traces" / "test.safetensors").stat().st_mtime_ns == stamp
    assert (read.test.loss == made.test.loss).all()
    assert (read.depth, read.policies) == tables

    run_profile(settings(seed=1), folder, resume=False, progress=False)
    anew = analyse(folder, tokens=600)
    assert (anew.test.loss != made.test.loss).any()
    assert anew.depth != made.depth and anew.policies != made.policies


def test_tables_of_older_traces_stand_until_the_new_ones_do(folder, monkeypatch):
    made = analyse(folder, tokens=600)
    tables = [folder / "policies.csv", folder / "depth.csv"]
    made.depth  # noqa: B018
    before = [path.read_bytes() for path in tables]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    for name in ("make_trace", "judge_policies", "depth_sweep"):
        with monkeypatch.context() as patched:
            patched.setattr(f"crt_lib.study.analysis.{name}", stopped)
            with pytest.raises(KeyboardInterrupt):
                analyse(folder, tokens=500)
        assert [path.read_bytes() for path in tables] == before
    with monkeypatch.context() as patched:
        patched.setattr("crt_lib.exits.trace.Trace.save", stopped)
        with pytest.raises(KeyboardInterrupt):
            analyse(folder, tokens=500)
    after = [path.read_bytes() for path in tables]
    assert after != before  # and no traces are taken for theirs
    with monkeypatch.context() as patched:
        judged = Mock(side_effect=judge_policies)
        patched.setattr("crt_lib.study.analysis.judge_policies", judged)
        anew = analyse(folder, tokens=600)
    assert judged.call_count == 1
    assert len(anew.test.loss) == 600 and (anew.test.loss == made.test.loss).all()
    assert [path.read_bytes() for path in tables] == before


def test_what_a_kill_has_left_is_removed(folder):
    analyse(folder, tokens=600)
    left = [folder / ".policies.csv.x.tmp", folder / "traces/.test.safetensors.x.tmp"]
    left += [folder / "checkpoints/.gate.safetensors.x.tmp"]
    for path in left:
        path.touch()
    kept = folder / "checkpoints/.last.safetensors.x.tmp"  # a training's own
    kept.touch()
    analyse(folder, tokens=600)
    assert not any(path.exists() for path in left) and kept.exists()
    kept.unlink()


def test_policies_are_judged_on_test(folder):
    found = analyse(folder, tokens=600)
    rows = {row["policy"]: row for row in found.policies}
    policies = policies_of(found.policies)
    assert set(rows) == {*policies, "chance", "oracle"}
    assert {*CRITERIA, "full depth", "exit 1", "the paper's thresholds"} <= set(policies)
    for name, policy in policies.items():
        outcome = apply_policy(found.test, policy)
        assert rows[name]["loss"] == pytest.approx(outcome.loss)
        if policy.criterion is None:  # the whole context leaves there too
            assert rows[name]["taken"] == pytest.approx(outcome.loss, rel=roundings(OF_A_MODEL))
    for row in rows.values():
        assert row["low"] <= row["above"] <= row["high"]


def test_a_calibrated_policy_keeps_its_promise_when_taken(folder):
    found = analyse(folder, tokens=600)
    model, data, _ = load_trained(folder)
    full = apply_policy(found.valid, Policy()).loss
    for allowed in (0.002, 0.2):
        policy = calibrate_taken(model, data, found.valid, "similarity", allowed)
        taken = taken_losses(model, data, found.valid, policy)
        assert taken.mean() <= full + math.log1p(allowed) + 1e-9
    assert policy.criterion == "similarity" or policy.fixed


def test_a_passage_that_reads_as_more_tokens_is_cut_to_the_models_positions(folder):
    class Twice:
        """Its texts read as twice the tokens that they were made from."""

        def __init__(self, own):
            self.eot_id, self.decode = own.eot_id, own.decode
            self.encode = lambda text: np.repeat(own.encode(text), 2)

    made = analyse(folder, tokens=600)
    made.tokenizer = Twice(made.tokenizer)
    assert 0 < len(made.passage.loss) <= made.model.config.max_seq_len


def test_the_passage_of_a_closed_vocabulary_is_the_models_own(folder):
    found = analyse(folder)
    passage = found.passage
    assert len(passage.about["tokens"]) == len(passage.loss) == SMOKE.model.max_seq_len - 1
    assert found.tokenizer.encode(passage.about["text"]).tolist()
    assert math.isfinite(passage.loss.sum())
