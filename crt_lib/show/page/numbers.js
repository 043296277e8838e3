// What follows from a policy: the table of numbers, and a line in words.

function update(side) {
  side.policy = policyOf(side);
  side.outcome = applyPolicy(trace, side.policy);
  side.reading = applyPolicy(passage, side.policy);
  side.judged = judgedRow(data.judged, trace.loops, side.policy);
  showControls(side);
  showNumbers(side.name, side.outcome, side.judged, side.policy);
  showSummary(side);
  drawFrontier();
  showShares(side);
  showPassage();
  drawStrips();
  say(side);
}

const ppl = (outcome) => Math.exp(outcome.loss);
const times = (value, other) => `${(value / other).toFixed(2)}\u00d7`;
const NOT_MEASURED = [null, null, "not measured"];
const against = (value, other) => percent(value / other - 1);

// Rows of the table: a name, and for an outcome its value, how it is written, and what follows it.
const ROWS = [
  ["Token perplexity, by the trace", (o) => [ppl(o), fixedTo(2), against(ppl(o), ppl(full))]],
  ["Token perplexity, as decoded", (o, row) => (row
    ? [Math.exp(row.taken), fixedTo(2), percent(Math.expm1(row.taken_above))] : NOT_MEASURED)],
  ["Mean loops", (o) => [o.mean_loops, fixedTo(2), `of ${trace.loops.at(-1)}`]],
  ["Multiply-adds per token", ({ multiply_adds: cost }) =>
    [cost, (v) => `${(v / 1e6).toFixed(2)} M`, times(cost, full.multiply_adds)]],
  ["Vocabulary heads per token", (o) => [o.heads, fixedTo(2), ""]],
  ["Perplexity of a random mix of fixed exits, at these multiply-adds", (o) => {
    const loss = chanceLoss(fixed, "multiply_adds", o.multiply_adds);
    return loss === null ? [null, null, "dearer than any exit"] : [Math.exp(loss), fixedTo(2), ""];
  }],
];
if (data.machine) {
  ROWS.push(["Tokens/s, decoded and timed", (o, row) => (row?.tokens_per_second
    ? [row.tokens_per_second, whole, times(row.speedup, 1)] : NOT_MEASURED)]);
}
if (data.pace) {
  ROWS.push(["Tokens/s, by the measured time of a loop, head and question", (o, row, policy) => {
    if (policy === null) return [null, null, "no rule to run"];
    const speed = tokensPerSecond(data.pace, o);
    return [speed, whole, times(speed, tokensPerSecond(data.pace, full))];
  }]);
}

function makeNumbers() {
  const corner = make("span", { role: "columnheader", class: "corner" });
  const head = make("div", { role: "row" }, corner);
  for (const name of SIDES) {
    head.append(make("span", { role: "columnheader", class: `side-${name}` }, name));
  }
  head.append(make("span", { role: "columnheader" }, "Full depth"));
  const rows = ROWS.map(([name]) => make("div", { role: "row" },
    make("span", { role: "rowheader" }, name),
    ...[...SIDES, "full"].map((column) => make("span", { role: "cell", "data-of": column }))));
  at("numbers").append(head, ...rows);
  const none = { ...data.paper, criterion: null, exits: null, fixed: null };
  showNumbers("full", full, judgedRow(data.judged, trace.loops, none), none);
}

function showNumbers(column, outcome, row, policy) {
  at("numbers").querySelectorAll(`[data-of=${column}]`).forEach((cell, i) => {
    const [value, write, after] = ROWS[i][1](outcome, row, policy);
    cell.dataset.value = value ?? "";
    cell.replaceChildren(value === null ? "" : `${write(value)} `, make("small", {}, after));
  });
}

// In a policy's own box: its numbers in one line.
function showSummary(side) {
  const { outcome, judged } = side;
  const decoded = judged ? `, ${percent(Math.expm1(judged.taken_above))} as decoded` : "";
  side.one(".summary").replaceChildren(
    make("b", {}, `PPL ${ppl(outcome).toFixed(2)}`),
    ` ${against(ppl(outcome), ppl(full))}${decoded}; `,
    make("b", {}, `${outcome.mean_loops.toFixed(2)} loops`), "; ",
    make("b", {}, times(outcome.multiply_adds, full.multiply_adds)), " multiply-adds");
}

// Told to screen readers once the controls rest.
function say(side) {
  clearTimeout(say.timer);
  say.timer = setTimeout(() => {
    at("said").textContent = `Policy ${side.name}: ${side.one(".summary").textContent}`;
  }, 600);
}
