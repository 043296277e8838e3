"""What a run's folder keeps: its manifest, a finished run, the mean of its checkpoints; speeds."""

import json
import math

import pytest
import torch
from closeness import near

from crt_lib import CRT, InputError, load_profile
from crt_lib.audit.accounting import multiply_adds
from crt_lib.checkpoint import RunFolder, load_model, read_state, save_checkpoint
from crt_lib.runs.machine import limit_memory, matmul_peak, utilisation
from crt_lib.runs.manifest import read_manifest, run_environment, update_manifest
from crt_lib.runs.run import run_profile
from crt_lib.runs.scores import results_table
from crt_lib.runs.trained import average_run


def test_a_training_and_the_pipeline_keep_each_others_records(tmp_path):
    assert read_manifest(tmp_path) == {}
    update_manifest(tmp_path, "smoke", {}, seed=1)
    update_manifest(tmp_path, "smoke", train={"status": "running"})
    update_manifest(tmp_path, "smoke", {"03_train": {"status": "done"}})
    update_manifest(tmp_path, "smoke", {"01_data": {"status": "done"}}, seed=2)
    assert read_manifest(tmp_path, "smoke") == {
        "profile": "smoke",
        "seed": 2,
        "train": {"status": "running"},
        "notebooks": {"01_data": {"status": "done"}, "03_train": {"status": "done"}},
    }
    with pytest.raises(InputError, match="profile 'smoke', not 'quick'"):
        update_manifest(tmp_path, "quick", train={})


def test_environment_is_plain_json():
    found = run_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu_count"] >= 1 and found["device"] and found["versions"]["python"]


def test_a_finished_run_is_not_done_again(tmp_path):
    profile = load_profile("smoke")
    short = profile.replace(train=profile.train.replace(updates=2, eval_every=0))
    first = run_profile(short, tmp_path, progress=False)
    RunFolder(tmp_path).checkpoint("last").unlink()
    RunFolder(tmp_path).checkpoint("best").unlink()
    assert run_profile(short, tmp_path, progress=False) == first
    longer = short.replace(train=short.train.replace(updates=3))
    with pytest.raises(InputError, match="other settings"):
        run_profile(longer, tmp_path, progress=False)


def test_a_run_whose_times_are_gone_is_refused(tmp_path):
    profile = load_profile("smoke")
    profile = profile.replace(train=profile.train.replace(updates=2, eval_every=0))
    run_profile(profile, tmp_path, progress=False)
    (tmp_path / "timing.jsonl").unlink()
    (tmp_path / "results.csv").unlink()
    with pytest.raises(InputError, match="is shorter than its checkpoint says"):
        run_profile(profile, tmp_path, progress=False)


def test_an_average_has_the_mean_of_every_weight(tmp_path):
    config, states = load_profile("smoke").model.replace(vocab_size=61), []
    for update in range(4):
        torch.manual_seed(update)
        model = CRT(config)
        states.append(model.state_dict())
        save_checkpoint(
            RunFolder(tmp_path).checkpoint(f"update-{update}"), model, {"update": update}
        )
    path = average_run(tmp_path, last=3)
    assert read_state(path)["averaged"] == [f"update-{n}.safetensors" for n in (1, 2, 3)]
    for name, value in load_model(path).state_dict().items():
        near(value, torch.stack([s[name].double() for s in states[1:]]).mean(0), 1, name)


def test_utilisation_by_hand():
    profile = load_profile("small", "paper")
    config, train = profile.model.replace(vocab_size=100), profile.train
    positions = train.batch_size * train.seq_len
    flops = 6 * sum(multiply_adds(config, train.seq_len).values()) * positions
    assert utilisation(config, train, [9.0, 11.0, 13.0], peak=flops) == pytest.approx(1 / 2)
    one = train.replace(exits_trained="one")
    heads = 6 * 3 * (config.embedding_width * (config.d_model + 100)) * positions
    assert utilisation(config, one, [2.0], peak=flops - heads) == pytest.approx(1 / 2)


def test_a_peak_is_measured():
    assert 0 < matmul_peak(torch.device("cpu"), "fp32", 64) < math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_no_limit_without_a_gpu():
    with pytest.raises(InputError, match="needs a GPU"):
        limit_memory(6)


def test_a_table_of_results_without_rows_names_itself(tmp_path):
    (tmp_path / "results.csv").touch()
    with pytest.raises(InputError, match=r"results\.csv has no rows"):
        results_table(tmp_path / "results.csv")
