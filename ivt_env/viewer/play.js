// Playing: a person draws boxes, the server's environment takes them. While an episode runs, the page
// knows neither the target nor any IoU; with its last action come both, and the episode joins the list.

const board = byId("board");
const edges = [0, 1, 2, 3].map((i) => byId("edge-" + i)); // left, top, right, bottom in pixels
const play = {
  now: null, // what the server said of the running episode
  draft: null, // the box being drawn, relative x1, y1, x2, y2
  waiting: false, // for the server's answer
};
const SMALLEST = 3; // a drag of fewer screen pixels is a click

async function ask(what, message) {
  const answer = await fetch(what, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-IVT-Token": content.play.token },
    body: JSON.stringify(message),
  });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return JSON.parse(text);
}

function sayProblem(words) {
  byId("play-problem").textContent = words;
}

async function attempt(task) {
  if (play.waiting) return;
  play.waiting = true;
  sayProblem("");
  showActions();
  try {
    await task();
  } catch (error) {
    sayProblem(error instanceof TypeError ? "The server does not answer. Is `ivt play` still running?" : error.message);
  } finally {
    play.waiting = false;
    showActions();
  }
}

// ---- an episode ----------------------------------------------------------------------------

const begin = () => attempt(async () => {
  const said = await ask("start", {});
  if (said.finished) {
    showAfter(said);
    return;
  }
  play.now = said;
  play.draft = null;
  state.playing = true;
  byId("play-expression").textContent = said.expression || "(no expression)";
  board.style.setProperty("--aspect", String(said.size[1] / said.size[0]));
  board.style.setProperty("--pixels", said.size[1] + "px");
  byId("board-image").src = imageAddress(said.image);
  edges.forEach((edge, i) => { edge.max = String(said.size[i % 2 ? 0 : 1]); });
  showMode();
  showBoard();
  showEdges();
  board.focus({ preventScroll: true });
  byId("said").textContent = `Image ${said.number} of ${said.total}. Find: ${said.expression}`;
});

const propose = () => attempt(async () => {
  if (!play.now || !play.draft) return;
  await act({ box: play.draft });
  if (play.now) {
    play.draft = null; // the next arrow takes the proposal up again
    showBoard();
    showEdges();
  }
});

const stop = () => attempt(async () => {
  if (play.now) await act({ stop: true });
});

async function act(action) {
  const { number, step } = play.now;
  const said = await ask("act", { number, step, ...action });
  if (said.over) {
    finish(said);
    return;
  }
  Object.assign(play.now, said);
  if (said.invalid) sayProblem("Refused: " + said.invalid + ". The step is used up, the box stays.");
  showBoard();
  byId("said").textContent = `Proposal made, ${play.now.max_steps - said.step} left. Refine it or stop.`;
}

function finish(said) {
  const run = runs[0];
  const episode = { ...said.short, ...said.details };
  run.episodes.push(episode);
  prepareEpisode(run, 0, episode, run.episodes.length - 1);
  [play.now, play.draft, state.playing] = [null, null, false];
  [state.query, state.found, state.filter] = ["", null, "all"];
  byId("search").value = "";
  showMode();
  refresh();
  select(episode, lastStep(episode));
  showAfter(said);
  byId("said").textContent = `Over: final IoU ${episode.final.toFixed(3)}. The dashed box is the target.`;
  byId("play-next").focus({ preventScroll: true });
}

function showAfter(said) {
  byId("play-so-far").textContent = `${said.played} of ${said.total} played, saved in ${said.folder}`
    + (said.finished ? ". That was the last one: end `ivt play` with Ctrl-C in its terminal." : "");
  byId("play-next").hidden = said.finished;
  byId("play-after").hidden = false;
  byId("play-body").hidden = true;
  byId("play-expression").parentElement.hidden = true;
}

function showMode() {
  const running = play.now !== null;
  for (const part of [byId("episode-top"), byId("panels"), byId("play-after")]) part.hidden = running;
  for (const part of [byId("play-body"), byId("play-expression").parentElement]) part.hidden = !running;
  document.querySelector(".side").inert = running;
}

// ---- the board -----------------------------------------------------------------------------

function showBoard() {
  const { now, draft } = play;
  if (!now) return;
  const overlay = byId("board-boxes");
  overlay.replaceChildren();
  for (const box of now.earlier) drawBox(overlay, box, "earlier");
  if (now.box) drawBox(overlay, now.box, "current");
  if (draft) drawBox(overlay, draft, "draft");
  byId("play-place").textContent = `Image ${now.number} of ${now.total} · `
    + `${now.max_steps - now.step} of ${now.max_steps} proposals left · ${now.dataset} / ${now.split} · `
    + "the score comes at the end";
  showActions();
}

