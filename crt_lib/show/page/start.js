// The page's words, and its beginning.

function makeNotes() {
  const { name, corpus, split, of } = data.about, { tokens } = trace;
  const all = tokens === of;
  const sample = all ? `${whole(tokens)} tokens` : `${whole(tokens)} of ${whole(of)} tokens`;
  at("model").textContent = name;
  at("about").textContent = "A token exits after the first loop whose score reaches a threshold, "
    + "max(minimum, tau0 \u00b7 decay^(loop \u2212 1)). What that loses and saves, on "
    + `${sample} of ${corpus}, ${split ?? "text"}.`;
  at("why").textContent = "By the trace, the tokens before have run all loops; when decoding, they "
    + "have exited too, and a policy loses more. That was measured for fixed exits, the "
    + "paper\u2019s thresholds and calibrated policies.";
  const notes = [
    `${all ? "Scores and losses are rounded" : "The tokens are evenly spaced"}: against the whole `
    + `trace, policies of one threshold come out at most ${(100 * data.error.ppl).toFixed(2)} % of `
    + `perplexity and ${data.error.loops.toFixed(3)} loops apart.`,
    "About equally many scores lie between two stops of the sliders tau0 and minimum.",
    "The page holds no text but the passage.",
  ];
  if (!all) notes.push(`What is said of decoding was measured on all ${whole(of)} tokens.`);
  if (data.machine) {
    const { device, isa, threads, precision } = data.machine;
    notes.push(`Time: ${device}, ${isa}, ${threads} threads, ${precision}, one text at a time, `
      + "decoding texts of its own, whose tokens exit elsewhere than those of this text.");
  }
  at("notes").append(...notes.map((note) => make("p", {}, note)));
  const keys = trace.loops.map((loop, i) => shaded(make("li", {}, `loop ${loop}`), i));
  at("loops-key").append(...keys);
}

// Of calibrated policies, the criterion of the one that costs least.
function cheapest() {
  const cost = ([, policy]) => applyPolicy(trace, policy).multiply_adds;
  return Object.entries(data.calibrated).reduce((a, b) => (cost(b) < cost(a) ? b : a))[0];
}

makeNotes();
makeNumbers();
makeReading();
makeSide("A", "calibrated", cheapest());
makeSide("B", "paper", data.paper.criterion);
for (const name of SIDES) update(sides[name]);
at("axis").addEventListener("change", drawFrontier);
new ResizeObserver(() => { drawFrontier(); drawStrips(); }).observe(at("frontier"));
