"""The exit explorer: pure functions from a trace and a policy to numbers, and thin widgets.

`explore(trace)` in a notebook gives sliders for the policy and shows, as they move, perplexity,
loops, multiply-adds and speed, the frontier, where tokens leave, and a passage.
"""

import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crt_lib.bench.decode import Pace
from crt_lib.exits.perloop import frontier
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Outcome, Trace, apply_policy, calibrate, oracle
from crt_lib.files import InputError
from crt_lib.show.loopplots import exit_view
from crt_lib.show.plots import loop_color

PRESETS = ("own", "paper", "calibrated", "full depth", "oracle")
ALLOWED = 0.005  # the share of the perplexity that the preset "calibrated" may lose


@dataclass(frozen=True)
class View:
    """A policy's outcome beside that of full depth."""

    outcome: Outcome
    full: Outcome
    tokens_per_second: float | None  # None without measurements, and for the oracle
    full_tokens_per_second: float | None

    def lines(self) -> list[tuple[str, str]]:
        """What to print: a name and a value each."""
        ppl, full = self.outcome.token_ppl, self.full.token_ppl
        loops, most = self.outcome.mean_loops, self.full.mean_loops
        cost, whole = self.outcome.multiply_adds, self.full.multiply_adds
        lines = [
            ("token PPL", f"{ppl:.2f} ({ppl / full - 1:+.2%} of {full:.2f})"),
            ("mean loops", f"{loops:.2f} of {most:.0f}"),
            ("multiply-adds a token", f"{cost / 1e6:.2f}M ({cost / whole:.2f}x full depth)"),
        ]
        if self.tokens_per_second is not None and self.full_tokens_per_second is not None:
            speed = self.tokens_per_second
            ratio = speed / self.full_tokens_per_second
            lines.append(("tokens/s, from measured", f"{speed:.0f} ({ratio:.2f}x full depth)"))
        return lines


def look(trace: Trace, policy: Policy | None, pace: Pace | None = None) -> View:
    """What `policy` does on `trace`; None is the oracle."""
    outcome = oracle(trace) if policy is None else apply_policy(trace, policy)
    full = apply_policy(trace, Policy())
    return View(
        outcome=outcome,
        full=full,
        tokens_per_second=pace.tokens_per_second(outcome) if pace and policy else None,
        full_tokens_per_second=pace.tokens_per_second(full) if pace else None,
    )


def preset(
    name: str, trace: Trace, criterion: str, calibrated: Mapping[str, Policy] | None = None
) -> Policy | None:
    """The policy of a preset; None is the oracle. Raises InputError for an unknown name.

    "calibrated" is that of `criterion` in `calibrated`, else calibrated on `trace` alone, which
    does not know what decoding loses besides.
    """
    match name:
        case "paper":
            return Policy("confidence")
        case "calibrated":
            if calibrated and criterion in calibrated:
                return calibrated[criterion]
            return calibrate(trace, criterion, ALLOWED)
        case "full depth":
            return Policy()
        case "oracle":
            return None
    raise InputError(f"preset {name!r} is not one of {', '.join(PRESETS[1:])}")


def passage_html(passage: Trace, policy: Policy | None) -> str:
    """The text of `make_passage`, each token on the colour of the loop it leaves after.

    Its guesses, exit by exit, show when the pointer rests on it.
    """
    outcome = oracle(passage) if policy is None else apply_policy(passage, policy)
    guesses = passage.about["guesses"]
    parts = []
    for i, token in enumerate(passage.about["tokens"]):
        loop = passage.loops[outcome.exit[i]]
        said = "&#10;".join(
            f"loop {number}: {html.escape(repr(own[i][0]))} {own[i][1]:.0%}"
            for number, own in zip(passage.loops, guesses, strict=True)
        )
        text = html.escape(token).replace("\n", "&para;<br>")
        style = f"background:{loop_color(loop)}40;border-bottom:3px solid {loop_color(loop)}"
        parts.append(f'<span class="crt-token" style="{style}" title="{said}">{text}</span>')
    legend = " ".join(
        f'<span style="background:{loop_color(loop)}40;border-bottom:3px solid {loop_color(loop)}">'
        f"&nbsp;loop {loop}&nbsp;</span>"
        for loop in passage.loops
    )
    box = "line-height:1.9;white-space:pre-wrap;max-width:48em"
    return f'<div style="margin:6px 0">{legend}</div><div style="{box}">{"".join(parts)}</div>'


def numbers_html(view: View) -> str:
    """The numbers of `view` as a table."""
    cells = "".join(
        f'<tr><td style="padding-right:1em">{name}</td><td><b>{value}</b></td></tr>'
        for name, value in view.lines()
    )
    return f'<table class="crt-numbers">{cells}</table>'


def curves_of(trace: Trace) -> dict[str, list[dict[str, float]]]:
    """The frontier of every criterion: what does not change while a slider moves."""
    return {name: frontier(trace, name) for name in trace.scores}


