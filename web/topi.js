// What ToPi's nodes show on the page: the frames of ToPi Mask Preview with a slider, the live mask on ToPi Patch,
// and the texts of ToPi Report, Compare and Save Profile. DOM widgets, so that both of ComfyUI's renderers show them.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LIVE = "topi.live";
const PAUSE_MS = 700;
const GONE = "This picture is gone from ComfyUI's temporary folder. Queue the workflow again to see it.";

// Every selector begins with .topi; comfy-test's linter cannot see that in here, and says so in a warning.
const STYLE = new CSSStyleSheet();
STYLE.replaceSync(`
.topi { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 0; box-sizing: border-box;
  font: 12px sans-serif; color: var(--input-text, #ddd); }
.topi-picture { flex: 1 1 0; min-height: 0; display: flex; gap: 4px; align-items: center; justify-content: center;
  background: var(--comfy-input-bg, #222); border-radius: 4px; overflow: hidden; text-align: center; }
.topi-picture img { flex: 1 1 0; min-width: 0; width: 100%; height: 100%; object-fit: contain; }
.topi-live img { image-rendering: pixelated; }
.topi-picture p { margin: 8px; opacity: .7; }
.topi-controls { display: flex; gap: 6px; align-items: center; }
.topi-controls input { flex: 1; min-width: 0; accent-color: #e0a800; }
.topi-controls button { width: 28px; padding: 2px 0; border: 0; border-radius: 4px; cursor: pointer; color: inherit;
  background: var(--comfy-input-bg, #333); }
.topi-status { min-height: 1.3em; overflow-wrap: anywhere; }
.topi-text { flex: 1 1 0; min-height: 0; margin: 0; padding: 6px; overflow: auto; user-select: text; white-space: pre-wrap;
  font: 11px monospace; background: var(--comfy-input-bg, #222); border-radius: 4px; }
`);

