"use strict";
// What crt_lib.exits.trace computes, here on the page: where each token exits, what that loses and
// what it costs. A policy is that of crt_lib.exits.policy: {criterion, tau0, tau_min, decay, exits,
// fixed}, loops in `exits` and `fixed`; null stands for the oracle.

// The array of type `Kind` whose bytes are `text` in base64.
function unpacked(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

// Of an exit's scores: values of the levels, ascending, and the level of each of `count` tokens.
function levelsOf(packed, count) {
  const values = unpacked(packed.values, Float32Array);
  const kept = unpacked(packed.levels, Uint8Array);
  if (values.length > 2) return { values, levels: kept };
  const levels = new Uint8Array(count);
  if (values.length === 2) {
    for (let i = 0; i < count; i++) levels[i] = (kept[i >> 3] >> (7 - (i & 7))) & 1;
  }
  return { values, levels };
}

// A trace as `pack` of crt_lib.show.packed leaves it; loss: by exit, the least, and steps above it.
function readTrace(packed) {
  const scores = {};
  for (const [name, own] of Object.entries(packed.scores)) {
    const exits = own.exits.map((each) => levelsOf(each, packed.tokens));
    scores[name] = { heads: own.heads, compares: own.compares, exits };
  }
  const loss = packed.loss.map((own) => ({ ...own, steps: unpacked(own.steps, Uint16Array) }));
  return {
    tokens: packed.tokens, loops: packed.loops, loss, scores, costs: packed.costs,
    oracle: unpacked(packed.oracle, Uint8Array),
  };
}

// The threshold of an exit loop, eq. 6.
function threshold(policy, loop) {
  return Math.max(policy.tau_min, policy.tau0 * policy.decay ** (loop - 1));
}

// How many of `values`, ascending, are below `limit`.
function countBelow(values, limit) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Which exits before the last ask the criterion, and the index of the last exit.
function askedExits(loops, policy) {
  const last = policy.fixed ?? loops.at(-1);
  const may = (loop) => policy.criterion !== null && (policy.exits ?? loops).includes(loop);
  const asks = loops.slice(0, -1).map((loop) => may(loop) && loop < last);
  return { asks, last: loops.indexOf(last) };
}

// The exit of each token (its index), and which exits ask.
function exitsOf(trace, policy) {
  const { asks, last } = askedExits(trace.loops, policy);
  const exit = new Uint8Array(trace.tokens).fill(last);
  for (let i = last - 1; i >= 0; i--) {
    if (!asks[i]) continue;
    const { values, levels } = trace.scores[policy.criterion].exits[i];
    // scores are float32, and so are thresholds where they are compared
    const first = countBelow(values, Math.fround(threshold(policy, trace.loops[i])));
    for (let t = 0; t < exit.length; t++) if (levels[t] >= first) exit[t] = i;
  }
  return { exit, asks };
}

// Heads computed and questions asked by a token that exits at each exit, and the mean of both.
function askedOf(trace, policy, asks, counts) {
  const criterion = trace.scores[policy.criterion] ?? { heads: 0, compares: false };
  const allowed = (loop) => (policy.exits ?? trace.loops).includes(loop);
  let computed = 0, asked = 0, heads = 0, questions = 0;
  trace.loops.forEach((loop, i) => {
    const unseen = i > 0 && !allowed(trace.loops[i - 1]);
    if (asks[i]) {
      computed += criterion.heads + (criterion.compares && unseen ? 1 : 0);
      asked += 1;
    }
    // the head that was asked where a token exits is the one that predicts
    heads += counts[i] * (computed + 1 - (asks[i] ? criterion.heads : 0));
    questions += counts[i] * asked;
  });
  return { heads: heads / trace.tokens, asks: questions / trace.tokens };
}

// Tokens by exit, and the sum of their losses.
function tally(trace, exit) {
  const counts = trace.loops.map(() => 0);
  const steps = trace.loops.map(() => 0);
  for (let t = 0; t < exit.length; t++) {
    counts[exit[t]] += 1;
    steps[exit[t]] += trace.loss[exit[t]].steps[t];
  }
  const sums = trace.loss.map(({ low, step }, i) => low * counts[i] + step * steps[i]);
  return { counts, loss: sums.reduce((a, b) => a + b) };
}

// What a policy does on a trace: exit (index by token), loss (nats per token), mean loops, heads,
// asks and multiply-adds per token, shares of the tokens by exit. As `apply_policy` and `oracle`.
function applyPolicy(trace, policy) {
  const bound = { exit: trace.oracle, asks: [] };
  const { exit, asks } = policy === null ? bound : exitsOf(trace, policy);
  const { counts, loss } = tally(trace, exit);
  const own = askedOf(trace, policy ?? { criterion: null }, asks, counts);
  const shares = counts.map((count) => count / trace.tokens);
  const mean = (values) => shares.reduce((sum, share, i) => sum + share * values[i], 0);
  return {
    exit, shares, ...own,
    loss: loss / trace.tokens,
    mean_loops: mean(trace.loops),
    multiply_adds: mean(trace.costs.without) + own.heads * trace.costs.head,
  };
}

// Every token at one exit, for each exit.
function fixedExits(trace) {
  const at = (loop) => ({ criterion: null, exits: null, fixed: loop });
  return trace.loops.map((loop) => applyPolicy(trace, at(loop)));
}

// The loss of tokens that exit at one of two neighbouring fixed exits by chance, where the mean of
// `cost` is `value`; null where that is beyond the exits.
function chanceLoss(fixed, cost, value) {
  for (let i = 0; i + 1 < fixed.length; i++) {
    const [a, b] = [fixed[i], fixed[i + 1]];
    const share = (value - a[cost]) / (b[cost] - a[cost]);
    if (share >= 0 && share <= 1) return a.loss + share * (b.loss - a.loss);
  }
  return null;
}

// Tokens per second at the measured pace.
function tokensPerSecond(pace, outcome) {
  const spent = pace.loop * outcome.mean_loops + pace.head * outcome.heads;
  return 1 / (pace.fixed + spent + pace.ask * outcome.asks);
}

// What tells one policy from another: two that do the same to every text have the same key.
function keyOf(loops, policy) {
  const { asks, last } = askedExits(loops, policy);
  if (!asks.includes(true)) return String(last);
  return JSON.stringify([policy.criterion, policy.tau0, policy.tau_min, policy.decay, asks, last]);
}

// The judged row of a policy, if it was judged.
function judgedRow(judged, loops, policy) {
  if (policy === null) return undefined;
  return judged.find((row) => keyOf(loops, row.policy) === keyOf(loops, policy));
}
