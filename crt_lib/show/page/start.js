// The page's words, and its beginning.

function makeNotes() {
  const { name, corpus, split, of } = data.about, { tokens } = trace;
  const sample = tokens === of ? `${whole(tokens)} tokens` : `${whole(tokens)} of ${whole(of)} tokens, evenly spaced,`;
  at("model").textContent = name;
  at("about").textContent = `A token exits after the first loop whose score reaches a threshold: max(minimum, tau0 \u00b7 decay^(loop \u2212 1)). What that loses and saves, on ${sample} of ${corpus}, ${split ?? "text"}.`;
  at("why").textContent = "By the trace, every earlier token ran all loops. When decoding, earlier tokens have exited too, and a policy loses more; that is known for policies that were decoded: fixed exits, the paper\u2019s and calibrated ones.";
  const notes = [`This page holds scores and losses of ${sample} rounded. Against the whole trace, one-threshold policies come out at most ${(100 * data.error.ppl).toFixed(2)} % of perplexity and ${data.error.loops.toFixed(3)} loops apart. It holds no text but the passage.`];
  if (tokens !== of) notes.push(`What was decoded was measured on all ${whole(of)} tokens.`);
  if (data.machine) {
    const { device, isa, threads, precision } = data.machine;
    notes.push(`Time: ${device}, ${isa}, ${threads} threads, ${precision}, one text at a time, as it is decoded there; its tokens exit elsewhere than those of this text.`);
  }
  notes.push("A slider of tau0 or the minimum steps through the scores: about equally many lie between two of its stops.");
  at("notes").append(...notes.map((note) => make("p", {}, note)));
  at("loops-key").append(...trace.loops.map((loop, i) => shaded(make("li", {}, `loop ${loop}`), i)));
}

// Of calibrated policies, the criterion of the one that costs least.
function cheapest() {
  const cost = ([, policy]) => applyPolicy(trace, policy).multiply_adds;
  return Object.entries(data.calibrated).reduce((a, b) => (cost(b) < cost(a) ? b : a))[0];
}

makeNotes();
makeNumbers();
makeReading();
makeSide("A", "paper", data.paper.criterion);
makeSide("B", "calibrated", cheapest());
for (const name of SIDES) update(sides[name]);
at("axis").addEventListener("input", drawFrontier);
new ResizeObserver(() => { drawFrontier(); drawStrips(); }).observe(at("frontier"));
