// The three interactive figures of pages/explore.md, without a server or a library. Each replaces its still picture.
// What they compute, bitlib computes too; a test compares the two (`window.explore` is what it calls).
"use strict";

// --- the BiT-HyperRule: chapters/07_hyperrule -----------------------------------------------------------------------

function hyperrule({ n, height, width, variant = "paper", network = "R50x1" }) {
  const size = n < 20000 ? 0 : n < 500000 ? 1 : 2;
  let steps = [500, 10000, 20000][size];
  let warmupSteps = 0;
  let decaySteps = [3, 6, 9].map((tenths) => (tenths * steps) / 10);
  let decay = "step";
  let mixupAlpha = [0, 0.1, 0.1][size];
  let large = network === "R152x4" ? [512, 480] : [448, 384];
  if (variant === "official") {
    warmupSteps = [100, 500, 500][size];
    decaySteps = [[201, 301, 401], [3001, 6001, 9001], [6001, 12001, 18001]][size];
    large = [512, 480];
  } else if (variant === "simplified") {
    steps = [500, 2500, 10000][size];
    decaySteps = [];
    decay = "cosine";
    mixupAlpha = 0;
  }
  const [resize, crop] = height * width < 96 * 96 ? [160, 128] : large;
  const rule = { steps, warmupSteps, decaySteps, decay, baseLr: 0.003, batchSize: 512, resize, crop, mixupAlpha };
  if (network === "mini") Object.assign(rule, { resize: 80, crop: 64, batchSize: 32, baseLr: 0.03 });
  return rule;
}

const scaled = (rule, batchSize) => ({ ...rule, batchSize, baseLr: (rule.baseLr * batchSize) / rule.batchSize });

function learningRate(rule, step) {
  if (step < rule.warmupSteps) return (rule.baseLr * step) / rule.warmupSteps;
  if (rule.decay === "cosine") {
    const progress = (step - rule.warmupSteps) / (rule.steps - rule.warmupSteps);
    return rule.baseLr * 0.5 * (1 + Math.cos(Math.PI * progress));
  }
  return rule.baseLr / 10 ** rule.decaySteps.filter((first) => step >= first).length;
}

// --- four normalizations: chapters/02_group_normalization ------------------------------------------------------------

// x[image][channel][position]. kind: "batch", or a number of groups: 1 is layer norm, as many as channels instance norm.
function normalise(x, kind, eps = 1e-5) {
  const channels = x[0].length;
  const setOf = (n, c) => (kind === "batch" ? `${c}` : `${n},${Math.floor((c * kind) / channels)}`);
  const sums = {};
  const each = (f) => x.map((image, n) => image.map((row, c) => row.map((value) => f(value, setOf(n, c)))));
  each((value, set) => {
    const sum = (sums[set] ??= { count: 0, total: 0, squares: 0 });
    sum.count += 1;
    sum.total += value;
  });
  each((value, set) => (sums[set].squares += (value - sums[set].total / sums[set].count) ** 2));
  return each((value, set) => {
    const { count, total, squares } = sums[set];
    return (value - total / count) / Math.sqrt(squares / count + eps);
  });
}

// --- reliability: chapters/09_evaluation -----------------------------------------------------------------------------

// Bins [b/M, (b+1)/M), and one more for a confidence of exactly 1, in single precision like the chapter's.
function reliability(logits, labels, temperature = 1, nBins = 15) {
  const edges = Array.from({ length: nBins + 1 }, (_, b) => Math.fround(b / nBins));
  const bins = Array.from({ length: nBins + 1 }, () => ({ count: 0, confidence: 0, accuracy: 0 }));
  let right = 0;
  let nll = 0;
  logits.forEach((row, i) => {
    const top = Math.max(...row);
    const total = row.reduce((sum, z) => sum + Math.exp((z - top) / temperature), 0);
    const confidence = Math.fround(1 / total);
    const correct = row.indexOf(top) === labels[i] ? 1 : 0;
    const bin = bins[edges.filter((edge) => edge <= confidence).length - 1];
    bin.count += 1;
    bin.confidence += confidence;
    bin.accuracy += correct;
    right += correct;
    nll += Math.log(total) - (row[labels[i]] - top) / temperature;
  });
  const filled = bins.filter((bin) => bin.count);
  for (const bin of filled) {
    bin.confidence /= bin.count;
    bin.accuracy /= bin.count;
  }
  const n = logits.length;
  const ece = filled.reduce((sum, bin) => sum + (bin.count / n) * Math.abs(bin.accuracy - bin.confidence), 0);
  return { bins: filled, ece, top1: right / n, nll: nll / n };
}

window.explore = { hyperrule, scaled, learningRate, normalise, reliability };

// --- drawing ---------------------------------------------------------------------------------------------------------