/** The box in numbers, wherever it did not come from the numbers themselves. */
function showEdges() {
  const [height, width] = play.now.size;
  edges.forEach((edge, i) => {
    edge.value = play.draft ? String(Math.round(play.draft[i] * (i % 2 ? height : width))) : "";
  });
}

function showActions() {
  const idle = play.now !== null && !play.waiting;
  // A button that loses focus by being disabled would throw a keyboard user back to the top.
  byId("play-propose").setAttribute("aria-disabled", String(!idle || !play.draft));
  byId("play-stop").setAttribute("aria-disabled", String(!idle));
}

function where(event) {
  const { left, top, width, height } = board.getBoundingClientRect();
  return [clamp((event.clientX - left) / width, 0, 1), clamp((event.clientY - top) / height, 0, 1)];
}

let from = null; // where a drag began: relative, and on the screen
let pointed = [0.5, 0.5]; // where the mouse was last, relative

board.addEventListener("pointerdown", (event) => {
  if (!play.now || event.button !== 0) return;
  board.setPointerCapture(event.pointerId);
  from = { at: where(event), x: event.clientX, y: event.clientY };
});
board.addEventListener("pointermove", (event) => {
  pointed = where(event);
  if (!from || Math.abs(event.clientX - from.x) < SMALLEST || Math.abs(event.clientY - from.y) < SMALLEST) return;
  const [x, y] = pointed;
  play.draft = [Math.min(x, from.at[0]), Math.min(y, from.at[1]), Math.max(x, from.at[0]), Math.max(y, from.at[1])];
  showBoard();
  showEdges();
});
for (const name of ["pointerup", "pointercancel"]) board.addEventListener(name, () => { from = null; });

function nudge(dx, dy, edgesOnly) {
  const [height, width] = play.now.size;
  const [sx, sy] = [dx / width, dy / height];
  // The first arrow takes the last proposal up, or puts a box in the middle.
  const box = play.draft || play.now.box || [0.3, 0.3, 0.7, 0.7];
  const least = [1 / width, 1 / height];
  const [mx, my] = [clamp(sx, -box[0], 1 - box[2]), clamp(sy, -box[1], 1 - box[3])];
  play.draft = edgesOnly
    ? [box[0], box[1], clamp(box[2] + sx, box[0] + least[0], 1), clamp(box[3] + sy, box[1] + least[1], 1)]
    : [box[0] + mx, box[1] + my, box[2] + mx, box[3] + my];
  showBoard();
  showEdges();
  const [left, top, right, bottom] = edges.map((edge) => edge.value);
  byId("said").textContent = `Box from ${left}, ${top} to ${right}, ${bottom}`;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

board.addEventListener("keydown", (event) => {
  if (!play.now || event.altKey || event.metaKey) return;
  const arrow = ARROWS[event.key];
  if (arrow) {
    const far = Math.max(1, Math.round(Math.max(...play.now.size) / 200)) * (event.ctrlKey ? 10 : 1);
    nudge(arrow[0] * far, arrow[1] * far, event.shiftKey);
  } else if (event.key === "Enter") propose();
  else if (event.key === "s" && !event.ctrlKey) stop();
  else if (event.key === "z" && !event.ctrlKey) zoom(...pointed);
  else return;
  event.preventDefault();
  event.stopPropagation();
});
edges.forEach((edge) => {
  edge.addEventListener("input", () => {
    if (!play.now) return;
    const [height, width] = play.now.size;
    const values = edges.map((other, i) => (other.value === "" ? NaN : clamp(Number(other.value) / (i % 2 ? height : width), 0, 1)));
    play.draft = values.every(Number.isFinite) && values[0] < values[2] && values[1] < values[3] ? values : null;
    showBoard();
  });
  edge.addEventListener("keydown", (event) => {
    if (event.key === "Enter") propose();
  });
});
byId("play-propose").addEventListener("click", propose);
byId("play-stop").addEventListener("click", stop);
byId("play-zoom").addEventListener("click", () => zoom(...pointed));
byId("play-next").addEventListener("click", begin);
document.addEventListener("keydown", (event) => {
  if (event.key === "n" && !state.playing && !byId("play-next").hidden && event.target.tagName !== "INPUT"
    && !event.ctrlKey && !event.metaKey && !event.altKey) begin();
});

byId("play").hidden = false;
begin();
