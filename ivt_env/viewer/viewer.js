// What the page shows and how it answers; loading.js comes before this file in the same script.

const SVG = "http://www.w3.org/2000/svg";
const GOOD = 0.5; // a box counts as right from this IoU on

const FILTERS = [
  ["all", "All", () => true],
  ["corrected", "Corrected", (e) => e.outcome === "corrected", "step 0 wrong, final box right (IoU 0.5 or more)"],
  ["broken", "Regressed", (e) => e.outcome === "broken", "step 0 right, final box wrong"],
  ["right", "Kept right", (e) => e.outcome === "right", "step 0 and final box right"],
  ["wrong", "Stayed wrong", (e) => e.outcome === "wrong", "step 0 and final box wrong"],
  ["never", "Never right", (e) => e.best < GOOD, "no step was right"],
  ["stopped", "Stopped", (e) => e.stopped, "the agent ended the episode"],
  ["early", "Stopped too early", (e) => e.stopped && e.final < GOOD, "the agent stopped while its box was still wrong"],
  ["unparsable", "Unparsable", (e) => e.unparsable, "a step whose text held no action, or whose box was refused"],
];
const OUTCOMES = Object.fromEntries(FILTERS.map(([key, label]) => [key, label]));
const SORTS = [
  ["order", "sample order", (a, b) => a.index - b.index],
  ["final-down", "final IoU, best first", (a, b) => b.final - a.final],
  ["final-up", "final IoU, worst first", (a, b) => a.final - b.final],
  ["gain-down", "gain, largest first", (a, b) => b.gain - a.gain],
  ["gain-up", "gain, largest loss first", (a, b) => a.gain - b.gain],
  ["ahead", "lead over the run beside", (a, b) => lead(b) - lead(a)],
  ["behind", "lag behind the run beside", (a, b) => lead(a) - lead(b)],
];

const state = {
  a: 0, // index of the run that the list shows
  b: null, // index of the run beside it, or null
  query: "",
  found: null, // episodes of run a that the search found, or null: no search
  filter: "all",
  sort: "order",
  visible: [], // episodes of run a that pass search and filter, in order
  episode: null,
  step: 0, // -1 is the box an episode was given to start from
};

// ---- what an episode amounts to ------------------------------------------------------------

function prepare(run, number) {
  run.byKey = new Map();
  run.copies = new Map();
  run.episodes.forEach((episode, index) => prepareEpisode(run, number, episode, index));
}

function prepareEpisode(run, number, episode, index) {
  // The nth rollout of a sample is matched with the nth of another run.
  const key = episode.dataset + "\n" + episode.split + "\n" + episode.sample + "\n";
  episode.copy = (run.copies.get(key) || 0) + 1;
  run.copies.set(key, episode.copy);
  episode.key = key + episode.copy;
  run.byKey.set(episode.key, episode);
  [episode.run, episode.index] = [number, index];
  episode.gain = episode.final - episode.first;
  episode.stopped = episode.stopped === true;
  episode.unparsable = episode.unparsable === true;
  const [before, after] = [episode.first >= GOOD, episode.final >= GOOD];
  episode.outcome = before ? (after ? "right" : "broken") : after ? "corrected" : "wrong";
}

runs.forEach(prepare);

function beside(episode) {
  return state.b === null ? undefined : runs[state.b].byKey.get(episode.key);
}

function lead(episode) {
  const other = beside(episode);
  return other ? episode.final - other.final : 0;
}

// ---- building blocks -----------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null)); // a string becomes a text node
  return node;
}
const element = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const drawing = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const signed = (value, digits) => {
  const text = Math.abs(value).toFixed(digits);
  return (Number(text) === 0 ? "±" : value > 0 ? "+" : "−") + text;
};
const direction = (value, digits) => (Number(value.toFixed(digits)) === 0 ? "" : value > 0 ? " up" : " down");
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function badges(episode) {
  const made = [element("span", { class: "badge " + episode.outcome }, OUTCOMES[episode.outcome])];
  if (episode.unparsable) made.push(element("span", { class: "badge unparsable" }, "Unparsable"));
  if (episode.stopped) made.push(element("span", { class: "badge" }, "Stopped"));
  return made;
}

// ---- summary, filters, list ----------------------------------------------------------------

