"""The exit explorer: pure functions from a trace and a policy to numbers, and thin widgets.

`Explorer(trace).box` in a notebook gives sliders for the policy and shows, while they move,
perplexity, loops, multiply-adds and speed, the frontier, where tokens exit, and a passage; with
"keep beside" also those of the policy that was there then.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from crt_lib.exits.perloop import frontier
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Outcome, Trace, apply_policy, calibrate, oracle
from crt_lib.show.picture import ExitPicture
from crt_lib.show.plots import loop_color
from crt_lib.show.templates import html
from crt_lib.study.policies import GENERATE, judged_row, known_policies

if TYPE_CHECKING:
    from crt_lib.bench.decode import Pace
    from crt_lib.exits.choice import Choices
    from crt_lib.model import CRT
    from crt_lib.show.explorer_page import Explored
    from crt_lib.text.tokenizer import Tokenizer

PRESETS = ("own", "paper", GENERATE, "calibrated", "full depth", "oracle")
KEPT = "<b>kept</b>"  # above what is of the policy that is kept beside
ALLOWED = 0.005  # the share of the perplexity that the preset "calibrated" may lose


@dataclass(frozen=True)
class View:
    """A policy's outcome beside that of full depth, and what was measured, where that is known."""

    outcome: Outcome
    full: Outcome
    pace: "Pace | None" = None
    judged: Mapping[str, Any] | None = None  # the policy's row of `judge_policies`

    def lines(self) -> list[tuple[str, str]]:
        """What to print: a name and a value each."""
        ppl, full = self.outcome.token_ppl, self.full.token_ppl
        loops, most = self.outcome.mean_loops, self.full.mean_loops
        cost, whole = self.outcome.multiply_adds, self.full.multiply_adds
        decoded = "not measured"  # the context has exited too then, which the trace does not show
        if self.judged is not None:
            above = math.expm1(self.judged["taken_above"])
            decoded = f"{math.exp(self.judged['taken']):.2f} ({above:+.2%})"
        lines = [
            ("token PPL", f"{ppl:.2f} ({ppl / full - 1:+.2%} of {full:.2f})"),
            ("token PPL as decoded", decoded),
            ("mean loops", f"{loops:.2f} of {most:.0f}"),
            ("multiply-adds per token", f"{cost / 1e6:.2f}M ({cost / whole:.2f}x full depth)"),
        ]
        if self.pace is not None:
            speed, slow = map(self.pace.tokens_per_second, (self.outcome, self.full))
            said = f"{speed:.0f} ({speed / slow:.2f}x full depth)"
            lines.append(("tokens/s, from measured", said))
        return lines


def look(
    trace: Trace,
    policy: Policy | None,
    pace: "Pace | None" = None,
    judged: Sequence[Mapping[str, Any]] = (),
) -> View:
    """What `policy` does on `trace`; None is the oracle, which cannot be decoded.

    `judged`: rows of `judge_policies`, among which this policy's is looked for.
    """
    full = apply_policy(trace, Policy())
    if policy is None:
        return View(oracle(trace), full)
    return View(apply_policy(trace, policy), full, pace, judged_row(judged, policy, trace.loops))


def preset(
    name: str, trace: Trace, criterion: str, calibrated: Mapping[str, Policy] | None = None
) -> Policy | None:
    """The policy of one of PRESETS but "own"; None is the oracle.

    `calibrated` is of `known_policies`; "calibrated" is that of `criterion` there, else calibrated
    on `trace` alone, which does not know what decoding loses besides.
    """
    match name:
        case "paper":
            return Policy("confidence")
        case "crt generate":
            return (calibrated or {}).get(name, Policy())
        case "calibrated":
            if calibrated and criterion in calibrated:
                return calibrated[criterion]
            return calibrate(trace, criterion, ALLOWED)
        case "full depth":
            return Policy()
    return None


def passage_html(passage: Trace, policy: Policy | None) -> str:
    """The text of `make_passage`, each token on the colour of the loop that it exits after.

    Its best guess and its loss, exit by exit, show when the pointer rests on it.
    """
    outcome = oracle(passage) if policy is None else apply_policy(passage, policy)
    colors, about = map(loop_color, passage.loops), passage.about
    guesses = zip(*about["guesses"], strict=True)
    return html(
        "passage",
        loops=passage.loops,
        styles=[f"background:{color}40;border-bottom:3px solid {color}" for color in colors],
        tokens=zip(about["tokens"], outcome.exit, guesses, passage.loss, strict=True),
    )


def numbers_html(view: View) -> str:
    """The numbers of `view` as a table."""
    return html("numbers", lines=view.lines())


def curves_of(trace: Trace) -> dict[str, list[dict[str, float]]]:
    """The frontier of every criterion: what does not change while a slider moves."""
    return {name: frontier(trace, name) for name in trace.scores}