def explore(
    trace: Trace,
    passage: Trace | None = None,
    pace: Pace | None = None,
    valid: Trace | None = None,
    calibrated: Mapping[str, Policy] | None = None,
) -> Any:
    """The widgets of an `Explorer`, to be displayed. Works with ipywidgets 7.7 and 8.

    `passage` comes from `make_passage`, `pace` from `benchdecode.measured_pace`, `calibrated` from
    `analysis.policies_of`; without it thresholds are calibrated on `valid`, or on `trace` itself.
    """
    return Explorer(trace, passage, pace, valid, calibrated).box


class Explorer:
    """Wires the controls to `look`; `box` is the widget, the controls are its attributes."""

    def __init__(
        self,
        trace: Trace,
        passage: Trace | None = None,
        pace: Pace | None = None,
        valid: Trace | None = None,
        calibrated: Mapping[str, Policy] | None = None,
    ):
        import ipywidgets as w

        self.trace, self.passage, self.pace, self.valid = trace, passage, pace, valid or trace
        self.calibrated = calibrated
        self.curves = curves_of(trace)
        self._quiet = False

        def slider(value: float, name: str) -> Any:
            return w.FloatSlider(
                value,
                min=0.0,
                max=1.0,
                step=0.001,
                description=name,
                readout_format=".3f",
                continuous_update=False,
            )

        self.preset = w.Dropdown(options=PRESETS, value="paper", description="preset")
        self.criterion = w.Dropdown(
            options=list(trace.scores), value="confidence", description="criterion"
        )
        self.tau0, self.tau_min, self.decay = (
            slider(0.92, "tau0"),
            slider(0.8, "tau_min"),
            slider(0.98, "decay"),
        )
        self.exits = {
            loop: w.Checkbox(
                True, description=f"exit {loop}", indent=False, layout=w.Layout(width="80px")
            )
            for loop in trace.loops[:-1]
        }
        self.last = w.Dropdown(
            options=list(trace.loops), value=trace.loops[-1], description="last exit"
        )
        self.numbers, self.text = w.HTML(), w.HTML()
        self.image = w.Image(format="png", width=860)
        self._shape = (self.tau0, self.tau_min, self.decay, *self.exits.values(), self.last)
        self.preset.observe(self._preset_chosen, "value")
        self.criterion.observe(self._criterion_chosen, "value")
        for control in self._shape:
            control.observe(self._moved, "value")
        controls = w.VBox(
            [
                self.preset,
                self.criterion,
                self.tau0,
                self.tau_min,
                self.decay,
                w.HBox(list(self.exits.values())),
                self.last,
            ]
        )
        self.box = w.VBox([w.HBox([controls, self.numbers]), self.image, self.text])
        self.show(self.policy())

    def policy(self) -> Policy | None:
        """What the controls say; None is the oracle."""
        if self.preset.value == "oracle":
            return None
        allowed = tuple(loop for loop, box in self.exits.items() if box.value)
        fixed = None if self.last.value == self.trace.loops[-1] else self.last.value
        if self.preset.value == "full depth" or not allowed:
            return Policy(fixed=fixed)
        lowest = min(self.tau_min.value, self.tau0.value)
        thresholds = self.tau0.value, lowest, self.decay.value
        return Policy(self.criterion.value, *thresholds, allowed, fixed)

    def show(self, policy: Policy | None) -> View:
        """Compute and draw everything for `policy`."""
        view = look(self.trace, policy, self.pace)
        self.numbers.value = numbers_html(view)
        own = policy.criterion if policy is not None else None
        png = io.BytesIO()
        exit_view(self.trace.loops, self.curves, view.outcome, own).savefig(png, dpi=80)
        self.image.value = png.getvalue()
        if self.passage is not None:
            self.text.value = passage_html(self.passage, policy)
        return view

    def _preset_chosen(self, change: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        if change["new"] == "own":
            self.show(self.policy())
            return
        if change["new"] == "paper":
            self._set(self.criterion, "confidence")
        policy = preset(change["new"], self.valid, self.criterion.value, self.calibrated)
        if policy is not None:
            for name in ("tau0", "tau_min", "decay"):
                self._set(getattr(self, name), getattr(policy, name))
            for box in self.exits.values():
                self._set(box, policy.criterion is not None or change["new"] == "full depth")
            self._set(self.last, policy.fixed or self.trace.loops[-1])
        self.show(policy)

    def _criterion_chosen(self, change: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        if self.preset.value == "calibrated":
            self._preset_chosen({"new": "calibrated"})
        else:
            self._moved(change)

    def _moved(self, change: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        self._set(self.preset, "own")
        if self.tau_min.value > self.tau0.value:
            moved, other = (
                (self.tau_min, self.tau0)
                if change["owner"] is self.tau_min
                else (self.tau0, self.tau_min)
            )
            self._set(other, moved.value)
        self.show(self.policy())

    def _set(self, control: Any, value: Any) -> None:
        self._quiet = True
        try:
            control.value = value
        finally:
            self._quiet = False