function showSummary() {
  const shown = [[runs[state.a], state.visible]];
  if (state.b !== null) shown.push([runs[state.b], state.visible.map(beside).filter(Boolean)]);
  const labels = [...document.querySelectorAll("#summary thead th")].map((cell) => cell.textContent);
  const rows = shown.map(([run, episodes]) => {
    const change = (measure) => {
      if (!episodes.length) return ["–"];
      const [from, to] = [mean(episodes.map((e) => measure(e.first))), mean(episodes.map((e) => measure(e.final)))];
      const difference = element("span", { class: "change" + direction(to - from, 3) }, signed(to - from, 3));
      return [`${from.toFixed(3)} → ${to.toFixed(3)} `, difference];
    };
    const cells = [
      [episodes.length.toLocaleString("en")],
      change((iou) => (iou >= GOOD ? 1 : 0)),
      change((iou) => iou),
      [episodes.length ? mean(episodes.map((e) => e.count)).toFixed(2) : "–"],
      [episodes.length ? (100 * mean(episodes.map((e) => (e.stopped ? 1 : 0)))).toFixed(1) + " %" : "–"],
    ];
    const row = element("tr", {}, element("th", { scope: "row", dir: "auto", title: run.name }, run.name));
    cells.forEach((cell, i) => {
      row.append(element("td", { "data-label": labels[i + 1] }, element("span", { class: "value" }, ...cell)));
    });
    return row;
  });
  document.querySelector("#summary tbody").replaceChildren(...rows);
  const started = runs[state.a].episodes.filter((e) => e.started).length;
  byId("started").textContent = started
    ? ` · ${started.toLocaleString("en")} began from a given box; step 0 is the first action after it`
    : "";
}

function refresh() {
  const found = state.found || runs[state.a].episodes;
  for (const [key, , test] of FILTERS) {
    byId("filter-" + key).setAttribute("aria-pressed", String(key === state.filter));
    byId("filter-" + key).lastChild.textContent = found.filter(test).length.toLocaleString("en");
  }
  const passes = FILTERS.find(([key]) => key === state.filter)[2];
  const order = SORTS.find(([key]) => key === state.sort)[2];
  state.visible = found.filter(passes).sort((a, b) => order(a, b) || a.index - b.index);
  byId("nothing").hidden = state.visible.length > 0;
  showSummary();
  if (state.episode === null || !state.visible.includes(state.episode)) {
    select(state.visible[0] || null);
  } else {
    showEpisode();
    revealRow();
  }
}

const list = byId("list");
let rowHeight = 60;

function showRows() {
  // Only the rows in view exist: the list may hold many thousands.
  rowHeight = 3.75 * parseFloat(getComputedStyle(document.documentElement).fontSize);
  const spacer = byId("spacer");
  spacer.style.height = state.visible.length * rowHeight + "px";
  const from = Math.max(0, Math.floor(list.scrollTop / rowHeight) - 5);
  const to = Math.min(state.visible.length, Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + 5);
  const rows = [];
  for (let position = from; position < to; position++) rows.push(makeRow(state.visible[position], position));
  spacer.replaceChildren(...rows);
  const selected = spacer.querySelector('[aria-selected="true"]');
  if (selected) list.setAttribute("aria-activedescendant", selected.id);
  else list.removeAttribute("aria-activedescendant");
}

function makeRow(episode, position) {
  const other = beside(episode);
  const ious = element("span", { class: "ious", title: "IoU of step 0 → final" + (other ? ", and final of the run beside" : "") },
    episode.first.toFixed(2) + " → ", element("b", {}, episode.final.toFixed(2)),
    other ? " | " + other.final.toFixed(2) : null);
  const row = element("div", {
    class: "row", role: "option", id: "row-" + position, title: episode.expression,
    "aria-selected": String(episode === state.episode),
    "aria-posinset": position + 1, "aria-setsize": state.visible.length,
  }, element("div", { class: "expression", dir: "auto" }, episode.expression || "(no expression)"),
  element("div", { class: "facts" }, ...badges(episode).slice(0, other ? 1 : 2),
    other && episode.unparsable ? element("span", { class: "badge unparsable", title: "Unparsable" }, "⚠") : null, ious));
  row.style.top = position * rowHeight + "px";
  row.addEventListener("click", () => select(episode));
  return row;
}

function revealRow() {
  showRows();
  const top = state.visible.indexOf(state.episode) * rowHeight;
  if (top < 0) return;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + rowHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + rowHeight - list.clientHeight;
  showRows();
}

