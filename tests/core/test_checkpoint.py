"""Checkpoints: what comes back is what was saved, and what is damaged is refused."""

import hashlib
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from crt_lib import InputError
from crt_lib.checkpoint import (
    RunFolder,
    load_model,
    read_metrics,
    read_state,
    restore,
    save_checkpoint,
)
from crt_lib.files import write_json
from crt_lib.model import CRT
from crt_lib.runs.profiles import load_profile

CONFIG = load_profile("smoke").model.replace(vocab_size=61)


def trained(config=CONFIG):
    torch.manual_seed(1)
    model = CRT(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        ids = torch.randint(61, (2, 9))
        sum(model(ids, targets=ids).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_round_trip(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "last.safetensors"
    files = set()
    for _ in range(12):
        save_checkpoint(path, model, {"update": 2}, [optimizer])
        files.add(path.read_bytes())
    assert len(files) == 1  # an equal training is an equal file
    again = CRT(CONFIG)
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    assert restore(path, again, [other]) == {"update": 2} == read_state(path)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other.state[b][key]), (name, key)
    loaded = load_model(path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_an_older_file_has_its_model_and_its_state_in_two_texts(tmp_path):
    model, _ = trained()
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, model, {})
    metadata = {"model": json.dumps(CONFIG.to_dict()), "state": '{"update": 7}'}
    save_file(load_file(path), path, metadata=metadata)
    assert load_model(path).config == CONFIG and read_state(path) == {"update": 7}


def test_weights_alone_bring_batch_statistics_and_cannot_be_resumed(tmp_path):
    model, optimizer = trained(CONFIG.replace(norm="batch"))
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model, {})
    loaded = load_model(path)
    assert torch.equal(loaded.block.norm1.running_mean, model.block.norm1.running_mean)
    with pytest.raises(InputError, match="can be evaluated, not resumed"):
        restore(path, model, [optimizer])


def test_damaged_files_are_refused(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model, {}, [optimizer])
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="truncated or not a checkpoint"):
            load_model(path)
    with pytest.raises(InputError, match="no checkpoint"):
        load_model(tmp_path / "nowhere.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a checkpoint"):
        load_model(path)


def test_a_file_that_is_not_that_of_its_checksum_is_refused(tmp_path):
    model, _ = trained()
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model, {})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "best.safetensors.sha256").write_text(f"{digest}  best.safetensors\n")
    load_model(path)
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(InputError, match=r"not the file of best\.safetensors\.sha256"):
        load_model(path)
    (tmp_path / "best.safetensors.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"not the file of best\.safetensors\.sha256"):
        load_model(path)


BROKEN = [b'{"update" 1}\n', b'{"update": \xff}\n', b"[1]\n", b"2\n", b'{"updatf": 2}\n']
BROKEN.append(b"[" * 200_000 + b"\n")


@pytest.mark.parametrize("damaged", BROKEN)
def test_rows_that_are_damaged_are_refused_and_a_cut_one_is_left_out(damaged, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n{"upd')
    assert read_metrics(tmp_path) == [{"update": 1}]
    path.write_bytes(b'{"update": 1}\n' + damaged)
    with pytest.raises(InputError, match="is damaged"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [*(("metrics.jsonl", d) for d in BROKEN), *(("timing.jsonl", d) for d in (*BROKEN, b"cut"))],
)
def test_a_run_whose_rows_are_damaged_is_refused_before_anything_changes(name, damaged, tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    files = {"metrics.jsonl": b'{"update": 1}\n', "timing.jsonl": b'{"seconds": 1.0}\n'}
    files |= {name: damaged, "config.json": b"{}", "checkpoints/.x.tmp": b""}
    kept = len(files["metrics.jsonl"])
    files["metrics.jsonl"] += b'{"update": 2}\n'  # what a resumed run would cut off
    for path, content in files.items():
        (tmp_path / path).write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged|is shorter"):
        run.prepare({"new": 1}, 1, kept)
    assert {path: (tmp_path / path).read_bytes() for path in files} == files


def test_nan_weights_are_refused(tmp_path):
    model, optimizer = trained()
    with torch.no_grad():
        model.block.trm.cycles[1].up.weight[3, 2] = float("nan")
    save_checkpoint(tmp_path / "x.safetensors", model, {}, [optimizer])
    with pytest.raises(InputError, match=r"block.trm.cycles.1.up.weight holds NaN"):
        load_model(tmp_path / "x.safetensors")


def test_another_configuration_is_refused(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, model, {}, [optimizer])
    wider = CRT(CONFIG.replace(d_model=64))
    with pytest.raises(InputError, match="does not fit its model"):
        restore(path, wider, [torch.optim.AdamW(wider.parameters())])
    metadata = {"model": json.dumps(wider.config.to_dict()), "state": "{}"}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(InputError, match="does not fit its model"):
        load_model(path)


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_older_file(tiny_disk):
    model, optimizer = trained()
    path = tiny_disk / "last.safetensors"
    save_checkpoint(path, model, {"update": 1}, [optimizer])
    with pytest.raises(InputError, match="Free some space"):
        save_checkpoint(path, model, {"update": 2}, [optimizer])
    assert read_state(path) == {"update": 1}
    assert [file.name for file in tiny_disk.iterdir()] == ["last.safetensors"]
    load_model(path)
    with pytest.raises(InputError, match="cannot write"):
        write_json(tiny_disk / "big.json", ["x" * 1000] * 1000)
    assert not (tiny_disk / "big.json").exists()
