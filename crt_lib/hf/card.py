"""The card of an exported model: its README.md, with what the hub reads of it."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from crt_lib.files import InputError, write_text
from crt_lib.hf.hub import CARD, card_text
from crt_lib.text.corpus import WIKITEXT, WIKITEXT_HUB

_LICENSE = re.compile(r"(?=.{1,64}\Z)[a-z][a-z0-9]*(?:[.+-][a-z0-9]+)*\+{0,2}")
_TOKENIZERS = {"gpt2": "openai-community/gpt2"}  # those of the hub


def check_license(license: str | None) -> None:
    """Raise InputError for what cannot be a licence's name on the hub."""
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(
            f"licence {license!r:.60} is no name that the hub has; give one as mit, apache-2.0, "
            "cc-by-4.0 or other, from https://huggingface.co/docs/hub/repositories-licenses"
        )


def write_card(
    out: Path,
    model: Any,
    trained: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> None:
    """Write `out`/README.md of a saved `CRTForCausalLM`.

    `trained`: the record of its training; `scores`: rows of results.csv, of which those of test by
    the honest protocol go into the model index; `license`: of the weights, as the hub names it.
    Raises InputError as `check_license`.
    """
    check_license(license)
    name, data = out.resolve().name, trained["data"]
    corpus = Path(data["corpus"]).name  # of a folder no more than its name
    hub = WIKITEXT_HUB if corpus in WIKITEXT else None
    said = jinja2.Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    told = {"corpus": _plain(corpus), "tokenizer": data["tokenizer"]}
    told |= {"seq_len": trained["train"]["seq_len"], "calibrated": model.config.calibrated}
    text = card_text(
        model,
        _plain(name),
        said.render(told),
        license=license,
        model_name=name,
        datasets=[hub] if hub else None,
        metrics=["perplexity"],
        base_tokenizer=_TOKENIZERS.get(data["tokenizer"], data["tokenizer"]),
        eval_results=_index(corpus, hub or corpus, scores) or None,
    )
    write_text(out / CARD, text)


def _plain(text: str) -> str:
    """A name as Markdown shows it, whatever stands in it: no HTML, no code, one line."""
    return html.escape(" ".join(text.split())).replace("`", "&#96;")


def _index(corpus: str, repository: str, scores: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The model index: a result an exit and metric."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=repository,
            dataset_name=corpus,
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{said}, exit {row['exit']}",
            metric_value=float(row[metric]),
        )
        for row in scores
        if (row["split"], row["protocol"]) == ("test", "honest")
        for metric, said in (("word_ppl", "word perplexity"), ("bits_per_byte", "bits per byte"))
    ]