// ---- one episode ---------------------------------------------------------------------------

const lastStep = (episode) => episode.count - 1;
const firstStep = (episode) => (episode.started ? -1 : 0);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const stepName = (episode, index) => (index < 0 ? "Start" : episode.steps[index].stop ? "Stop" : "Step " + index);
const boxAt = (episode, index) => (index < 0 ? episode.initial : episode.steps[index].box);
const iouAt = (episode, index) => (index < 0 ? episode.initialIou : episode.steps[index].iou);

function shownEpisodes() {
  const other = beside(state.episode);
  return other ? [state.episode, other] : [state.episode];
}

function stepRange() {
  const shown = shownEpisodes();
  return [Math.min(...shown.map(firstStep)), Math.max(...shown.map(lastStep), Math.min(...shown.map(firstStep)))];
}

function select(episode, step = 0) {
  state.episode = episode;
  state.step = episode ? clamp(step, ...stepRange()) : 0;
  showEpisode();
  revealRow();
}

function goToStep(step) {
  if (!state.episode) return;
  state.step = clamp(step, ...stepRange());
  showEpisode();
}

function showEpisode() {
  const { episode } = state;
  const head = byId("episode-head");
  const panels = byId("panels");
  if (!episode) {
    head.replaceChildren(element("h2", {}, "No episode to show"));
    panels.replaceChildren();
    byId("said").textContent = "No episode matches.";
    return;
  }
  const waiting = shownEpisodes().map(load).filter(Boolean);
  panels.setAttribute("aria-busy", String(waiting.length > 0));
  if (waiting.length) {
    Promise.all(waiting).then(() => {
      if (state.episode === episode) showEpisode();
    }, showProblem);
    return;
  }
  const position = state.visible.indexOf(episode) + 1;
  const place = [
    `${position.toLocaleString("en")} of ${state.visible.length.toLocaleString("en")}`,
    `sample ${episode.sample}` + (episode.copy > 1 ? ` (rollout ${episode.copy})` : ""),
    `image ${episode.imageId}, ${episode.size[1]}×${episode.size[0]}`, `${episode.dataset} / ${episode.split}`,
  ];
  head.replaceChildren(element("h2", { dir: "auto" }, episode.expression || "(no expression)"),
    element("p", { class: "place", dir: "auto" }, place.join(" · ")));
  panels.classList.toggle("two", state.b !== null);
  const focused = panels.contains(document.activeElement) ? document.activeElement.id : null;
  const made = [makePanel(runs[state.a], episode, "a")];
  if (state.b !== null) made.push(makePanel(runs[state.b], beside(episode), "b"));
  panels.replaceChildren(...made);
  const focusable = focused && byId(focused);
  if (focusable) focusable.focus({ preventScroll: true });
  const step = clamp(state.step, firstStep(episode), lastStep(episode));
  byId("said").textContent = `Episode ${position} of ${state.visible.length}, ` + (episode.steps.length || episode.started
    ? `${stepName(episode, step)}, IoU ${iouAt(episode, step).toFixed(3)}` : "no steps");
  rememberPlace();
  if (!content.chunk) {
    // The next episode is asked for before it is wanted; a failure shows when it is wanted.
    for (const next of [state.visible[position], state.visible[position - 2]]) {
      if (next) Promise.resolve(load(next)).then(() => { new Image().src = imageAddress(next.image); }, () => {});
    }
  }
}

function makePanel(run, episode, side) {
  const name = element("h3", { dir: "auto" }, run.name);
  if (!episode) {
    return element("section", { class: "panel", "aria-label": "Run " + run.name }, element("div", { class: "head" }, name),
      element("p", { class: "missing" }, "This run has no episode of this sample."));
  }
  const about = [
    episode.agent && episode.agent !== run.name ? episode.agent : null,
    episode.seed === undefined ? null : "seed " + episode.seed,
  ].filter(Boolean).join(" · ");
  const head = element("div", { class: "head" }, name, ...badges(episode), about ? element("span", { class: "place" }, about) : null);
  const step = clamp(state.step, firstStep(episode), Math.max(lastStep(episode), firstStep(episode)));
  const some = episode.steps.length > 0 || Boolean(episode.started);
  const details = element("div", { class: "details" });
  if (some) details.append(makeStrip(episode, step, side), ...makeWords(episode, step), makeCurve(episode, step));
  else details.append(element("p", { class: "missing" }, "This episode has no steps."));
  return element("section", { class: "panel", "aria-label": "Run " + run.name }, head, makeStage(episode, some ? step : null, side), details);
}

