"""The exit gate: the ridge regression that it says it is, kept beside the checkpoint it is of."""

import numpy as np
import pytest
import torch
from closeness import near, same
from tiny_models import exact_model

from crt_lib import InputError, load_profile
from crt_lib.cached.step import Window
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.exits.gate import GATE_FILE, Gate, fit_gate
from crt_lib.exits.policy import CRITERIA, Loop, Policy
from crt_lib.exits.trace import apply_policy
from crt_lib.runs.run import run_profile
from crt_lib.runs.trained import find_checkpoint, gate_run, load_trained_model

IDS = np.random.default_rng(0).integers(1, 37, 400)


def test_it_is_the_ridge_regression():
    model = exact_model()
    gate = fit_gate(model, IDS, 0, seq_len=16, ridge=3.0)
    assert set(gate.weights) == set(model.config.exit_loops)
    rows, targets = [], []
    with torch.inference_mode():
        for batch in evaluation_windows(IDS, 16, 1, 0):
            inputs, scored = batch.inputs, batch.targets[0] != NOT_SCORED
            z = dict(model.hidden_states(inputs, 4))[3][0, scored]
            full, exit_ = (
                model(inputs)[loop][0, scored].double().log_softmax(-1) for loop in (4, 3)
            )
            rows.append(torch.nn.functional.layer_norm(z, z.shape[-1:]))
            targets.append((full.exp() * (full - exit_)).sum(-1).clamp(min=0).sqrt())
    x, y = torch.cat(rows).double().numpy(), torch.cat(targets).numpy()
    centred = x - x.mean(0)
    weight = np.linalg.solve(
        centred.T @ centred + 3.0 * np.eye(x.shape[1]), centred.T @ (y - y.mean())
    )
    # the weights are kept in float32
    near(gate.weights[3], np.append(weight, y.mean() - x.mean(0) @ weight), 1)


def test_its_score_is_of_the_expected_distance():
    model = exact_model()
    d = model.config.d_model
    weight = torch.zeros(d + 1, dtype=torch.float64)
    weight[-1] = 0.5
    model.gate = Gate({1: weight, 3: -weight})
    z = torch.randn(2, 5, d, dtype=torch.float64)
    for loop, expected in ((1, np.exp(-0.25)), (3, 1.0)):
        score = CRITERIA["gate"].score(Loop(Window(model), loop, z, z, None))
        same(score, torch.full((2, 5), float(expected), dtype=torch.float64))


def test_kept_beside_its_checkpoint(tmp_path):
    profile = load_profile("smoke")
    profile = profile.replace(train=profile.train.replace(updates=2, eval_every=0))
    run_profile(profile, tmp_path, progress=False)
    assert load_trained_model(tmp_path)[0].gate is None
    made = gate_run(tmp_path, tokens=300).gate
    file = find_checkpoint(tmp_path).with_name(GATE_FILE)
    read = load_trained_model(tmp_path)[0].gate
    for loop, weight in made.weights.items():
        assert torch.equal(read.weights[loop], weight)
    assert Gate.load(file, "another checkpoint's digest") is None
    file.write_bytes(b"not a gate")
    with pytest.raises(InputError, match="not a gate that can be read"):
        load_trained_model(tmp_path)


def test_all_that_is_left_leaves_at_the_fixed_exit(scored):
    _, _, trace = scored
    free, capped = (
        apply_policy(trace, Policy("gate", 0.9, 0.9, 1.0, fixed=last)) for last in (None, 2)
    )
    np.testing.assert_array_equal(capped.exit, np.minimum(free.exit, trace.loops.index(2)))
