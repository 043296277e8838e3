// What the page shares, and the controls of two policies. Text is only ever set as text, never as
// HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const trace = readTrace(data.trace);
const passage = readTrace(data.passage);
const fixed = fixedExits(trace);
const full = fixed.at(-1);
const best = applyPolicy(trace, null);
const LOOP_MS = 80; // of playback, a loop
const SIDES = ["A", "B"];
const THRESHOLDS = ["tau0", "tau_min", "decay"];
const PRESETS = ["own", "paper", "crt generate", "calibrated", "full depth", "oracle"]
  .filter((name) => data.generate || name !== "crt generate");
const sides = {}; // by name: controls, policy, outcome on the trace and on the passage
const at = (id) => document.getElementById(id);

// An element with attributes and children; a child that is no element becomes text.
function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "path", "line", "rect", "circle", "text"].includes(tag);
  const element = drawn
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

// An element that has the colour of exit `i`: custom properties for the style sheet.
function shaded(element, i) {
  const color = data.colors[i];
  const linear = (from) => (parseInt(color.slice(from, from + 2), 16) / 255) ** 2.2;
  const light = 0.21 * linear(1) + 0.72 * linear(3) + 0.07 * linear(5); // text stands out from it
  element.classList.add("loop");
  element.style.setProperty("--loop", color);
  element.style.setProperty("--on", light > 0.18 ? "#000" : "#fff");
  element.style.setProperty("--thick", `${1.5 + (2.5 * i) / trace.loops.length}px`);
  return element;
}

const fixedTo = (digits) => (value) => value.toFixed(digits);
const percent = (share, digits = 2) => {
  const text = (100 * share).toFixed(digits);
  return `${Number(text) === 0 ? "0" : (share > 0 ? "+" : "\u2212") + text.replace("-", "")} %`;
};
const whole = (value) => Math.round(value).toLocaleString("en");
const quoted = (text) => `\u201c${text.replaceAll("\n", "\u00b6")}\u201d`;

// ---- a policy's controls

// Thresholds that a slider steps through: about equally many scores lie between two of them.
function scaleOf(criterion) {
  const values = trace.scores[criterion].exits.flatMap((exit) => [...exit.values]);
  return [...new Set([0, ...values, 1])].sort((a, b) => a - b);
}
const scales = Object.fromEntries(Object.keys(trace.scores).map((name) => [name, scaleOf(name)]));
const DECAYS = Array.from({ length: 401 }, (_, i) => (600 + i) / 1000);

function options(select, values) {
  select.append(...values.map((value) => make("option", { value }, String(value))));
}

// The controls of policy `name`, from the template; they call `moved`, sliders while they move.
function makeSide(name, preset, criterion) {
  const box = at("policy-template").content.cloneNode(true).querySelector("fieldset");
  box.classList.add(`side-${name}`);
  box.querySelector("legend").append(`Policy ${name}`);
  const one = (what) => box.querySelector(what);
  options(one("[name=preset]"), PRESETS);
  options(one("[name=criterion]"), Object.keys(trace.scores));
  options(one("[name=last]"), trace.loops);
  for (const loop of trace.loops.slice(0, -1)) {
    const check = make("input", { type: "checkbox", name: "exit", value: loop });
    one(".exits").append(make("label", {}, check, String(loop)));
  }
  for (const threshold of THRESHOLDS) {
    for (const input of box.querySelectorAll(`[name=${threshold}]`)) {
      const said = input.closest(".dial").textContent.trim();
      input.setAttribute("aria-label", `${said}, policy ${name}`);
    }
  }
  const side = { name, box, one, preset, criterion, last: trace.loops.at(-1), exits: [] };
  for (const key of THRESHOLDS) side[key] = data.paper[key];
  sides[name] = side;
  for (const kind of ["input", "change"]) {
    box.addEventListener(kind, ({ target }) => {
      if ((target.type === "range") === (kind === "input")) moved(side, target);
    });
  }
  at("policies").append(box);
  takePreset(side);
}

// The controls as the policy of the side's preset has them; the oracle leaves them as they are.
function takePreset(side) {
  const none = { ...data.paper, criterion: null };
  const presets = {
    paper: data.paper, calibrated: data.calibrated[side.criterion], "full depth": none,
    "crt generate": data.generate,
  };
  const policy = presets[side.preset];
  if (!policy) return;
  if (policy.criterion !== null) side.criterion = policy.criterion;
  for (const key of THRESHOLDS) side[key] = policy[key];
  const taken = policy.criterion !== null || side.preset === "full depth";
  side.exits = taken ? trace.loops.slice(0, -1) : [];
  side.last = policy.fixed ?? trace.loops.at(-1);
}

// What the controls say; null is the oracle.
function policyOf(side) {
  if (side.preset === "oracle") return null;
  const fixed = side.last === trace.loops.at(-1) ? null : side.last;
  const { tau0, tau_min, decay, exits } = side;
  const asks = side.preset !== "full depth" && exits.length > 0;
  return { criterion: asks ? side.criterion : null, tau0, tau_min, decay, exits, fixed };
}

// A preset sets the other controls; one of them that moves makes the policy one's own.
function moved(side, control) {
  const key = control.name;
  if (key === "preset" || key === "criterion") side[key] = control.value;
  else if (key === "last") side.last = Number(control.value);
  else if (key === "exit") {
    const checked = [...side.box.querySelectorAll("[name=exit]:checked")];
    side.exits = checked.map((each) => Number(each.value));
  } else {
    const typed = control.type === "number";
    const value = typed ? control.valueAsNumber : stops(side, key)[control.valueAsNumber];
    if (!(value >= 0 && value <= 1)) return showControls(side);
    side[key] = value;
    if (key === "tau0") side.tau_min = Math.min(side.tau_min, value);
    if (key === "tau_min") side.tau0 = Math.max(side.tau0, value);
  }
  const ofPreset = key === "preset" || (key === "criterion" && side.preset === "calibrated");
  if (!ofPreset) side.preset = "own";
  if (side.preset !== "own") takePreset(side);
  update(side);
}

const stops = (side, key) => (key === "decay" ? DECAYS : scales[side.criterion]);

// The controls show the side's settings.
function showControls(side) {
  for (const key of ["preset", "criterion", "last"]) side.one(`[name=${key}]`).value = side[key];
  for (const check of side.box.querySelectorAll("[name=exit]")) {
    check.checked = side.exits.includes(Number(check.value));
  }
  for (const key of THRESHOLDS) {
    const [slider, field] = side.box.querySelectorAll(`[name=${key}]`);
    const places = stops(side, key);
    slider.max = places.length - 1;
    slider.value = Math.min(countBelow(places, side[key] - 1e-7), places.length - 1);
    slider.setAttribute("aria-valuetext", side[key].toFixed(4));
    field.value = Number(side[key].toFixed(4));
  }
  side.one(".rule").textContent = ruleOf(side.policy);
}

// A policy in words: each exit and its threshold.
function ruleOf(policy) {
  if (policy === null) return "Each token at the first exit that is right, else at the best.";
  const { asks, last } = askedExits(trace.loops, policy);
  const rules = trace.loops.flatMap((loop, i) =>
    asks[i] ? [`${loop} if \u2265 ${threshold(policy, loop).toFixed(4)}`] : []);
  const otherwise = `after loop ${trace.loops[last]}`;
  if (!rules.length) return `Every token exits ${otherwise}; no criterion is asked.`;
  return `By ${policy.criterion}, exit after loop ${rules.join(", ")}; else ${otherwise}.`;
}