function makeStage(episode, step, side) {
  const [height, width] = episode.size;
  const image = element("div", { class: "image" });
  image.style.setProperty("--aspect", String(width / height));
  const known = images[side];
  if (!known || known.number !== episode.image || known.missing) images[side] = makeImage(episode);
  image.append(images[side].node, makeBoxes(episode, step));
  image.style.setProperty("--pixels", width + "px");
  const stage = element("div", { class: state.zoomed ? "stage zoomed" : "stage" }, image);
  image.addEventListener("click", (event) => {
    const place = image.getBoundingClientRect();
    zoom((event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height);
  });
  if (images[side].missing) stage.append(element("p", { class: "absent" }, images[side].missing));
  return stage;
}

// Every pixel of the image, or all of it; x and y say where to look, from 0 to 1.
function zoom(x, y) {
  state.zoomed = !state.zoomed;
  for (const stage of document.querySelectorAll(".panel .stage, .play .stage")) {
    stage.classList.toggle("zoomed", state.zoomed);
    const image = stage.firstElementChild;
    stage.scrollTo(x * image.offsetWidth - stage.clientWidth / 2, y * image.offsetHeight - stage.clientHeight / 2);
  }
}

function drawBox(overlay, [x1, y1, x2, y2], name) {
  const place = {
    x: 100 * x1 + "%", y: 100 * y1 + "%",
    width: 100 * Math.max(0, x2 - x1) + "%", height: 100 * Math.max(0, y2 - y1) + "%",
  };
  // A light line under the coloured one keeps a box visible on an image of its own colour.
  const group = drawing("g", {}, drawing("rect", { class: "casing of-" + name, ...place }), drawing("rect", { class: name, ...place }));
  overlay.append(group);
  return group;
}

function makeBoxes(episode, step) {
  const overlay = drawing("svg", { role: "img" });
  const current = step === null ? undefined : boxAt(episode, step);
  const drawn = new Set(current ? [String(current)] : []);
  const earlier = [];
  for (let index = (step === null ? 0 : step) - 1; index >= firstStep(episode); index--) {
    const box = boxAt(episode, index);
    if (!box || drawn.has(String(box))) continue;
    drawn.add(String(box));
    earlier.push(box);
  }
  for (let age = earlier.length - 1; age >= 0; age--) {
    drawBox(overlay, earlier[age], "earlier").style.opacity = String(Math.max(0.3, 0.8 - 0.2 * age));
  }
  if (current) drawBox(overlay, current, "current");
  drawBox(overlay, episode.target, "target");
  overlay.setAttribute("aria-label", "Target box" + (current ? " and current box" : ", no current box yet")
    + (earlier.length ? `, ${earlier.length} earlier` : ""));
  return overlay;
}

function makeStrip(episode, step, side) {
  const strip = element("div", { class: "strip", role: "group", "aria-label": "Steps" });
  for (let index = firstStep(episode); index <= lastStep(episode); index++) {
    const made = index < 0 ? null : episode.steps[index];
    const mark = made && (made.parseFailure || made.invalid !== undefined);
    const button = element("button", { type: "button", id: `step-${side}-${index}`, "aria-current": index === step ? "step" : null },
      element("span", { class: "name" }, stepName(episode, index), mark ? element("span", { class: "mark", title: "No usable box" }, " ⚠") : null),
      element("span", { class: "iou", title: "IoU with the target" }, iouAt(episode, index).toFixed(3)),
      made
        ? element("span", { class: "reward" + direction(made.reward, 3), title: "Reward of the step" }, "r " + signed(made.reward, 3))
        : element("span", { class: "reward" }, "given box"));
    button.addEventListener("click", () => goToStep(index));
    strip.append(button);
  }
  return strip;
}

function makeWords(episode, step) {
  const made = step < 0 ? {} : episode.steps[step];
  const measures = element("dl", { class: "measures" });
  const add = (name, ...value) => measures.append(element("dt", {}, name), element("dd", {}, ...value));
  const share = (value) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = 100 * clamp(value, 0, 1) + "%";
    return [value.toFixed(2), bar];
  };
  const box = boxAt(episode, step);
  const [height, width] = episode.size;
  add("Box", box
    ? `${Math.round(box[0] * width)}, ${Math.round(box[1] * height)} to ${Math.round(box[2] * width)}, ${Math.round(box[3] * height)} px`
    : "none yet");
  if (made.stopProbability !== undefined) add("Stop probability", ...share(made.stopProbability));
  if (made.confidence !== undefined) add("Confidence", ...share(made.confidence));
  const warn = (...said) => {
    add(...said);
    measures.lastChild.className = "warning";
  };
  if (made.parseFailure) warn("Unparsable", "the text holds no usable action");
  if (made.invalid !== undefined) warn("Refused", made.invalid);
  const words = made.text
    ? element("pre", { class: "words", dir: "auto", tabindex: "0", "aria-label": "The agent's text" }, made.text)
    : element("p", { class: "words none" }, step < 0 ? "The episode was given this box to start from." : "The agent gave no text.");
  return [measures, words];
}

