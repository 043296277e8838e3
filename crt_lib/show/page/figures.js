// The frontier, and where tokens exit.

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const first = Math.ceil(low / step) * step;
  const length = Math.floor((high - first) / step + 1e-9) + 1;
  return Array.from({ length }, (_, i) => first + i * step);
}

const COSTS = {
  multiply_adds: { column: 0, unit: 1e6, label: "multiply-adds per token with heads (millions)" },
  mean_loops: { column: 1, unit: 1, label: "mean loops per token" },
};
const curves = Object.entries(data.frontiers); // by criterion: multiply-adds, mean loops and loss

// Places on the picture: x of a cost, y of a loss, and the axes' ticks.
function placesOf(cost, width, height) {
  const { column, unit } = COSTS[cost];
  const points = curves.flatMap(([, rows]) => rows.map((row) => [row[column], row[2]]));
  for (const outcome of [...fixed, best]) points.push([outcome[cost], outcome.loss]);
  const ends = (values, margin) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return [low - margin * (high - low || 1), high + margin * (high - low || 1)];
  };
  const xs = ends(points.map(([x]) => x / unit), 0.03);
  const ys = ends(points.map(([, loss]) => Math.exp(loss)), 0.05);
  const left = 40, bottom = height - 40, top = 26, right = width - 8;
  const x = (value) => left + ((value / unit - xs[0]) / (xs[1] - xs[0])) * (right - left);
  const y = (loss) => bottom - ((Math.exp(loss) - ys[0]) / (ys[1] - ys[0])) * (bottom - top);
  const xTicks = ticks(...xs, width < 500 ? 5 : 9);
  return { x, y, left, right, top, bottom, unit, xTicks, yTicks: ticks(...ys, 6) };
}

const short = (value) => String(Number(value.toPrecision(6)));

function axesOf(p, label) {
  const parts = p.yTicks.flatMap((value) => {
    const y = p.y(Math.log(value));
    return [make("line", { class: "grid", x1: p.left, x2: p.right, y1: y, y2: y }),
      make("text", { x: p.left - 6, y: y + 4, "text-anchor": "end" }, short(value))];
  });
  for (const value of p.xTicks) {
    const x = p.x(value * p.unit);
    parts.push(make("line", { class: "axis", x1: x, x2: x, y1: p.bottom, y2: p.bottom + 4 }),
      make("text", { x, y: p.bottom + 17, "text-anchor": "middle" }, short(value)));
  }
  parts.push(make("line", { class: "axis", x1: p.left, x2: p.right, y1: p.bottom, y2: p.bottom }),
    make("text", { x: (p.left + p.right) / 2, y: p.bottom + 34, "text-anchor": "middle" }, label),
    make("text", { x: 0, y: 12 }, "token perplexity"));
  return parts;
}

const line = (points) => `M${points.map((point) => point.map(fixedTo(1)).join(",")).join("L")}`;
const diamond = (x, y) => `M${x},${y - 5}L${x + 5},${y}L${x},${y + 5}L${x - 5},${y}Z`;
const triangle = (x, y) => `M${x},${y - 5}L${x + 5},${y + 4}L${x - 5},${y + 4}Z`;

// Tokens left to chance between neighbouring fixed exits: the loss is on a line, the PPL beside it.
function chanceLine(p, cost) {
  const points = fixed.slice(0, -1).flatMap((a, i) => Array.from({ length: 9 }, (_, k) => {
    const mix = (key) => a[key] + (k / 8) * (fixed[i + 1][key] - a[key]);
    return [p.x(mix(cost)), p.y(mix("loss"))];
  }));
  return make("path", { class: "chance", d: line(points) });
}

// The side whose criterion a curve is of, if any.
const ownerOf = (criterion) => SIDES.find((name) => sides[name]?.policy?.criterion === criterion);

