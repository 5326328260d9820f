"use strict";
// Where the page gets what it shows: from its own JSON blocks, or as JSON from the server that it came
// from. All of it is set as text, never as markup.

const byId = (id) => document.getElementById(id);
const content = JSON.parse(byId("content").textContent);
const runs = content.runs;
// The version keeps an image that the browser stored from being taken for one of another run.
const imageAddress = (number) => `image/${number}?version=${content.version}`;

async function getJson(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

/** Nothing if the episode's steps are here, else a promise that they will be. */
function load(episode) {
  if (episode.steps) return null;
  if (content.chunk) {
    const chunk = Math.floor(episode.index / content.chunk);
    const block = byId(`details-${episode.run}-${chunk}`);
    JSON.parse(block.textContent).forEach((row, place) => {
      Object.assign(runs[episode.run].episodes[chunk * content.chunk + place], row);
    });
    block.remove();
    return null;
  }
  if (!episode.pending) {
    episode.pending = getJson(`episode?run=${episode.run}&index=${episode.index}`)
      .then((row) => Object.assign(episode, row))
      .finally(() => delete episode.pending);
  }
  return episode.pending;
}

let searches = 0;
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** The search is done in slices, so that the page stays alive while it reads thousands of texts. */
async function search() {
  const mine = ++searches;
  const run = runs[state.a];
  const query = state.query.trim().toLowerCase();
  if (!query) {
    state.found = null;
    refresh();
    return;
  }
  const found = [];
  if (content.chunk) {
    let since = performance.now();
    for (const episode of run.episodes) {
      if (episode.haystack === undefined) {
        load(episode);
        const texts = episode.steps.map((s) => s.text || "");
        episode.haystack = [episode.expression, episode.sample, ...texts].join("\n").toLowerCase();
      }
      if (episode.haystack.includes(query)) found.push(episode);
      if (performance.now() - since > 20) {
        await pause();
        if (mine !== searches) return;
        since = performance.now();
      }
    }
  } else {
    try {
      const places = await getJson(`search?run=${state.a}&query=${encodeURIComponent(query)}`);
      found.push(...places.map((place) => run.episodes[place]).filter(Boolean));
    } catch (error) {
      showProblem(error);
      return;
    }
    if (mine !== searches) return;
  }
  state.found = found;
  refresh();
}

function showProblem(error) {
  const gone = error instanceof TypeError; // what fetch throws where no server answers
  const words = gone ? "The server does not answer: start the command again and reload this page." : error.message;
  byId("panels").replaceChildren(element("p", { class: "missing", role: "alert" }, words));
}

// ---- images ------------------------------------------------------------------------------

const images = {}; // the image element of each panel: a step redraws the boxes, not the image

function makeImage(episode) {
  const node = element("img", { alt: "Image " + episode.imageId });
  const made = { number: episode.image, node, missing: null };
  const lacks = (reason) => {
    made.missing = "The image is not here. " + reason;
    node.removeAttribute("src");
    node.setAttribute("alt", "");
  };
  if (!content.chunk) {
    node.addEventListener("error", async () => {
      if (!node.hasAttribute("src")) return;
      node.removeAttribute("src");
      try {
        lacks(await (await fetch(imageAddress(episode.image))).text());
      } catch (error) {
        lacks("The server does not answer.");
      }
      const stage = node.closest(".stage");
      if (stage) stage.append(element("p", { class: "absent" }, made.missing));
    });
    node.src = imageAddress(episode.image);
  } else if (document.readyState === "loading") {
    made.number = null; // its block may be there in part; the end of loading draws again
  } else {
    const source = JSON.parse(byId("image-" + episode.image).textContent);
    if (typeof source === "string") node.src = source;
    else lacks(source.missing);
  }
  return made;
}
