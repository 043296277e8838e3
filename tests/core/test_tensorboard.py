"""What TensorBoard is given is what metrics.jsonl holds."""

import pytest

from crt_lib import load_corpus, load_profile, load_tokenizer, tokenize, train
from crt_lib.checkpoint import read_metrics


def test_tensorboard_has_the_metrics(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    corpus = load_corpus("grammar")
    data = tokenize(corpus, load_tokenizer("word", corpus))
    profile = load_profile("smoke")
    model = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    config = profile.train.replace(updates=3, eval_every=0, eval_tokens=64)
    train(model, config, data, tmp_path, progress=False, tensorboard=True)
    kept = events.EventAccumulator(str(tmp_path / "tensorboard"))
    kept.Reload()
    shown = {
        name: [(e.step, e.value) for e in kept.Scalars(name)] for name in kept.Tags()["scalars"]
    }
    rows = read_metrics(tmp_path)
    assert len(rows) >= 3 and set(shown) == {name for row in rows for name in row}
    for name, points in shown.items():
        own = [(row["update"], row[name]) for row in rows if name in row]
        assert [step for step, _ in points] == [step for step, _ in own]
        assert [x for _, x in points] == pytest.approx([x for _, x in own], rel=1e-5)