function makeCurve(episode, step) {
  const [width, height, left, right, top, bottom] = [320, 150, 44, 14, 8, 74];
  const from = firstStep(episode);
  const count = lastStep(episode) - from + 1;
  const x = (index) => (count < 2 ? (left + width - right) / 2 : left + ((index - from) * (width - left - right)) / (count - 1));
  const y = (iou) => top + (1 - iou) * (height - top - bottom);
  const all = Array.from({ length: count }, (_, i) => from + i);
  const curve = drawing("svg", {
    class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": "IoU and reward by step: " + all.map((i) => `${stepName(episode, i)} ${iouAt(episode, i).toFixed(2)}`
      + (i < 0 ? "" : `, reward ${signed(episode.steps[i].reward, 2)}`)).join("; "),
  });
  for (const value of [0, 0.5, 1]) {
    curve.append(
      drawing("line", { class: value === GOOD ? "threshold" : "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      drawing("text", { x: left - 6, y: y(value) + 3.5, "text-anchor": "end" }, value.toFixed(1)));
  }
  curve.append(drawing("title", {}, "IoU (line) and reward (bars) of each step"));
  const [zero, tall] = [y(0) + 30, 20]; // the rewards have a strip of their own, from -1 to 1
  curve.append(drawing("line", { class: "grid", x1: left, x2: width - right, y1: zero, y2: zero }));
  curve.append(drawing("text", { x: left - 8, y: zero + 3.5, "text-anchor": "end" }, "reward"));
  for (const index of all) {
    if (index < 0) continue;
    const reach = clamp(episode.steps[index].reward, -1, 1) * tall;
    curve.append(drawing("rect", {
      class: reach < 0 ? "loss" : "gain", x: x(index) - 4, width: 8, y: reach < 0 ? zero : zero - reach, height: Math.abs(reach),
    }));
  }
  curve.append(drawing("polyline", { class: "line", points: all.map((i) => `${x(i)},${y(iouAt(episode, i))}`).join(" ") }));
  const every = Math.ceil(count / 8); // labels would touch each other beyond that
  for (const index of all) {
    if ((index - from) % every === 0) {
      const label = index < 0 ? "start" : episode.steps[index].stop ? "stop" : String(index);
      curve.append(drawing("text", { x: x(index), y: height - 5, "text-anchor": "middle" }, label));
    }
    curve.append(drawing("circle", { class: index === step ? "here" : null, cx: x(index), cy: y(iouAt(episode, index)), r: 3.5 }));
  }
  return curve;
}

// ---- the address: a link leads back to the same place ---------------------------------------

let pending = 0;

function rememberPlace() {
  // Browsers refuse an address that changes many times a second, as it would while a key is held.
  clearTimeout(pending);
  pending = setTimeout(() => {
    if (!state.episode) return;
    const place = new URLSearchParams({ sample: state.episode.sample, step: String(state.step) });
    if (state.episode.copy > 1) place.set("copy", String(state.episode.copy));
    if (findPlace(place) !== state.episode) { // another data set of this run has a sample of that name
      place.set("dataset", state.episode.dataset);
      place.set("split", state.episode.split);
    }
    if (runs.length > 1) {
      place.set("run", runs[state.a].name);
      place.set("beside", state.b === null ? "" : runs[state.b].name);
    }
    history.replaceState(null, "", "#" + place);
  }, 350);
}

function findPlace(place) {
  const copy = Number(place.get("copy") || 1);
  const fits = (e, what) => !place.has(what) || place.get(what) === e[what];
  return runs[state.a].episodes.find((e) => e.sample === place.get("sample") && e.copy === copy && fits(e, "dataset") && fits(e, "split"));
}

function readPlace() {
  const place = new URLSearchParams(location.hash.slice(1));
  const run = runs.findIndex((r) => r.name === place.get("run"));
  if (run >= 0) {
    state.a = run;
    const other = runs.findIndex((r) => r.name === place.get("beside"));
    state.b = other >= 0 && other !== run ? other : null;
  }
  const episode = findPlace(place);
  showControls();
  refresh();
  if (!episode) return;
  if (!state.visible.includes(episode)) {
    state.query = byId("search").value = "";
    state.found = null;
    state.filter = "all";
    refresh();
  }
  select(episode, Math.trunc(Number(place.get("step"))) || 0);
}

// ---- controls ------------------------------------------------------------------------------

function showControls() {
  byId("runs").hidden = runs.length < 2;
  byId("run-a").value = String(state.a);
  byId("run-b").value = state.b === null ? "" : String(state.b);
  for (const option of byId("sort").options) option.hidden = state.b === null && ["ahead", "behind"].includes(option.value);
  if (state.b === null && ["ahead", "behind"].includes(state.sort)) state.sort = "order";
  byId("sort").value = state.sort;
}

function setRuns(a, b) {
  const kept = state.episode;
  [state.a, state.b] = [a, b];
  state.episode = (kept && runs[a].byKey.get(kept.key)) || null;
  showControls();
  if (state.episode) state.step = clamp(state.step, ...stepRange());
  search();
}

function move(by) {
  if (!state.visible.length) return;
  select(state.visible[clamp(state.visible.indexOf(state.episode) + by, 0, state.visible.length - 1)]);
}

for (const [key, label, , meaning] of FILTERS) {
  const button = element("button", { type: "button", id: "filter-" + key, title: meaning }, label, element("span", { class: "number" }));
  button.addEventListener("click", () => {
    state.filter = key;
    list.scrollTop = 0;
    refresh();
  });
  byId("filters").append(button);
}
for (const [key, label] of SORTS) byId("sort").append(element("option", { value: key }, label));
byId("run-b").append(element("option", { value: "" }, "(none)"));
runs.forEach((run, index) => {
  byId("run-a").append(element("option", { value: index }, run.name));
  byId("run-b").append(element("option", { value: index }, run.name));
});

byId("sort").addEventListener("change", (event) => {
  state.sort = event.target.value;
  refresh();
});
byId("run-a").addEventListener("change", (event) => {
  const chosen = Number(event.target.value);
  setRuns(chosen, chosen === state.b ? state.a : state.b); // choosing the run beside swaps the two
});
byId("run-b").addEventListener("change", (event) => {
  const chosen = event.target.value === "" ? null : Number(event.target.value);
  if (chosen === state.a) setRuns(state.b === null ? state.a : state.b, state.b === null ? null : chosen);
  else setRuns(state.a, chosen);
});
let typing = 0;
byId("search").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    state.query = event.target.value;
    list.scrollTop = 0;
    search();
  }, 80);
});
let framed = false;
list.addEventListener("scroll", () => {
  if (framed) return;
  framed = true;
  requestAnimationFrame(() => {
    framed = false;
    showRows();
  });
});
window.addEventListener("resize", showRows);
window.addEventListener("hashchange", readPlace);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || state.playing) return;
  const field = byId("search");
  if (event.target === field) {
    if (event.key === "Escape" || event.key === "Enter") {
      list.focus();
      event.preventDefault();
    }
    return;
  }
  if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
  const actions = {
    ArrowLeft: () => goToStep(state.step - 1),
    ArrowRight: () => goToStep(state.step + 1),
    ArrowUp: () => move(-1),
    ArrowDown: () => move(1),
    k: () => move(-1),
    j: () => move(1),
    z: () => zoom(0.5, 0.5),
    Home: event.target === list ? () => move(-Infinity) : null,
    End: event.target === list ? () => move(Infinity) : null,
    "/": () => {
      field.focus();
      field.select();
    },
  };
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

if (runs.length > 1) state.b = 1;
readPlace();
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", showEpisode);
