// The page for labelling: asks for a pair, plays both segments in step, sends what the person chooses.

const SVG = "http://www.w3.org/2000/svg";
const SPEEDS = [1, 2, 0.5];
const POLL_MS = 2000;
const byId = (id) => document.getElementById(id);
const sides = [byId("left"), byId("right")];

let state = null; // what the server said last
let views = []; // one for each segment, with draw(step)
let busy = false; // a choice is being saved
let ended = false; // the command has ended
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let speed = 0; // of SPEEDS
let clock = 0; // seconds of the loop that have been played
let before = null; // time of the frame before

// --- asking ---

async function ask(call, value = null) {
  let response;
  try {
    const body = JSON.stringify(value);
    response = await fetch(call, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  } catch {
    throw new Ended();
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

class Ended extends Error {
  constructor() {
    super("The command has ended. Every label that was counted is saved; the same command goes on.");
  }
}

function complain(error) {
  byId("alert").textContent = error ? error.message : "";
  byId("alert").hidden = !error;
  byId("alert").classList.toggle("told", error instanceof Ended); // no fault: whoever labels has ended it
  if (error instanceof Ended) end();
}

function end() {
  ended = true;
  for (const button of document.querySelectorAll("footer button")) button.disabled = true;
}

async function change(call, value, said) {
  if (busy || ended) return;
  busy = true;
  try {
    show(await ask(call, value));
    byId("status").textContent = said;
    complain(null);
  } catch (error) {
    complain(error);
    if (!(error instanceof Ended)) {
      try {
        show(await ask("state"));
      } catch (again) {
        complain(again);
      }
    }
  } finally {
    busy = false;
  }
}

function choose(label) {
  if (!state?.pair) return;
  const said = { 0: "Left is better.", 1: "Right is better.", equal: "Both are equal." }[label];
  if (label !== "equal") flash(sides[label]);
  return change("choose", { number: state.labels, pair: state.pair, label }, said);
}

function flash(card) {
  card.classList.add("chosen");
  setTimeout(() => card.classList.remove("chosen"), 250);
}

const undo = () => state?.labels && change("undo", null, "The last label is taken back.");

async function finish() {
  if (ended) return;
  try {
    await ask("finish");
    end();
    byId("status").textContent = "Saved. You may close this page.";
  } catch (error) {
    complain(error);
  }
}

async function poll() {
  if (ended) return;
  if (!busy && state) {
    const asked = state;
    try {
      const progress = await ask("progress");
      if (!busy && asked === state) showProgress(progress);
    } catch (error) {
      if (!busy) complain(error);
    }
  }
  setTimeout(poll, POLL_MS);
}

// --- showing ---

function show(next) {
  state = next;
  showProgress(next);
  byId("dataset").textContent = [next.drawing?.scene.note, next.dataset].filter(Boolean).join(" · ");
  byId("pair").hidden = byId("choices").hidden = byId("player").hidden = !next.pair;
  byId("done").hidden = Boolean(next.pair);
  document.body.classList.toggle("done", !next.pair);
  byId("more").textContent = `More are asked for by a larger number than --pairs ${next.pairs}.`;
  views = [];
  if (!next.drawing) return;
  build(next.drawing);
  byId("at").max = next.drawing.steps - 1;
  clock = 0;
  before = null;
  drawAt(playing ? 0 : next.drawing.steps - 1);
}

function build(drawing) {
  document.body.classList.toggle("drawn", drawing.scene.kind !== "columns");
  const draw = { maze, robot, columns: () => () => {} }[drawing.scene.kind];
  views = drawing.segments.map((segment, i) => {
    const card = sides[i];
    card.querySelector(".place").textContent = `episode ${segment.episode + 1}, step ${segment.time + 1}`;
    const picture = draw(card.querySelector(".picture"), drawing, segment.frames);
    const plotted = plots(card.querySelector(".columns"), drawing, segment.values);
    return (step) => {
      picture(step);
      plotted(step);
    };
  });
}

function showProgress(progress) {
  byId("labels").textContent = progress.labels;
  byId("pairs").textContent = progress.pairs;
  byId("progress").max = progress.pairs;
  byId("progress").value = Math.min(progress.labels, progress.pairs);
  byId("undo").disabled = ended || !progress.labels;
  const points = progress.worth;
  byId("worth").hidden = progress.measured_every === null;
  byId("curve").toggleAttribute("hidden", points.length === 0);
  if (!points.length) {
    const short = progress.measured_from - progress.labels;
    byId("accuracy").textContent = "";
    byId("verdict").textContent = progress.learning
      ? "measuring what the labels are worth …"
      : short > 0
        ? `accuracy of a learned reward: from ${progress.measured_from} labels on`
        : "the labels are worth nothing yet";
    return;
  }
  const last = points[points.length - 1];
  const percent = (x) => Math.round(100 * x);
  const [low, high] = progress.intervals[points.length - 1];
  byId("accuracy").textContent = `${percent(last[2])} % accuracy (95 %: ${percent(low)} to ${percent(high)})`;
  const told = last[1] === 1 ? "1 held-out preference" : `${last[1]} held-out preferences`;
  byId("verdict").textContent = `on ${told}, ${last[0]} labels${progress.learning ? ", measuring …" : trend(points)}`;
  curve(points, progress.intervals);
}

const deviation = ([, asked, p]) => Math.sqrt(Math.max(p * (1 - p), 0.25 / asked) / asked);

function trend(points) {
  if (points.length < 3) return "";
  const [old, now] = [points[points.length - 3], points[points.length - 1]];
  const gain = now[2] - old[2];
  return gain > Math.hypot(deviation(old), deviation(now)) ? ", still growing" : ", hardly growing";
}

function curve(points, intervals) {
  const most = Math.max(points[points.length - 1][0], 1);
  const x = (n) => 4 + (112 * n) / most;
  const y = (p) => 33 - 60 * (Math.min(Math.max(p, 0.45), 1) - 0.5);
  const svg = byId("curve");
  svg.replaceChildren(shape("line", { class: "half", x1: 0, x2: 120, y1: y(0.5), y2: y(0.5) }));
  svg.append(shape("polyline", { class: "line", points: points.map((p) => `${x(p[0])},${y(p[2])}`).join(" ") }));
  for (const [i, point] of points.entries()) {
    const cx = x(point[0]);
    svg.append(shape("line", { class: "error", x1: cx, x2: cx, y1: y(intervals[i][0]), y2: y(intervals[i][1]) }));
    svg.append(shape("circle", { class: "point", cx, cy: y(point[2]), r: 2 }));
  }
}

function shape(name, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}

function canvas(place, x, y, width, height) {
  const svg = shape("svg", { viewBox: `${x} ${y} ${width} ${height}`, "aria-hidden": "true" });
  place.replaceChildren(svg);
  return svg;
}

// --- the scenes: each draws what stays, and gives a function that draws a step ---

function maze(place, { scene }, { path }) {
  const svg = canvas(place, 0, 0, ...scene.size);
  for (const [x, y] of scene.walls) svg.append(shape("rect", { class: "wall", x, y, width: 1.01, height: 1.01 }));
  const [gx, gy, r] = scene.goal;
  svg.append(shape("circle", { class: "goal", cx: gx, cy: gy, r }));
  const points = path.map((point) => point.join(","));
  svg.append(shape("polyline", { class: "whole", points: points.join(" ") }));
  const trail = shape("polyline", { class: "trail" });
  const start = shape("circle", { class: "start", cx: path[0][0], cy: path[0][1], r: scene.ball });
  const ball = shape("circle", { class: "ball", r: 1.6 * scene.ball });
  svg.append(trail, start, ball);
  return (step) => {
    trail.setAttribute("points", points.slice(0, step + 1).join(" "));
    ball.setAttribute("cx", path[step][0]);
    ball.setAttribute("cy", path[step][1]);
  };
}

function robot(place, { scene, segments }, { frames, root }) {
  const heights = segments.flatMap((segment) => segment.frames.frames.flat().flatMap((limb) => [limb[1], limb[3]]));
  const [low, high] = [Math.min(0, ...minmax(heights)) - 0.35, Math.max(1.2, ...minmax(heights)) + 0.25];
  const width = Math.max(2.4, 1.25 * (high - low));
  const svg = canvas(place, -width / 2, -high, width, high - low);
  const world = shape("g");
  const ends = minmax(root);
  const box = svg.getBoundingClientRect();
  const pixel = 1 / (Math.min(box.width / width, box.height / (high - low)) || 100);
  world.style.fontSize = `${12 * pixel}px`; // of the picture's own pixels, which are metres
  for (let metre = Math.floor(ends[0] - 3 * width); metre <= ends[1] + 3 * width; metre++) {
    for (let part = 0; part < 4; part++) {
      const x = metre + part / 4;
      world.append(shape("line", { class: "floor", x1: x, x2: x, y1: 0, y2: (part ? 4 : 9) * pixel }));
    }
    world.append(shape("text", { class: "mark", x: metre, y: 24 * pixel }, `${metre} m`));
  }
  const x = { x1: ends[0] - 4 * width, x2: ends[1] + 4 * width };
  world.append(shape("line", { class: "floor", ...x, y1: 0, y2: 0 }));
  const limbs = scene.radii.map((radius, i) =>
    shape("line", { class: scene.behind[i] ? "limb behind" : "limb", "stroke-width": 2 * radius })
  );
  world.append(...limbs.filter((_, i) => scene.behind[i]), ...limbs.filter((_, i) => !scene.behind[i]));
  svg.append(world);
  return (step) => {
    world.setAttribute("transform", `translate(${-root[step]} 0)`);
    frames[step].forEach(([x1, z1, x2, z2], i) => {
      for (const [key, value] of Object.entries({ x1, y1: -z1, x2, y2: -z2 })) limbs[i].setAttribute(key, value);
    });
  };
}

function minmax(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function plots(place, { columns, hidden, steps }, values) {
  const parts = columns.map(({ kind, name, low, high }, i) => {
    const block = document.createElement("div");
    block.className = `column ${kind}`;
    const title = document.createElement("div");
    title.className = "name";
    const [label, value] = [document.createElement("span"), document.createElement("span")];
    value.className = "value";
    label.textContent = label.title = name;
    title.append(label, value);
    const svg = shape("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" });
    const x = (step) => (steps > 1 ? (100 * step) / (steps - 1) : 50);
    const y = (v) => (high > low ? 27 - (24 * (v - low)) / (high - low) : 15);
    const line = values[i].map((v, step) => `${step ? "L" : "M"}${x(step)} ${y(v).toFixed(2)}`).join("");
    const cursor = shape("line", { y1: 0, y2: 30 });
    svg.append(shape("path", { d: line }), cursor);
    block.append(title, svg);
    return {
      block,
      draw(step) {
        cursor.setAttribute("x1", x(step));
        cursor.setAttribute("x2", x(step));
        value.textContent = values[i][step].toPrecision(3);
      },
    };
  });
  place.replaceChildren(...parts.map((part) => part.block));
  if (hidden) {
    const note = document.createElement("p");
    note.className = "quiet";
    note.textContent = `${hidden} more columns, in which both differ less, are left out.`;
    place.append(note);
  }
  return (step) => parts.forEach((part) => part.draw(step));
}

// --- playing ---

function drawAt(step) {
  for (const draw of views) draw(step);
  byId("at").value = step;
  byId("step").textContent = `${step + 1} / ${state.drawing.steps}`;
}

function frame(now) {
  if (playing && views.length) {
    const steps = state.drawing.steps;
    const length = Math.min(Math.max(0.035 * steps, 2), 25);
    clock += before === null ? 0 : (SPEEDS[speed] * (now - before)) / 1000;
    if (clock > length + 0.6) clock = 0; // a rest at the end
    drawAt(Math.min(Math.floor((clock / length) * steps), steps - 1));
  }
  before = now;
  requestAnimationFrame(frame);
}

function play(on) {
  playing = on;
  byId("play").textContent = on ? "Pause" : "Play";
}

function faster() {
  speed = (speed + 1) % SPEEDS.length;
  byId("speed").textContent = `${SPEEDS[speed]}×`;
}

function toggleColumns() {
  byId("plots").setAttribute("aria-pressed", document.body.classList.toggle("plots"));
  rebuild();
}

// Labels in a picture have the size of the page's text, whatever the size of the picture.
function rebuild() {
  if (!state?.drawing) return;
  build(state.drawing);
  drawAt(Number(byId("at").value));
}

// --- the person ---

const KEYS = {
  ArrowLeft: () => choose(0),
  ArrowRight: () => choose(1),
  ArrowDown: () => choose("equal"),
  " ": () => choose("equal"),
  ArrowUp: undo,
  Backspace: undo,
  p: () => play(!playing),
  s: faster,
  c: toggleColumns,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  // Whoever has gone to a button or the slider by Tab uses it as usual.
  if (!act || (event.key === " " && event.target.matches("button:focus-visible"))) return;
  if (event.target === byId("at") && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  if (!event.repeat) act(); // a key that is held down labels one pair
});
document.addEventListener("keyup", (event) => {
  if (event.key === " " && !event.target.matches("button:focus-visible")) event.preventDefault();
});

const CLICKS = {
  "choose-left": () => choose(0),
  "choose-right": () => choose(1),
  "choose-equal": () => choose("equal"),
  left: () => choose(0),
  right: () => choose(1),
  undo,
  finish,
  play: () => play(!playing),
  speed: faster,
  plots: toggleColumns,
};
for (const [id, act] of Object.entries(CLICKS)) {
  byId(id).addEventListener("click", (event) => {
    if (event.detail) byId(id).blur(); // by a pointer: the keys go on choosing
    act();
  });
}
byId("at").addEventListener("input", (event) => {
  play(false);
  drawAt(Number(event.target.value));
});
addEventListener("resize", rebuild);
byId("at").addEventListener("pointerup", (event) => event.target.blur());

play(playing);
try {
  show(await ask("state"));
} catch (error) {
  complain(error);
}
requestAnimationFrame(frame);
poll();
