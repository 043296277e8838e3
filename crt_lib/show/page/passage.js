// The passage, token by token: who exits where, what each loop says, and playback.

const words = data.words.tokens;
let place = words.length - 1; // the token that is read
let pointed = null; // the one under the pointer
const spans = words.map((word, i) => {
  const span = make("span", { role: "option" }, word.replaceAll("\n", "\u00b6\n"));
  span.addEventListener("pointerenter", () => { pointed = i; showToken(); });
  span.addEventListener("pointerleave", () => { pointed = null; showToken(); });
  span.addEventListener("click", () => { pause(); goTo(i); span.focus(); });
  return span;
});

const colored = () => sides[document.querySelector("[name=colored]:checked").value];

function showPassage() {
  const side = colored();
  if (!side.reading) return;
  spans.forEach((span, i) => {
    const exit = side.reading.exit[i];
    if (span.exit !== exit) shaded(span, span.exit = exit);
    span.classList.toggle("later", i > place);
    span.setAttribute("aria-selected", i === place);
    span.tabIndex = i === place ? 0 : -1;
    const said = words[i].trim() || "space";
    span.setAttribute("aria-label", `${said}, exits after loop ${trace.loops[exit]}`);
  });
  showToken();
  showFar();
}

// How far the reading is, and the loops so far.
function showFar() {
  const done = place + 1;
  const spent = Object.values(sides).filter((side) => side.reading).map((side) => {
    let loops = 0;
    for (let i = 0; i < done; i++) loops += trace.loops[side.reading.exit[i]];
    return `${side.name} ${(loops / done).toFixed(2)}`;
  });
  at("place").value = place;
  const far = `token ${done} of ${words.length}`;
  at("far").textContent = `${far}; loops per token so far: ${spent.join(", ")}`;
}

// Each loop's guesses for the token, the likeliest first, its loss, and who exits there.
function showToken() {
  const i = pointed ?? place, side = colored();
  const criterion = side.policy?.criterion;
  const rows = trace.loops.map((loop, k) => {
    const guesses = data.words.guesses[k][i].map(([guess, share]) => make("span",
      { class: guess === words[i] ? "right" : "" },
      `${(100 * share).toFixed(0)} % ${quoted(guess)}`));
    const { low, step, steps } = passage.loss[k];
    const own = criterion ? passage.scores[criterion].exits[k] : undefined;
    const leaving = SIDES.filter((name) => sides[name]?.reading?.exit[i] === k);
    return make("tr", {},
      make("td", {}, shaded(make("i"), k), String(loop)),
      make("td", {}, make("div", {}, ...guesses)),
      make("td", { class: "n" }, (low + step * steps[i]).toFixed(2)),
      criterion && make("td", { class: "n" }, own ? own.values[own.levels[i]].toFixed(3) : ""),
      make("td", {}, ...leaving.map((name) => make("span", { class: `side-${name}` }, name))));
  });
  const heads = [["Loop"], ["Its guesses"], ["loss", "n"], ["exits"]];
  if (criterion) heads.splice(3, 0, ["score", "n"]);
  at("token").replaceChildren(
    make("div", {}, `Token ${i + 1}: `, make("b", {}, quoted(words[i]))),
    make("table", {}, make("thead", {}, make("tr", {}, ...heads.map(([name, kind]) =>
      make("th", { scope: "col", class: kind ?? "" }, name)))), make("tbody", {}, ...rows)));
}

// A bar a token and policy, as high as the loops it runs; one path for the bars of a loop.
function drawStrips() {
  const width = at("strips").clientWidth || 600, high = 34, left = 18;
  const step = (width - left) / words.length;
  const shown = Object.values(sides).filter((side) => side.reading);
  const parts = shown.flatMap((side, row) => {
    const bottom = (row + 1) * (high + 8);
    const bars = trace.loops.map(() => "");
    side.reading.exit.forEach((exit, i) => {
      const height = (high * trace.loops[exit]) / trace.loops.at(-1);
      bars[exit] += `M${left + i * step},${bottom}v${-height}h${Math.max(step - 1, 1)}v${height}z`;
    });
    const name = make("text", { x: 0, y: bottom - 4, class: `side-${side.name}` }, side.name);
    return [name, ...bars.map((d, exit) => shaded(make("path", { d }), exit))];
  });
  const height = shown.length * (high + 8) + 2;
  const now = make("rect", { class: "now", y: 4, width: step + 1, height: height - 6 });
  const picture = make("svg", { viewBox: `0 0 ${width} ${height}`, height }, ...parts, now);
  at("strips").replaceChildren(picture);
  drawStrips.mark = () => now.setAttribute("x", left + place * step - 1);
  drawStrips.mark();
}

function goTo(i) {
  place = Math.max(0, Math.min(i, words.length - 1));
  showPassage();
  drawStrips.mark();
}

// ---- playback: each token takes as long as its loops under the coloured policy

let timer = null;

function play() {
  if (place >= words.length - 1) goTo(0);
  at("play").textContent = "Pause";
  const next = () => {
    if (place >= words.length - 1) return pause();
    goTo(place + 1);
    timer = setTimeout(next, LOOP_MS * trace.loops[colored().reading.exit[place]]);
  };
  timer = setTimeout(next, LOOP_MS * trace.loops[colored().reading.exit[place]]);
}

function pause() {
  clearTimeout(timer);
  timer = null;
  at("play").textContent = "Play";
}

function makeReading() {
  at("passage").append(...spans);
  at("passage").classList.toggle("apart", !words.some((word) => word.includes(" ")));
  at("place").max = words.length - 1;
  for (const name of SIDES) {
    const radio = make("input", { type: "radio", name: "colored", value: name });
    radio.checked = name === "A";
    radio.addEventListener("change", showPassage);
    at("colored").append(make("label", { class: `side-${name}` }, radio, ` policy ${name}`));
  }
  const act = (id, kind, action) => at(id).addEventListener(kind, action);
  act("play", "click", () => (timer === null ? play() : pause()));
  act("step", "click", () => { pause(); goTo(place + 1 < words.length ? place + 1 : 0); });
  act("restart", "click", () => { pause(); goTo(0); });
  act("place", "input", () => { pause(); goTo(at("place").valueAsNumber); });
  act("passage", "keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const ends = { Home: 0, End: words.length - 1 };
    const to = ends[event.key] ?? place + steps[event.key];
    if (Number.isNaN(to)) return;
    event.preventDefault();
    pause();
    goTo(to);
    spans[place].focus();
  });
}
