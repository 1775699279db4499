// The demo of pages/demo.md: a digit drawn on a canvas, read by the network of tools/demo.py in onnxruntime-web.
// Nothing is loaded before the reader asks for it, and nothing comes from elsewhere than this site.
"use strict";

const SIDE = 280; // of the canvas, in its own pixels
const GRID = 32; // the scans of the training set were bitmaps of 32 x 32 ...
const CELLS = 8; // ... of which every 4 x 4 became one level, 0 to 16

const place = document.querySelector('[data-demo="digits"]');
const base = new URL(".", document.currentScript.src); // _static/
const runtime = new URL(`vendor/${document.currentScript.dataset.runtime}/`, base);
let session = null;

// From ink on a canvas to 8 x 8 levels of 0 to 255, as the makers of the data set did it: cut out what is drawn, scale it
// into the bitmap, and count the inked pixels of each 4 x 4. Returns null for an empty canvas.
function levels(canvas) {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (pixels[4 * (y * width + x) + 3] < 128) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    }
  }
  if (right < 0) return null;
  const tall = bottom - top + 1;
  const wide = Math.max(right - left + 1, 0.55 * tall); // a 1 stays narrow
  const middle = (left + right) / 2;
  const small = document.createElement("canvas");
  small.width = small.height = GRID;
  const context = small.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, middle - wide / 2, top, wide, tall, 0, 0, GRID, GRID);
  const inked = context.getImageData(0, 0, GRID, GRID).data;
  const found = new Float32Array(CELLS * CELLS);
  for (let y = 0; y < GRID; y++) {
    for (let x = 0; x < GRID; x++) {
      const cell = Math.floor(y / 4) * CELLS + Math.floor(x / 4);
      if (inked[4 * (y * GRID + x) + 3] >= 100) found[cell] += 1;
    }
  }
  return found.map((n) => Math.round((n * 255) / 16));
}

function softmax(logits) {
  const top = Math.max(...logits);
  const powers = Array.from(logits, (z) => Math.exp(z - top));
  const total = powers.reduce((sum, p) => sum + p, 0);
  return powers.map((p) => p / total);
}

async function load() {
  if (session) return;
  if (!window.ort) {
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = new URL("ort.wasm.min.js", runtime);
      script.onload = resolve;
      script.onerror = () => reject(new Error("the runtime is not part of this copy of the site"));
      document.head.append(script);
    });
  }
  ort.env.wasm.wasmPaths = runtime.href;
  ort.env.wasm.numThreads = 1; // more need headers that a plain static server does not send
  session = await ort.InferenceSession.create(new URL("demo/digits.onnx", base).href, { executionProviders: ["wasm"] });
}

// Levels of n pictures, one after another, to n lists of ten logits.
async function logits(values) {
  await load();
  const n = values.length / CELLS ** 2;
  const input = new ort.Tensor("float32", Float32Array.from(values), [n, 1, CELLS, CELLS]);
  const { data } = (await session.run({ levels: input })).logits;
  return Array.from({ length: n }, (_, i) => Array.from(data.slice(10 * i, 10 * (i + 1))));
}

window.demo = { levels, softmax, load, logits };

function build() {
  const make = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const canvas = make("canvas", {
    width: SIDE, height: SIDE, tabindex: 0, role: "application", "aria-describedby": "demo-keys",
    "aria-label": "Drawing area. Arrow keys move the pen, the space bar lowers and lifts it.",
  });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pen = { x: SIDE / 2, y: SIDE / 4, down: false };
  const mark = make("span", { class: "pen", "aria-hidden": "true" });
  const sheet = make("div", { class: "sheet" }, canvas, mark);
  const clear = make("button", { type: "button" }, "Clear");
  const sample = make("button", { type: "button" }, "Draw one for me");
  const words = make("p", { class: "reading", role: "status" }, "The network is loaded with the first stroke.");
  const bars = make("table", { class: "bars" }, make("caption", {}, "Probability of each digit"));
  const rows = Array.from({ length: 10 }, (_, digit) => {
    const [bar, number] = [make("span", { class: "bar" }), make("td", { class: "number" }, "–")];
    bars.append(make("tr", {}, make("th", { scope: "row" }, String(digit)), number, make("td", {}, bar)));
    return { bar, number };
  });
  const side = make("div", {}, words, bars);
  place.append(make("div", { class: "board" }, sheet, make("div", { class: "buttons" }, clear, sample)), side);
  place.append(make("p", { id: "demo-keys" },
    "With the keyboard: arrow keys move the pen, the space bar lowers and lifts it, Escape clears."));

  let [waiting, busy] = [false, false];
  async function answer() {
    if (busy) { waiting = true; return; }
    const drawn = levels(canvas);
    if (!drawn) return;
    busy = true;
    if (!session) words.textContent = "Loading the network …";
    try {
      const p = softmax((await logits(drawn))[0]);
      const best = p.indexOf(Math.max(...p));
      rows.forEach(({ bar, number }, digit) => {
        bar.style.width = `${100 * p[digit]}%`;
        bar.classList.toggle("best", digit === best);
        number.textContent = `${(100 * p[digit]).toFixed(1)} %`;
      });
      words.textContent = `I read a ${best}, with probability ${(100 * p[best]).toFixed(1)} %.`;
    } catch (error) {
      const local = location.protocol === "file:" ? " Pages opened as files may not load it; use `make serve`." : "";
      words.textContent = `No answer: ${error.message}.${local}`;
    }
    busy = false;
    if (waiting) { waiting = false; answer(); }
  }

  function stroke(from, to) {
    context.lineWidth = SIDE / 11;
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = "black";
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
  }
  function wipe() {
    context.clearRect(0, 0, SIDE, SIDE);
    words.textContent = "Draw a digit.";
    for (const { bar, number } of rows) { bar.style.width = "0"; number.textContent = "–"; }
  }
  function show() {
    mark.style.left = `${(100 * pen.x) / SIDE}%`;
    mark.style.top = `${(100 * pen.y) / SIDE}%`;
    mark.classList.toggle("down", pen.down);
  }
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) * SIDE) / box.width, y: ((event.clientY - box.top) * SIDE) / box.height };
  };
  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = at(event);
    stroke(last, next);
    last = next;
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, () => { if (last) { last = null; answer(); } });
  }
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") wipe();
    else if (event.key === " ") {
      pen.down = !pen.down;
      if (pen.down) stroke(pen, pen); else answer();
    } else if (step) {
      const before = { ...pen };
      pen.x = Math.min(SIDE - 14, Math.max(14, pen.x + 10 * step[0]));
      pen.y = Math.min(SIDE - 14, Math.max(14, pen.y + 10 * step[1]));
      if (pen.down) stroke(before, pen);
    } else return;
    event.preventDefault();
    show();
  });
  clear.addEventListener("click", wipe);
  const three = [[80, 75], [110, 45], [165, 45], [190, 80], [175, 120], [130, 135], [180, 150], [200, 195], [165, 235], [105, 235], [75, 205]];
  sample.addEventListener("click", () => {
    wipe();
    three.slice(1).forEach(([x, y], i) => stroke({ x: three[i][0], y: three[i][1] }, { x, y }));
    answer();
  });
  show();
}

if (place) {
  build();
  place.hidden = false;
  const still = document.querySelector(".still-demo");
  const figure = still?.closest("figure") ?? still;
  if (figure) figure.hidden = true;
}