function element(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

/** Puts an element on a node; nothing of it is saved with the workflow or sent with a prompt. */
function addWidget(node, root, minHeight, onRemoved) {
  root.classList.add("topi");
  root.style.minHeight = `${minHeight - 20}px`; // for the Vue renderer; the canvas asks getMinHeight, with its margins
  const widget = node.addDOMWidget("topi", "topi", root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => minHeight,
  });
  widget.serialize = false;
  widget.serializeValue = () => undefined;
  const before = node.onRemoved;
  node.onRemoved = function () {
    onRemoved?.();
    return before?.apply(this, arguments);
  };
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

/** The part of a node that pictures and their placeholders share. */
function pictures() {
  const root = element("div", "topi-picture");
  return {
    root,
    show(images) {
      const gone = images.some((image) => image.topiGone);
      root.replaceChildren(...(gone ? [element("p", "", GONE)] : images));
    },
    say(sentence) {
      root.replaceChildren(element("p", "", sentence));
    },
  };
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

/** ToPi Mask Preview: one frame an anchor, with a slider. Returns what takes the node's outputs. */
function maskViewer(node) {
  node.hideOutputImages = true; // ours instead of ComfyUI's own grid of the same pictures: in the Vue renderer ...
  node.onDrawBackground = () => {}; // ... and on the canvas
  const root = element("div");
  const picture = pictures();
  const button = element("button", "", "▶");
  const slider = element("input");
  const status = element("div", "topi-status");
  const controls = element("div", "topi-controls");
  controls.append(button, slider);
  root.append(picture.root, controls, status);
  button.title = "Play or pause";
  button.setAttribute("aria-label", button.title);
  Object.assign(slider, { type: "range", min: 0, max: 0, step: 1, value: 0 });
  slider.setAttribute("aria-label", "Anchor");
  picture.say("Queue the workflow to see what the model used.");
  controls.style.display = "none";

  let images = [];
  let frames = [];
  let note = "";
  let timer = null;

  function show(index) {
    slider.value = index;
    if (images[index]) picture.show([images[index]]);
    const f = frames[index];
    const parts = f ? [`step ${f.step}`, `σ ${f.sigma}`, `kept ${f.kept} of ${f.tokens} (${percent(f.share)})`] : [];
    if (f?.images > 1) parts.push(`image ${f.image + 1} of ${f.images}`);
    if (note) parts.push(note);
    status.textContent = parts.join(" · ");
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    button.textContent = "▶";
  }

  function play() {
    button.textContent = "⏸";
    timer = setInterval(() => show((Number(slider.value) + 1) % images.length), PAUSE_MS);
  }

  function load(file) {
    const image = new Image();
    image.draggable = false;
    image.onerror = () => {
      image.topiGone = true;
      if (images[Number(slider.value)] === image) show(Number(slider.value));
    };
    image.src = api.apiURL(`/view?${new URLSearchParams(file)}`);
    return image;
  }

  button.addEventListener("click", () => (timer === null ? play() : pause()));
  slider.addEventListener("input", () => {
    pause();
    show(Number(slider.value));
  });
  addWidget(node, root, 220, pause);

  return (output) => {
    if (!output?.images?.length) return;
    pause();
    images = output.images.map(load);
    frames = output.frames ?? [];
    note = output.note?.[0] ?? "";
    slider.max = images.length - 1;
    controls.style.display = images.length > 1 ? "" : "none";
    show(Math.min(Number(slider.value), images.length - 1));
  };
}

/** ToPi Report and ToPi Compare: the text on the node. */
function textViewer(node, minHeight) {
  const root = element("div");
  const text = element("pre", "topi-text");
  root.append(text);
  addWidget(node, root, minHeight);
  return (output) => {
    if (output?.text) text.textContent = [output.text].flat().join("\n");
  };
}

/** ToPi Patch: the mask of the run that is going on; the widget is made when the first one comes. */
function liveViewer(node) {
  const root = element("div", "topi-live");
  const picture = pictures();
  const status = element("div", "topi-status");
  root.append(picture.root, status);
  addWidget(node, root, 220);
  return (anchor) => {
    const images = anchor.pictures.map((source) => Object.assign(new Image(), { src: source, draggable: false }));
    picture.show(images);
    const kept = anchor.share === 1 ? `all ${anchor.tokens} tokens` : `kept ${percent(anchor.share)} of ${anchor.tokens}`;
    status.textContent = `step ${anchor.step} · σ ${anchor.sigma} · ${kept}`;
  };
}

const VIEWERS = {
  ToPiMaskPreview: maskViewer,
  ToPiReport: (node) => textViewer(node, 240),
  ToPiSaveProfile: (node) => textViewer(node, 130),
  ToPiCompare: (node) => textViewer(node, 50),
};

/** What we show on a node: `show` takes its outputs, `shown` says whether it has any yet, `live` an anchor's event. */
const views = new WeakMap();

function show(node, output) {
  const view = views.get(node);
  if (!view?.show || !output) return;
  view.shown = true;
  view.show(output);
}

const rootGraph = () => app.rootGraph ?? app.graph;

/** [execution id, node] of every node, also in subgraphs: "5", "7:3". */
function* everyNode(graph = rootGraph(), prefix = "") {
  for (const node of graph?.nodes ?? []) {
    yield [prefix + node.id, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${prefix}${node.id}:`);
  }
}

function nodeOf(executionId) {
  for (const [id, node] of everyNode()) if (id === String(executionId)) return node;
}

/** Gives nodes their last outputs back after a reload, and after a run that ended while another tab was open. */
async function restore() {
  const empty = [...everyNode()].filter(([, node]) => views.get(node)?.show && !views.get(node).shown);
  const workflow = rootGraph()?.id;
  if (!empty.length || !workflow) return;
  const answer = await api.fetchApi("/history?max_items=16");
  if (!answer.ok) return;
  for (const { prompt, outputs } of Object.values(await answer.json()).reverse()) {
    if (prompt[3]?.extra_pnginfo?.workflow?.id !== workflow) continue;
    for (const [id, node] of empty)
      if (!views.get(node).shown && prompt[2][id]?.class_type === node.comfyClass) show(node, outputs[id]);
  }
}

app.registerExtension({
  name: "topi.viewer",
  settings: [
    {
      id: LIVE,
      category: ["ToPi", "Live view", "topi.live"],
      name: "Show on ToPi Patch what is kept while the sampler runs",
      type: "boolean",
      defaultValue: true,
    },
  ],

  setup() {
    document.adoptedStyleSheets.push(STYLE); // adds nothing to the page's own elements
    api.addEventListener("topi.anchor", ({ detail }) => {
      if (app.extensionManager?.setting?.get(LIVE) === false) return;
      const node = nodeOf(detail.node);
      if (node?.comfyClass !== "ToPiPatch") return;
      if (!views.has(node)) views.set(node, { live: liveViewer(node) });
      views.get(node).live(detail);
    });
  },

  nodeCreated(node) {
    const make = VIEWERS[node.comfyClass];
    if (!make) return;
    views.set(node, { show: make(node), shown: false });
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      show(this, output);
      return before?.apply(this, arguments);
    };
  },

  /** ComfyUI puts a tab's outputs back when one returns to it; ids in there are execution ids or those of subgraphs. */
  onNodeOutputsUpdated(outputs) {
    for (const [id, node] of everyNode()) show(node, outputs[id] ?? outputs[`${node.graph?.id}:${node.id}`]);
  },

  async afterConfigureGraph() {
    // a little later, as ComfyUI puts the outputs of a tab back only after this
    setTimeout(() => restore().catch((error) => console.warn("ToPi: no outputs were restored", error)), 300);
  },
});