class Explorer:
    """Wires the controls to `look`; `box` is the widget, for ipywidgets 7.7 and 8.

    `passage` comes from `make_passage`, `pace` from `measured_pace`, `judged` from
    `judge_policies`, `choices` from `crt calibrate`; thresholds of criteria that neither has are
    calibrated on `valid`, or on `trace` itself. `reader`: a model and its tokenizer, which then
    read one's own text, or a file; with it another run's folder can be opened.
    """

    def __init__(
        self,
        trace: Trace,
        passage: Trace | None = None,
        pace: "Pace | None" = None,
        valid: Trace | None = None,
        judged: Sequence[Mapping[str, Any]] = (),
        reader: "tuple[CRT, Tokenizer] | None" = None,
        choices: "Choices | None" = None,
    ):
        import ipywidgets as w

        self.trace, self.passage, self.pace, self.valid = trace, passage, pace, valid or trace
        self.curves, self._quiet = curves_of(trace), False
        self.judged, self.reader, self.calibrated = judged, reader, known_policies(judged, choices)
        self._picture = cache(partial(ExitPicture, trace, self.curves))  # by criterion

        def slider(value: float, name: str) -> Any:
            look = {"step": 0.0005, "readout_format": ".4f", "continuous_update": True}
            return w.FloatSlider(value, min=0.0, max=1.0, description=name, **look)

        def choice(options: Sequence[Any], value: Any, name: str) -> Any:
            return w.Dropdown(options=options, value=value, description=name)

        def check(loop: int) -> Any:
            narrow = w.Layout(width="80px")
            return w.Checkbox(True, description=f"exit {loop}", indent=False, layout=narrow)

        self.preset = choice([p for p in PRESETS if choices or p != GENERATE], "paper", "preset")
        self.criterion = choice(list(trace.scores), "confidence", "criterion")
        self.tau0, self.tau_min = slider(0.92, "tau0"), slider(0.8, "tau_min")
        self.decay = slider(0.98, "decay")
        self.exits = {loop: check(loop) for loop in trace.loops[:-1]}
        self.last = choice(list(trace.loops), trace.loops[-1], "last exit")
        self.numbers, self.text, self.numbers_beside, self.text_beside = (
            w.HTML() for _ in range(4)
        )
        self.beside: list[Policy | None] = []  # the policy that is kept, if one is
        self.keep = w.ToggleButton(False, description="keep beside", tooltip="to compare with it")
        self.keep.observe(self._kept, "value")
        self.image = w.Image(format="png", width=860)
        shape = [self.preset, self.criterion, self.tau0, self.tau_min, self.decay]
        for control in (*shape, *self.exits.values(), self.last):
            control.observe(self._moved, "value")
        controls = w.VBox([*shape, w.HBox(list(self.exits.values())), self.last, self.keep])
        own = self._own() if reader else []
        above = w.HBox([controls, self.numbers, self.numbers_beside])
        texts = w.VBox([self.text, self.text_beside])
        self.box = w.VBox([above, self.image, texts, *own])
        self.show()

    def _own(self) -> list[Any]:
        """Widgets for one's own text and run; a notebook may ask for them, the page does not."""
        from crt_lib.show.own import OwnRun, OwnText

        assert self.reader
        text = self.passage.about["text"] if self.passage else ""
        self.own, self.run = OwnText(self.reader, text, self._read), OwnRun(self._opened)
        return [self.own.box, self.run.box]

    def _read(self, passage: Trace) -> None:
        self.passage = passage
        self.show()

    def _opened(self, found: "Explored", reader: "tuple[CRT, Tokenizer]") -> None:
        """Another run, in the place of this one; its controls are its own."""
        other = type(self)(
            *(found.trace, found.passage, found.pace, found.valid, found.judged, reader),
            found.choices,
        )
        self.opened = other
        self.box.children = (*other.box.children[:-1], self.run.box)

    def policy(self) -> Policy | None:
        """What the controls say; None is the oracle."""
        if self.preset.value == "oracle":
            return None
        allowed = tuple(loop for loop, box in self.exits.items() if box.value)
        fixed = None if self.last.value == self.trace.loops[-1] else self.last.value
        if self.preset.value == "full depth" or not allowed:
            return Policy(fixed=fixed)
        thresholds = self.tau0.value, self.tau_min.value, self.decay.value
        return Policy(self.criterion.value, *thresholds, allowed, fixed)

    def show(self) -> None:
        """Compute and draw everything for the policy."""
        policy = self.policy()
        view, *kept = (
            look(self.trace, shown, self.pace, self.judged) for shown in (policy, *self.beside)
        )
        self.numbers.value = numbers_html(view)
        self.numbers_beside.value = "".join(KEPT + numbers_html(other) for other in kept)
        picture = self._picture(policy.criterion if policy else None)
        self.image.value = picture.png(view.outcome, *(other.outcome for other in kept))
        if self.passage is not None:
            self.text.value = passage_html(self.passage, policy)
            kept_text = (KEPT + passage_html(self.passage, other) for other in self.beside)
            self.text_beside.value = "".join(kept_text)

    def _kept(self, change: Mapping[str, Any]) -> None:
        """The policy of now stays beside what the controls say, until the button is up again."""
        self.beside = [self.policy()] if change["new"] else []
        self.show()

    def _moved(self, change: Mapping[str, Any]) -> None:
        """A preset sets the other controls; one of them that moves makes the policy one's own."""
        if self._quiet:  # this method moves it
            return
        self._quiet = True
        moved, kind = change["owner"], self.preset.value
        if not (moved is self.preset or (moved is self.criterion and kind == "calibrated")):
            self.preset.value = "own"
        if self.preset.value != "own":
            self._set_controls()
        elif moved is self.tau_min:
            self.tau0.value = max(self.tau0.value, self.tau_min.value)
        else:
            self.tau_min.value = min(self.tau0.value, self.tau_min.value)
        self._quiet = False
        self.show()

    def _set_controls(self) -> None:
        """To the policy of the preset; the oracle leaves them as they are."""
        name, criterion = self.preset.value, self.criterion.value
        policy = preset(name, self.valid, criterion, self.calibrated)
        if policy is None:
            return
        if policy.criterion is not None:
            self.criterion.value = policy.criterion
        self.tau0.value, self.tau_min.value = policy.tau0, policy.tau_min
        self.decay.value = policy.decay
        for box in self.exits.values():
            box.value = policy.criterion is not None or name == "full depth"
        self.last.value = policy.fixed or self.trace.loops[-1]