const BLUE = "#0072b2", ORANGE = "#d55e00", GREEN = "#009e73";
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#b8860b"];
const count = (value) => value.toLocaleString("en");
const short = (value) => Number(value.toPrecision(3)).toString();

function element(name, attributes = {}, ...children) {
  const svg = /^(svg|g|path|rect|circle|line|text)$/.test(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function control(label, input, id) {
  input.id = id;
  const shown = element("output", { for: id });
  const box = element("div", { class: "control" }, element("label", { for: id }, label), input, shown);
  return { box, input, shown };
}

function slider(label, id, min, max, step, value) {
  return control(label, element("input", { type: "range", min, max, step, value }), id);
}

function choice(label, id, options, value) {
  const select = element("select");
  for (const [name, text] of Object.entries(options)) select.append(element("option", { value: name }, text));
  select.value = value;
  return control(label, select, id);
}

// Axes of a plot: the frame, ticks and labels, and a function from values to pixels.
function plot({ width, height, left = 58, bottom = 40, top = 12, right = 12, x, y, xLabel, yLabel, xTicks, yTicks }) {
  const px = (v) => left + ((v - x[0]) / (x[1] - x[0])) * (width - left - right);
  const py = (v) => height - bottom - ((v - y[0]) / (y[1] - y[0])) * (height - top - bottom);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const [v, text] of xTicks) {
    svg.append(element("line", { class: "grid", x1: px(v), x2: px(v), y1: top, y2: height - bottom }));
    svg.append(element("text", { x: px(v), y: height - bottom + 16, "text-anchor": "middle" }, text));
  }
  for (const [v, text] of yTicks) {
    svg.append(element("line", { class: "grid", x1: left, x2: width - right, y1: py(v), y2: py(v) }));
    svg.append(element("text", { x: left - 7, y: py(v) + 4, "text-anchor": "end" }, text));
  }
  svg.append(element("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, xLabel));
  const middle = (top + height - bottom) / 2;
  const turned = { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` };
  svg.append(element("text", turned, yLabel));
  const line = (points, attributes) => {
    const d = points.map(([a, b], i) => `${i ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("");
    svg.append(element("path", { d, fill: "none", "stroke-width": 2.2, ...attributes }));
  };
  return { svg, px, py, line };
}

function start(name, draw) {
  const place = document.querySelector(`[data-explorer="${name}"]`);
  if (!place) return;
  const still = document.querySelector(`.still-${name}`)?.closest("figure") ?? document.querySelector(`.still-${name}`);
  draw(place);
  place.hidden = false;
  if (still) still.hidden = true;
}

start("hyperrule", (place) => {
  const n = slider("Training examples", "hr-n", 1, 6.3, 0.01, 3);
  const size = slider("Image side, pixels", "hr-size", 16, 512, 1, 32);
  const batch = choice("Batch", "hr-batch", { rule: "the rule's", 256: "256", 128: "128", 64: "64", 32: "32" }, "rule");
  const variants = { paper: "the paper", official: "the released code", simplified: "common summaries" };
  const variant = choice("Rule of", "hr-variant", variants, "paper");
  const networks = { R50x1: "R50x1 to R101x3", R152x4: "R152x4", mini: "a mini of this book" };
  const network = choice("Network", "hr-network", networks, "R50x1");
  const panels = element("div", { class: "panels" });
  const words = element("p", { class: "reading", "aria-live": "polite" });
  const controls = [n, size, batch, variant, network];
  place.append(element("div", { class: "controls" }, ...controls.map((c) => c.box)), words, panels);

  function draw() {
    const examples = Math.round(10 ** n.input.valueAsNumber);
    const side = size.input.valueAsNumber;
    const given = { n: examples, height: side, width: side, variant: variant.input.value, network: network.input.value };
    let rule = hyperrule(given);
    if (batch.input.value !== "rule") rule = scaled(rule, Number(batch.input.value));
    n.shown.value = count(examples);
    size.shown.value = `${side} × ${side}`;
    const decays = rule.decay === "cosine" ? "a cosine to 0" : `÷10 at ${rule.decaySteps.map(count).join(", ")}`;
    const mixup = rule.mixupAlpha ? `MixUp with α = ${rule.mixupAlpha}` : "no MixUp";
    const seen = (rule.steps * rule.batchSize) / examples;
    const warm = rule.warmupSteps ? `after a warm-up of ${rule.warmupSteps} steps` : "without a warm-up";
    words.textContent =
      `${count(rule.steps)} steps of ${rule.batchSize} images, so each is seen ${count(Number(short(seen)))} times; ` +
      `rate ${short(rule.baseLr)} ${warm}, ${decays}; resize to ${rule.resize}, crop ${rule.crop}; ${mixup}.`;

    const end = rule.steps;
    const rates = plot({
      width: 280, height: 240, x: [0, end], y: [-4, 0.15], xLabel: "step", yLabel: "rate ÷ base rate",
      xTicks: [0, end / 2, end].map((v) => [v, v >= 1000 ? `${v / 1000}k` : String(v)]), yTicks: [[0, "1"], [-1, "0.1"], [-2, "0.01"], [-3, "0.001"]],
    });
    const points = [];
    for (let k = 0; k <= 500; k++) {
      const step = Math.min(end - 1, Math.round((k * end) / 500));
      points.push([step, Math.max(-4, Math.log10(learningRate(rule, step) / rule.baseLr + 1e-9))]);
    }
    rates.line(points, { stroke: BLUE });
    rates.svg.setAttribute("aria-label", `Learning rate over ${count(rule.steps)} steps: ${warm}, ${decays}.`);

    const squares = element("svg", { viewBox: "0 0 280 240", role: "img" });
    squares.setAttribute("aria-label", `An image of ${side} pixels, resized to ${rule.resize}, cropped to ${rule.crop}.`);
    const scale = 190 / Math.max(side, rule.resize, 1);
    const crop = (rule.resize - rule.crop) * scale * 0.6;
    for (const [length, colour, shift, dash] of [
      [side, ORANGE, 0, "5 4"], [rule.resize, BLUE, 0, ""], [rule.crop, GREEN, crop, ""],
    ]) {
      const box = { x: 45 + shift, y: 8 + shift, width: length * scale, height: length * scale };
      squares.append(element("rect", { ...box, fill: "none", stroke: colour, "stroke-width": 2.4, "stroke-dasharray": dash }));
    }
    const names = [["image", side, ORANGE], ["resized", rule.resize, BLUE], ["crop", rule.crop, GREEN]];
    names.forEach(([text, length, colour], i) => {
      squares.append(element("rect", { x: 2 + 92 * i, y: 216, width: 10, height: 10, fill: colour }));
      squares.append(element("text", { x: 16 + 92 * i, y: 225 }, `${text} ${length}`));
    });

    const density = plot({
      width: 280, height: 240, x: [0, 1], y: [0, 5], xLabel: "λ, the share of the image itself", yLabel: "density",
      xTicks: [[0, "0"], [0.5, "0.5"], [1, "1"]], yTicks: [[0, "0"], [2.5, "2.5"], [5, "5"]],
    });
    if (rule.mixupAlpha) {
      const beta = 19.714639489050161; // B(0.1, 0.1), the area under λ^(α-1) (1-λ)^(α-1)
      const curve = Array.from({ length: 199 }, (_, i) => (i + 1) / 200);
      density.line(curve.map((l) => [l, Math.min(5, (l * (1 - l)) ** (rule.mixupAlpha - 1) / beta)]), { stroke: GREEN });
      density.svg.setAttribute("aria-label", "Density of MixUp's weight: nearly all of it close to 0 and to 1.");
    } else {
      density.line([[1, 0], [1, 5]], { stroke: GREEN });
      density.svg.setAttribute("aria-label", "No MixUp: every image keeps the whole weight, 1.");
    }
    const caption = (svg, text) => element("figure", {}, svg, element("figcaption", {}, text));
    panels.replaceChildren(
      caption(rates.svg, "Schedule"), caption(squares, "Resolution"), caption(density.svg, "MixUp"),
    );
  }
  for (const { input } of controls) input.addEventListener("input", draw);
  draw();
});

start("norms", (place) => {
  const CHANNELS = 8, POSITIONS = 3, IMAGES = 2;
  const wave = (n, c, p) => Math.round(10 * (Math.sin(3.1 * n + 1.7 * c + 2.3 * p) + 0.35 * c)) / 10;
  const kinds = { batch: "batch norm", group: "group norm" };
  const kind = choice("Layer", "nm-kind", kinds, "group");
  const groups = slider("Groups of channels", "nm-groups", 0, 3, 1, 1);
  const other = slider("Factor on image 2", "nm-other", 1, 10, 0.5, 1);
  const picture = element("div", { class: "panels" });
  const words = element("p", { class: "reading", "aria-live": "polite" });
  const controls = [kind, groups, other];
  place.append(element("div", { class: "controls" }, ...controls.map((c) => c.box)), words, picture);

  const tensor = (factor) =>
    Array.from({ length: IMAGES }, (_, n) =>
      Array.from({ length: CHANNELS }, (_, c) =>
        Array.from({ length: POSITIONS }, (_, p) => wave(n, c, p) * (n === 1 ? factor : 1))));

  function table(values, setOf, title) {
    const cell = 46, high = 24;
    const svg = element("svg", { viewBox: `0 0 ${70 + IMAGES * (POSITIONS * cell + 16)} ${30 + CHANNELS * high}`, role: "img" });
    values.forEach((image, n) => {
      const left = 70 + n * (POSITIONS * cell + 16);
      svg.append(element("text", { x: left + (POSITIONS * cell) / 2, y: 14, "text-anchor": "middle" }, `image ${n + 1}`));
      image.forEach((row, c) =>
        row.forEach((value, p) => {
          const box = { x: left + p * cell, y: 22 + c * high, width: cell - 2, height: high - 2 };
          const colour = PALETTE[setOf(n, c) % PALETTE.length];
          svg.append(element("rect", { ...box, fill: colour, "fill-opacity": 0.28, stroke: colour }));
          const at = { x: box.x + cell / 2 - 1, y: box.y + 16, "text-anchor": "middle" };
          svg.append(element("text", at, value.toFixed(1)));
        }));
    });
    for (let c = 0; c < CHANNELS; c++) svg.append(element("text", { x: 0, y: 38 + c * high }, `channel ${c + 1}`));
    svg.setAttribute("aria-label", `${title}: two images of eight channels; boxes of one colour share a mean.`);
    return element("figure", {}, svg, element("figcaption", {}, title));
  }

  function draw() {
    const number = 2 ** groups.input.valueAsNumber;
    const batch = kind.input.value === "batch";
    groups.input.disabled = batch;
    const name = { 1: " (layer norm)", [CHANNELS]: " (instance norm)" }[number] ?? "";
    groups.shown.value = batch ? "—" : `${number}${name}`;
    other.shown.value = `× ${other.input.value}`;
    const how = batch ? "batch" : number;
    const x = tensor(other.input.valueAsNumber);
    const y = normalise(x, how);
    const before = normalise(tensor(1), how);
    const change = Math.max(...y[0].flatMap((row, c) => row.map((v, p) => Math.abs(v - before[0][c][p]))));
    const setOf = (n, c) => (batch ? c : n * number + Math.floor((c * number) / CHANNELS));
    const values = batch ? IMAGES * POSITIONS : (POSITIONS * CHANNELS) / number;
    words.textContent =
      `Each mean is over ${values} numbers. The factor on image 2 moves what the layer makes of image 1 ` +
      `by up to ${change.toFixed(2)}.` + (change < 0.005 ? "" : " The images depend on each other.");
    picture.replaceChildren(table(x, setOf, "What goes in"), table(y, setOf, "What comes out"));
  }
  for (const { input } of controls) input.addEventListener("input", draw);
  draw();
});

start("reliability", (place) => {
  const data = window.bitReliability;
  if (!data) throw new Error("demo/reliability.js is missing; make it with tools/demo.py");
  const temperature = slider("Temperature", "rl-t", -1.2, 1.2, 0.01, 0);
  const picture = element("div", { class: "panels" });
  const words = element("p", { class: "reading", "aria-live": "polite" });
  place.append(element("div", { class: "controls" }, temperature.box), words, picture);

  function draw() {
    const t = Math.exp(temperature.input.valueAsNumber);
    temperature.shown.value = t.toFixed(2);
    const found = reliability(data.logits, data.labels, t);
    const over = found.bins.reduce((sum, b) => sum + b.count * (b.confidence - b.accuracy), 0) / data.labels.length;
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((v) => [v, String(v)]);
    const p = plot({
      width: 420, height: 380, x: [0, 1.03], y: [0, 1.03], xLabel: "confidence", yLabel: "accuracy", xTicks: ticks, yTicks: ticks,
    });
    p.line([[0, 0], [1, 1]], { class: "diagonal", "stroke-dasharray": "6 5", "stroke-width": 1.4 });
    p.line(found.bins.map((b) => [b.confidence, b.accuracy]), { stroke: BLUE });
    for (const bin of found.bins) {
      const r = Math.max(2.5, Math.sqrt((900 * bin.count) / data.labels.length));
      p.svg.append(element("circle", { cx: p.px(bin.confidence), cy: p.py(bin.accuracy), r, fill: BLUE, "fill-opacity": 0.45 }));
    }
    const side = over > 0.01 ? "more confident than right" : over < -0.01 ? "less confident than right" : "about as confident as right";
    p.svg.setAttribute("aria-label", `Reliability diagram at temperature ${t.toFixed(2)}: the network is ${side}.`);
    words.textContent =
      `Temperature ${t.toFixed(2)}: ECE ${found.ece.toFixed(3)}, negative log-likelihood ${found.nll.toFixed(3)}, ` +
      `top-1 ${(100 * found.top1).toFixed(1)} %. The network is ${side}.`;
    picture.replaceChildren(element("figure", { class: "square" }, p.svg));
  }
  temperature.input.addEventListener("input", draw);
  draw();
});