function pointsOf(p, cost) {
  const parts = fixed.flatMap((outcome, i) => {
    const [x, y] = [p.x(outcome[cost]), p.y(outcome.loss)];
    const long = outcome === full ? "full depth" : `exit ${trace.loops[i]}`;
    const name = p.right < 500 ? String(trace.loops[i]) : long;
    return [make("path", { class: "fixed", d: diamond(x, y) }),
      make("text", { class: "name", x, y: y - 10, "text-anchor": i ? "middle" : "start" }, name)];
  });
  const [x, y] = [p.x(best[cost]), p.y(best.loss)];
  parts.push(make("path", { class: "oracle", d: triangle(x, y) }),
    make("text", { class: "name", x: x + 10, y: y + 4 }, "oracle"));
  for (const side of Object.values(sides)) {
    if (!side.outcome) continue;
    const [x, y] = [p.x(side.outcome[cost]), p.y(side.outcome.loss)];
    const below = side.name === "B";
    const point = below
      ? make("rect", { class: "own-point side-B", x: x - 6, y: y - 6, width: 12, height: 12 })
      : make("circle", { class: "own-point side-A", cx: x, cy: y, r: 7 });
    const under = { class: `own-name side-${side.name}`, x, y: y + 22, "text-anchor": "middle" };
    parts.push(point, make("text", under, side.name));
  }
  return parts;
}

function drawFrontier() {
  const cost = at("axis").value, { column, label } = COSTS[cost];
  const width = at("frontier").clientWidth || 600, height = 340;
  const p = placesOf(cost, width, height);
  const paths = curves.map(([criterion, rows]) => {
    const owner = ownerOf(criterion);
    const d = line(rows.map((row) => [p.x(row[column]), p.y(row[2])]));
    return make("path", { class: owner ? `curve own side-${owner}` : "curve", d });
  });
  paths.sort((a, b) => a.classList.length - b.classList.length); // one's own on top
  const places = Object.values(sides).filter((side) => side.outcome).map(({ name, outcome }) =>
    `${name} at ${(outcome[cost] / p.unit).toFixed(2)}, perplexity ${ppl(outcome).toFixed(2)}`);
  const said = `Token perplexity against ${label}: ${places.join("; ")}`;
  at("frontier").replaceChildren(make("svg",
    { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": said },
    ...axesOf(p, label), ...paths, chanceLine(p, cost), ...pointsOf(p, cost)));
  showKey();
}

function showKey() {
  const sign = (part) => make("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" }, part);
  const stroke = (kind) => sign(make("path", { class: kind, d: "M0,7L26,7" }));
  const own = SIDES.flatMap((name) => {
    const criterion = sides[name]?.policy?.criterion;
    if (!criterion || ownerOf(criterion) !== name) return [];
    return [[stroke(`curve own side-${name}`), `${name}: ${criterion}, one threshold`]];
  });
  const rest = [
    [stroke("curve"), "other criteria"], [stroke("chance"), "random mix of fixed exits (chance)"],
    [sign(make("path", { class: "fixed", d: diamond(13, 7) })), "fixed exit"],
    [sign(make("path", { class: "oracle", d: triangle(13, 7) })), "oracle"],
  ];
  at("frontier-key").replaceChildren(...[...own, ...rest].map((each) => make("li", {}, ...each)));
}

// ---- shares of the exits

function showShares(side) {
  const parts = () => trace.loops.map((_, i) => shaded(make("span"), i));
  side.share ??= at("shares").appendChild(make("div", { class: `share side-${side.name}` },
    make("b", {}, side.name), make("div", { role: "img" }, ...parts())));
  const bar = side.share;
  const said = side.outcome.shares.map((share, i) => {
    const text = `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
    const part = bar.lastChild.children[i];
    part.style.width = `${100 * share}%`;
    part.dataset.value = share;
    part.textContent = share * bar.clientWidth > 40 ? text : "";
    return `${text} after loop ${trace.loops[i]}`;
  });
  bar.lastChild.setAttribute("aria-label", `Policy ${side.name}: ${said.join(", ")}`);
}
