"""`crt explore`: the exit explorer as one page of HTML, which needs neither kernel nor network.

It holds numbers of a trace, and no text but the passage, which is the project's own. Its parts are
in the folder `page` beside this file.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crt_lib.bench.decode import Pace, measured_pace
from crt_lib.exits.policy import Policy
from crt_lib.files import InputError, read_rows
from crt_lib.show import templates
from crt_lib.show.explorer import curves_of, preset
from crt_lib.show.packed import coarse, largest_errors, pack, some_tokens
from crt_lib.show.plots import loop_color
from crt_lib.study.policies import GENERATE, known_policies, policies_of

if TYPE_CHECKING:
    from crt_lib.exits.choice import Choices
    from crt_lib.exits.trace import Trace
    from crt_lib.study.analysis import Analysis

PARTS = Path(__file__).with_name("page")
SCRIPTS = ("policies", "controls", "numbers", "figures", "passage", "start")
LIMIT = 2_000_000  # bytes of a page
PAPER = Policy("confidence")
MEASURED = ("taken", "taken_above", "taken_low", "taken_high")  # of `judge_policies`
TIMED = ("tokens_per_second", "speedup")  # of `bench_decode`
FRONTIER = ("multiply_adds", "mean_loops", "loss")  # of `frontier`
MACHINE = ("device", "isa", "threads", "precision")


@dataclass(frozen=True)
class Explored:
    """What a page is made from: a trace, a passage, and what was measured of the same model."""

    name: str  # of the model
    trace: "Trace"
    passage: "Trace"
    valid: "Trace | None" = None  # for thresholds of criteria that `judged` has not
    judged: Sequence[Mapping[str, Any]] = ()  # rows of `judge_policies`
    decoded: Sequence[Mapping[str, Any]] = ()  # rows of `bench_decode`
    choices: "Choices | None" = None  # what `crt generate` takes

    @classmethod
    def of(cls, found: "Analysis") -> "Explored":
        """All that is kept of a run; how fast it decodes only where that is of its checkpoint."""
        path = found.folder / "decode.csv"
        rows = read_rows(path) if path.is_file() else []
        decoded = [row for row in rows if row.get("checkpoint") == found.checkpoint]
        name = found.folder.resolve().name
        shown = found.test, found.passage, found.valid, found.judged, decoded, found.choices
        return cls(name, *shown)

    @cached_property
    def policies(self) -> dict[str, Policy]:
        """Those that were judged, by name."""
        return policies_of(self.judged)

    @cached_property
    def _known(self) -> dict[str, Policy]:
        return known_policies(self.judged, self.choices)

    @cached_property
    def calibrated(self) -> dict[str, Policy]:
        """The policy of the preset "calibrated", by criterion."""
        on = self.valid or self.trace
        found = {n: preset("calibrated", on, n, self._known) for n in self.trace.scores}
        return {name: policy for name, policy in found.items() if policy}

    @cached_property
    def pace(self) -> Pace | None:
        """The measured one, where enough ways of decoding were measured."""
        try:
            return measured_pace(self.decoded)
        except InputError:
            return None

    def data(self, tokens: int) -> dict[str, Any]:
        """What the page's script reads, with so many tokens of the trace."""
        exact = [PAPER, *self.policies.values(), *self.calibrated.values()]
        kept = coarse(some_tokens(self.trace, tokens), exact)
        about = {k: self.trace.about.get(k) for k in ("corpus", "split", "tokenizer")}
        return {
            "about": about | {"name": self.name, "of": len(self.trace.loss)},
            "error": largest_errors(self.trace, kept),
            "trace": pack(kept),
            "colors": [loop_color(loop) for loop in self.trace.loops],
            "frontiers": {
                criterion: [[float(f"{row[name]:.6g}") for name in FRONTIER] for row in rows]
                for criterion, rows in curves_of(kept).items()
            },
            "paper": asdict(PAPER),
            "calibrated": {name: asdict(own) for name, own in self.calibrated.items()},
            "generate": asdict(self._known[GENERATE]) if self.choices else None,
            "judged": self._judged(),
            "machine": next(({k: row.get(k) for k in MACHINE} for row in self.decoded), None),
            "pace": asdict(self.pace) if self.pace else None,
            "passage": pack(coarse(self.passage, exact)),
            "words": {name: self.passage.about[name] for name in ("tokens", "guesses")},
        }

    def _judged(self) -> list[dict[str, Any]]:
        """A row a policy: what it loses with exits taken, and how fast it decodes one text."""
        alone = {row["way"]: row for row in self.decoded if row["batch"] == 1}
        rows = {row["policy"]: row for row in self.judged}
        return [
            {"name": name, "policy": asdict(policy)}
            | {column: rows[name][column] for column in MEASURED}
            | {column: alone.get(name, {}).get(column) for column in TIMED}
            for name, policy in self.policies.items()
        ]


def page_of(explored: Explored, limit: int = LIMIT) -> str:
    """The page, of at most `limit` bytes: with as many tokens of the trace as that allows, evenly
    spaced. Raises InputError where not even a few fit.
    """
    tokens = len(explored.trace.loss)
    while tokens > 0:
        page = _filled(explored.data(tokens))
        size = len(page.encode())
        if size <= limit:
            return page
        tokens = min(tokens - 1, int(tokens * (limit / size - 0.01)))
    raise InputError(f"a page of {limit:,} bytes holds no token of the trace; allow more")


def framed(page: str) -> str:
    """The page in a frame of a notebook's output: also where nothing runs but a browser."""
    style = "width:100%;height:1500px;border:0"
    frame = f'<iframe title="Exit explorer" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
    return f"<div>{frame}</div>"  # of a bare frame IPython would say to use its own


def _filled(data: Mapping[str, Any]) -> str:
    """The template with its parts; its script and style, and no others, are allowed to act."""
    style = (PARTS / "page.css").read_text("utf-8")
    code = "\n".join((PARTS / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    said = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":  # so that no tag begins in the data, whatever a token is
        said = said.replace(sign, f"\\u{ord(sign):04x}")
    return templates.html(
        "page",
        rules=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(code)}",
        title=f"Exit explorer: {data['about']['name']}",
        style=style,
        script=code,
        data=said,
    )


def _hash(part: str) -> str:
    """How a content security policy names a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
