
"use strict";
// ---------------------------------------------------------------- what came with the page
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), { model, picture, cards, table } = data;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer), shorts = text => new Uint16Array(bytes(text).buffer);
const n = data.shown, K = cards.length, away = floats(data.away);
const values = table && floats(table.values), C = table ? table.names.length : 0;

const stages = (() => {  // each: tau, count, mass (count), and where the probabilities of each document begin (n + 1)
  const masses = floats(picture.masses), counts = bytes(picture.counts);
  let from = 0, at = 0;
  return picture.stages.map((row, s) => {
    const begin = new Uint32Array(n + 1);
    for (let i = 0; i < n; i++) { begin[i] = at; at += counts[s * n + i]; }
    begin[n] = at;
    return { ...row, begin, mass: masses.subarray(from, from += row.count) };
  });
})();
const which = shorts(picture.which), much = shorts(picture.much);
const FITTED = stages.length - 1, COLDEST = FITTED - 1;
const maps = picture.maps.map(one => {  // places of documents (n x 2), and of the prototypes at each stage (count x 2)
  const P = floats(one.prototypes);
  let from = 0;
  return { ...one, documents: floats(one.documents), prototypes: stages.map(({ count }) => P.subarray(2 * from, 2 * (from += count))) };
});
const state = { stage: FITTED, document: -1, prototype: -1, query: "", matches: null, map: maps[0] };

// ---------------------------------------------------------------- words and numbers
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const number = (x, digits = 3) => x === null || x === undefined ? "–" : x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e7) ? x.toExponential(digits - 1) : x.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.floor(Math.log10(Math.abs(x) || 1)) + 1) });
const percent = x => x > 0 && x < 0.001 ? "under 0.1 %" : x < 1 && x > 0.999 ? "over 99.9 %" : `${(100 * x).toLocaleString("en", { maximumFractionDigits: x < 0.1 ? 1 : 0 })} %`;
const signed = x => (x > 0 ? "+" : "−") + Math.abs(x).toFixed(1) + " s.d.";
const far = x => Math.abs(x) < 0.1 ? "near the mean" : (Math.abs(x) >= 2 ? "far " : Math.abs(x) >= 1 ? "" : Math.abs(x) >= 0.5 ? "somewhat " : "slightly ") + (x > 0 ? "above" : "below");
const called = i => data.ids ? data.ids[i] : `row ${data.rows[i].toLocaleString("en")}`;
const isolated = text => `\u2068${text}\u2069`;  // a name in running text keeps its direction to itself
const merged = model.fitted > model.clusters, thing = data.texts ? "document" : "row";
const numbered = k => merged ? model.numbers[k] : model.labels[k];
const columnWords = ([i, , apart]) => `${table.names[i]} ${apart > 0 ? "↑" : "↓"}`;
const nickname = k => cards[k].words.length ? cards[k].words.slice(0, 3).join(", ") : cards[k].columns.slice(0, 2).map(columnWords).join(", ");
const titleOf = k => nickname(k) || (data.texts ? "(no characteristic words)" : "like the mean of all");
const inShort = i => data.texts ? data.texts[i] : outstanding(i, 3).map(([c, value, apart]) => `${table.names[c]} ${number(value, 4)} (${signed(apart)})`).join(", ") || "near the mean in every column";

function outstanding(i, most) {  // columns of a document farthest from the mean: [column, value, standard deviations]
  const found = [];
  for (let c = 0; c < C; c++) if (table.deviation[c] > 0) found.push([c, values[i * C + c], (values[i * C + c] - table.mean[c]) / table.deviation[c]]);
  return found.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, most);
}

function make(name, attributes = {}, ...children) {  // an element; texts stay texts
  const drawn = ["svg", "path", "line", "circle", "text", "g"].includes(name);
  const element = drawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "css") Object.assign(element.style, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

// ---------------------------------------------------------------- assignments
const sharesOf = (i, s) => Array.from({ length: stages[s].begin[i + 1] - stages[s].begin[i] }, (_, r) => [which[stages[s].begin[i] + r], much[stages[s].begin[i] + r] / 65535]);

const seen = new Map();
function assigned(s) {  // nearest prototype, its probability, and the mixed colour of every document at a stage
  if (seen.has(s)) return seen.get(s);
  const { begin } = stages[s], palette = colours[s], best = new Uint16Array(n), sure = new Float32Array(n), colour = new Float32Array(3 * n);
  for (let i = 0; i < n; i++) {
    let sum = 0, mix = [0, 0, 0];
    for (let e = begin[i]; e < begin[i + 1]; e++) {
      sum += much[e];
      for (let a = 0; a < 3; a++) mix[a] += much[e] * palette[3 * which[e] + a];
    }
    best[i] = which[begin[i]]; sure[i] = much[begin[i]] / 65535;
    colour.set(mix.map(x => x / sum), 3 * i);
  }
  const found = { best, sure, colour };
  seen.set(s, found);
  return found;
}

const homes = (() => {  // for each stage the prototype that holds each fitted prototype
  const found = [];
  found[FITTED] = [...cards.keys()];
  found[COLDEST] = stages[FITTED].parents;
  for (let s = COLDEST; s > 0; s--) found[s - 1] = found[s].map(k => stages[s].parents[k]);
  return found;
})();

// ---------------------------------------------------------------- colours: one for each cluster, mixed in OKLab
let dark = false, ink = "#000", paper = "#fff", quiet = "#555", line = "#ccc", colours = [];
function light(L, a, b) {  // OKLab to linear red, green and blue
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3, m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3, s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s, -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s].map(x => Math.min(1, Math.max(0, x)));
}
const css = (L, a, b, alpha = 1) => `rgba(${light(L, a, b).map(x => Math.round(255 * (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055))).join()},${alpha})`;
const bright = (L, a, b) => { const [red, green, blue] = light(L, a, b); return 0.2126 * red + 0.7152 * green + 0.0722 * blue; };

const ranks = () => {  // clusters in the order of the streams below the map, so that those that part late have hues near each other
  const sums = Array.from({ length: model.clusters }, () => [0, 0]);
  homes[COLDEST].forEach((home, k) => { const [a, b] = flow.bands[COLDEST][home]; sums[model.labels[k]][0] += a + b; sums[model.labels[k]][1]++; });
  const order = [...sums.keys()].sort((a, b) => sums[a][0] / (sums[a][1] || 1) - sums[b][0] / (sums[b][1] || 1));
  return order.reduce((found, c, rank) => (found[c] = rank, found), []);
};

function clusterColour(rank) {  // a wheel of hues in three lightnesses
  const hue = (25 + 360 * rank / Math.max(model.clusters, 3)) * Math.PI / 180, L = (dark ? 0.75 : 0.6) + [0, -0.09, 0.08][rank % 3] * (model.clusters > 6);
  return [L, 0.15 * Math.cos(hue), 0.15 * Math.sin(hue)];
}

function mixColours() {  // of the prototypes at every stage: those of the documents they hold, then means of their children
  const rank = ranks(), palette = Array.from({ length: K }, (_, k) => clusterColour(rank[model.labels[k]]));
  colours = [];
  colours[FITTED] = Float32Array.from(palette.flat());
  colours[COLDEST] = ofDocuments();
  for (let s = COLDEST - 1; s >= 0; s--) {
    const sums = Array.from({ length: stages[s].count }, () => [0, 0, 0, 0]);
    stages[s + 1].parents.forEach((parent, k) => add(sums[parent], colours[s + 1].subarray(3 * k), stages[s + 1].mass[k] + 1e-9));
    colours[s] = mean(sums);
  }
}

function add(sum, colour, weight) { for (let a = 0; a < 3; a++) sum[a] += weight * colour[a]; sum[3] += weight; }
const mean = sums => Float32Array.from(sums.flatMap(sum => sum[3] ? [0, 1, 2].map(a => sum[a] / sum[3]) : [0.6, 0, 0]));
function ofDocuments() {  // colours at the coldest stage: of the fitted prototypes of the documents that each prototype has
  const { begin, count } = stages[COLDEST], sums = Array.from({ length: count }, () => [0, 0, 0, 0]);
  for (let i = 0; i < n; i++) for (let e = begin[i]; e < begin[i + 1]; e++) add(sums[which[e]], colours[FITTED].subarray(3 * which[stages[FITTED].begin[i]]), much[e]);
  return mean(sums);
}

const colourOf = (s, k, alpha) => css(colours[s][3 * k], colours[s][3 * k + 1], colours[s][3 * k + 2], alpha);
const onDisc = (s, k) => bright(...colours[s].subarray(3 * k, 3 * k + 3)) > 0.179 ? "#000000" : "#ffffff";

function theme() {
  const chosen = document.documentElement.dataset.theme;
  dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const style = getComputedStyle(document.body), probe = name => { const e = make("span", { css: { color: `var(--${name})` } }); document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return c; };
  ink = style.color; paper = probe("card"); quiet = probe("quiet"); line = probe("line");
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colours`);
  seen.clear();
  painted = null;
  mixColours();
}

// ---------------------------------------------------------------- the map
const map = $("map"), view = { x: 0, y: 0, scale: 1 };
let width = 1, height = 1, tween = null;
const line1 = model.features === 1;  // one axis only: heights are drawn apart
const jitter = i => line1 ? (Math.sin(i * 12.9898) * 43758.5453 % 1) * 0.15 * view.whole[0] : 0;
let centre = [0, 0];

function frame() {  // what the whole map shows: nearly all documents, and all prototypes
  const { documents, prototypes } = state.map, range = axis => {
    const xs = Float64Array.from({ length: n }, (_, i) => documents[2 * i + axis]).sort(), own = [...prototypes[FITTED]].filter((_, i) => i % 2 === axis);
    return [Math.min(xs[Math.floor(0.004 * (n - 1))], ...own), Math.max(xs[Math.ceil(0.996 * (n - 1))], ...own)];
  };
  const [x0, x1] = range(0), [y0, y1] = range(1);
  centre = [(x0 + x1) / 2, (y0 + y1) / 2];
  Object.assign(view, { x: 0, y: 0, scale: 1, whole: x1 > x0 || y1 > y0 ? [Math.max(x1 - x0, 1e-9), Math.max(y1 - y0, 1e-9)] : [1, 1] });
  if (line1) view.whole[1] = 0.3 * view.whole[0];
}
const unit = () => Math.min((width - 70) / view.whole[0], (height - 118) / view.whole[1]) * view.scale;
const place = (x, y) => [width / 2 + (x - centre[0]) * unit() + view.x, height / 2 + 14 - (y - centre[1]) * unit() + view.y];
const placeOf = i => place(state.map.documents[2 * i], state.map.documents[2 * i + 1] + jitter(i));
const placeOfPrototype = (s, k) => place(state.map.prototypes[s][2 * k], state.map.prototypes[s][2 * k + 1]);

function prototypesShown() {  // where the prototypes of this stage are drawn, between two stages while they move
  const s = tween?.finer ?? state.stage, stage = stages[s], t = tween ? tween.at : 1;
  return Array.from({ length: stage.count }, (_, k) => {
    const [x, y] = placeOfPrototype(s, k), from = tween?.finer ? placeOfPrototype(s - 1, stage.parents[k]) : [x, y];
    const [px, py] = [from[0] + (x - from[0]) * t, from[1] + (y - from[1]) * t];
    return { s, k, x: px, y: py, mass: s === FITTED ? cards[k].share : stage.mass[k], members: members(s, k) };
  });
}
const groups = new Map();
function members(s, k) {  // fitted prototypes inside this one
  if (!groups.has(s)) groups.set(s, homes[s].reduce((found, home, j) => (found[home].push(j), found), Array.from({ length: stages[s].count }, () => [])));
  return groups.get(s)[k];
}

function fit2(canvas) {  // size in CSS pixels, drawn at the resolution of the screen
  const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * ratio)); canvas.height = Math.max(1, Math.round(box.height * ratio));
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [pen, box.width, box.height];
}

const chosen = i => state.matches ? state.matches.has(i) : state.prototype < 0 || assigned(FITTED).best[i] === state.prototype;
const radius = () => (n < 60 ? 6 : n < 300 ? 4.5 : n < 900 ? 3.6 : 3) * Math.min(1.8, Math.max(1, view.scale ** 0.35));

function drawMap() {
  let pen;
  [pen, width, height] = fit2(map);
  pen.clearRect(0, 0, width, height);
  drawAxes(pen);
  const now = assigned(state.stage).colour, before = tween ? assigned(tween.from).colour : now, t = tween ? tween.passed : 1, r = radius();
  const filtered = state.matches !== null || state.prototype >= 0;
  for (const pass of filtered ? [false, true] : [true]) for (let i = 0; i < n; i++) {
    if (chosen(i) !== pass) continue;
    const [x, y] = placeOf(i);
    if (x < -r || y < -r || x > width + r || y > height + r) continue;
    const mix = a => before[3 * i + a] + (now[3 * i + a] - before[3 * i + a]) * t;
    pen.fillStyle = pass ? css(mix(0), mix(1), mix(2), filtered ? 0.95 : 0.72) : css(mix(0), mix(1) * 0.25, mix(2) * 0.25, 0.16);
    pen.beginPath(); pen.arc(x, y, r, 0, 7); pen.fill();
  }
  if (state.document >= 0) {
    const [x, y] = placeOf(state.document);
    ring(pen, x, y, r + 4, ink, 2.5);
  }
  drawPrototypes(pen, prototypesShown());
}

const ring = (pen, x, y, r, colour, wide) => { pen.strokeStyle = paper; pen.lineWidth = wide + 2.5; pen.beginPath(); pen.arc(x, y, r, 0, 7); pen.stroke(); pen.strokeStyle = colour; pen.lineWidth = wide; pen.stroke(); };

function drawAxes(pen) {
  pen.fillStyle = quiet; pen.font = "12px system-ui, sans-serif"; pen.textAlign = "left";
  if (state.map.name === "neighbours") return pen.fillText("near: alike · far: no meaning", 12, height - 10);
  const first = Number(state.map.name.split(" ")[1]), names = picture.axes ?? [axisName(first, 0), line1 ? undefined : axisName(first + 1, 1)];
  pen.fillText(`→ ${names[0]}`.slice(0, 90), 12, height - 10);
  pen.fillText(names[1] ? `↑ ${names[1]}`.slice(0, 60) : "(one axis only: heights have no meaning)", 12, 20);
}

function axisName(number, side) {  // an axis of the map, with the columns of the table that run along it
  const places = Array.from({ length: n }, (_, i) => state.map.documents[2 * i + side]), mean = places.reduce((a, b) => a + b, 0) / n, size = Math.sqrt(places.reduce((a, b) => a + (b - mean) ** 2, 0) / n);
  const found = [];
  for (let c = 0; c < C; c++) {
    const r = places.reduce((sum, x, i) => sum + (x - mean) * (values[i * C + c] - table.mean[c]), 0) / (n * size * table.deviation[c]);
    if (Math.abs(r) > 0.5 && Math.abs(r) < 1.5) found.push([Math.abs(r), `${r > 0 ? "+" : "−"} ${table.names[c]}`]);
  }
  return `axis ${number}${found.length ? ": " + found.sort((a, b) => b[0] - a[0]).slice(0, 3).map(([, name]) => name).join(", ") : ""}`;
}

const discRadius = p => Math.min(26, 9 + 22 * Math.sqrt(p.mass)) * (K > 60 ? 0.75 : 1);
function drawPrototypes(pen, shown) {
  const boxes = [[width - 300, 0, width, 58]], dim = p => (state.prototype >= 0 && !p.members.includes(state.prototype)) || (state.matches && ![...p.members].some(k => state.matches.prototypes.has(k)) && state.matches.prototypes.size);
  const bySize = [...shown].sort((a, b) => a.mass - b.mass);
  for (const p of bySize) {
    const r = discRadius(p), [L, A, B] = colours[p.s].subarray(3 * p.k, 3 * p.k + 3);
    pen.globalAlpha = dim(p) ? 0.35 : 1;
    pen.fillStyle = css(L, A, B); pen.strokeStyle = paper; pen.lineWidth = 2.5;
    pen.beginPath(); pen.arc(p.x, p.y, r, 0, 7); pen.fill(); pen.stroke();
    pen.strokeStyle = ink; pen.lineWidth = 1; pen.beginPath(); pen.arc(p.x, p.y, r + 1.5, 0, 7); pen.stroke();
    pen.fillStyle = onDisc(p.s, p.k); pen.font = `700 ${r > 12 ? 12 : 10}px system-ui, sans-serif`; pen.textAlign = "center"; pen.textBaseline = "middle";
    pen.fillText(p.members.length === 1 ? numbered(p.members[0]) : p.members.length ? `×${p.members.length}` : "", p.x, p.y + 0.5);
    boxes.push([p.x - r, p.y - r, p.x + r, p.y + r]);
    if (state.prototype >= 0 && p.members.includes(state.prototype)) ring(pen, p.x, p.y, r + 5, ink, 2.5);
    pen.globalAlpha = 1;
  }
  pen.textBaseline = "alphabetic";
  labels(pen, bySize.reverse().filter(p => !dim(p)), boxes);
}

function labels(pen, shown, boxes) {  // words beside prototypes, the largest first, where there is room
  pen.font = "600 12px system-ui, sans-serif"; pen.textAlign = "left"; pen.lineJoin = "round";
  for (const p of shown) {
    const words = p.members.length === 1 ? nickname(p.members[0]) : p.members.length ? `${p.members.length} in one` : "", text = words.length > 34 ? words.slice(0, 33) + "…" : words;
    if (!text) continue;
    const r = discRadius(p), long = pen.measureText(text).width;
    for (const [x, y] of [[p.x + r + 5, p.y + 4], [p.x - r - 5 - long, p.y + 4], [p.x - long / 2, p.y - r - 6], [p.x - long / 2, p.y + r + 15]]) {
      const box = [x - 2, y - 12, x + long + 2, y + 4];
      if (box[0] < 2 || box[2] > width - 2 || box[1] < 2 || box[3] > height - 22 || boxes.some(b => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3])) continue;
      pen.strokeStyle = paper; pen.lineWidth = 4; pen.strokeText(text, x, y);
      pen.fillStyle = ink; pen.fillText(text, x, y);
      boxes.push(box);
      break;
    }
  }
}

// ---------------------------------------------------------------- hand and eye on the map
function under(x, y) {  // a prototype or a document at a place of the map
  const near = prototypesShown().map(p => ({ p, far: Math.hypot(p.x - x, p.y - y) - discRadius(p) })).sort((a, b) => a.far - b.far)[0];
  if (near && near.far < 3) return { prototype: near.p };
  let top = -1, least = radius() + 8;
  for (let i = 0; i < n; i++) {
    const [px, py] = placeOf(i), far = Math.hypot(px - x, py - y) + (chosen(i) ? 0 : 6);
    if (far < least) { least = far; top = i; }
  }
  return top < 0 ? null : { document: top };
}

function inWords(inside) {  // a prototype of any stage, by the fitted prototypes that come from it
  if (inside.length === 1) return `prototype ${numbered(inside[0])}`;
  return inside.length ? `${inside.length} in one (${inside.slice(0, 8).map(numbered).join(", ")}${inside.length > 8 ? ", …" : ""})` : `a prototype that the fitted model shares out`;
}
function summary(i) {
  const { best, sure } = assigned(state.stage);
  return `${isolated(called(i))}: ${percent(sure[i])} ${inWords(members(state.stage, best[i]))}`;
}
const groupSummary = p => `${inWords(p.members)}, ${percent(p.mass)} of the ${thing}s`;

function showTip(found, x, y) {
  const tip = $("tip");
  tip.hidden = !found;
  if (!found) return;
  const [head, words] = found.prototype ? [groupSummary(found.prototype), found.prototype.members.length === 1 ? nickname(found.prototype.members[0]) : ""] : [summary(found.document), inShort(found.document)];
  tip.replaceChildren(make("b", { class: "said", dir: "auto" }, head), make("p", { class: "said", dir: "auto" }, words));
  const box = tip.getBoundingClientRect();
  tip.style.transform = `translate(${Math.max(6, Math.min(width - box.width - 6, x + 14))}px, ${y + box.height + 22 > height ? Math.max(6, y - box.height - 12) : y + 16}px)`;
}

function zoom(factor, x = width / 2, y = height / 2) {
  const scale = Math.min(60, Math.max(0.5, view.scale * factor)), by = scale / view.scale;
  view.x = x - width / 2 - (x - width / 2 - view.x) * by;
  view.y = y - height / 2 - (y - height / 2 - view.y) * by;
  view.scale = scale;
  $("tip").hidden = true;
  drawMap();
}
function wholeMap() { frame(); drawMap(); }

const fingers = new Map();
let moved = 0;
const local = event => { const box = map.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
map.addEventListener("pointerdown", event => { map.setPointerCapture(event.pointerId); fingers.set(event.pointerId, local(event)); if (fingers.size === 1) moved = 0; });
map.addEventListener("pointermove", event => {
  const [x, y] = local(event), before = fingers.get(event.pointerId);
  if (!before) return event.pointerType === "mouse" && showTip(under(x, y), x, y);
  const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
  fingers.set(event.pointerId, [x, y]);
  moved += Math.hypot(x - before[0], y - before[1]);
  if (others.length) {
    const [ox, oy] = others[0];
    return zoom(Math.hypot(x - ox, y - oy) / (Math.hypot(before[0] - ox, before[1] - oy) || 1), (x + ox) / 2, (y + oy) / 2);
  }
  if (moved < 5) return;
  map.classList.add("dragged");
  view.x += x - before[0]; view.y += y - before[1];
  $("tip").hidden = true;
  drawMap();
});
for (const end of ["pointerup", "pointercancel"]) map.addEventListener(end, event => {
  const held = fingers.delete(event.pointerId), [x, y] = local(event);
  map.classList.remove("dragged");
  if (end === "pointercancel" || !held || moved >= 5 || fingers.size) return;
  const found = under(x, y);
  if (!found) return select({});
  if (found.document !== undefined) return select({ document: found.document });
  if (found.prototype.members.length === 1) return select({ prototype: found.prototype.members[0] });
  showTip(found, x, y);
});
map.addEventListener("pointerleave", () => { $("tip").hidden = true; });
map.addEventListener("wheel", event => {
  if (!event.ctrlKey && !event.metaKey && document.activeElement !== map) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), ...local(event));
}, { passive: false });
map.addEventListener("keydown", event => {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (way && event.shiftKey) { view.x -= 50 * way[0]; view.y -= 50 * way[1]; drawMap(); }
  else if (way) step(way);
  else if (event.key === "+" || event.key === "=") zoom(1.3);
  else if (event.key === "-" || event.key === "_") zoom(1 / 1.3);
  else if (event.key === "0") wholeMap();
  else if (event.key === "p" || event.key === "P") select({ prototype: (state.prototype + (event.shiftKey ? K - 1 + (state.prototype < 0) : 1)) % K });
  else if (event.key === "Enter") $("selected").focus();
  else if (event.key === "Escape") select({});
  else return;
  event.preventDefault();
});

function step([dx, dy]) {  // to the next document in a direction
  const start = state.document >= 0 ? placeOf(state.document) : [width / 2, height / 2];
  let top = -1, least = Infinity;
  for (let i = 0; i < n; i++) {
    if (i === state.document || (state.matches && !state.matches.has(i))) continue;
    const [x, y] = placeOf(i), ahead = (x - start[0]) * dx + (y - start[1]) * dy, aside = Math.abs((x - start[0]) * dy) + Math.abs((y - start[1]) * dx);
    if (state.document >= 0 && (ahead <= 0 || aside > 1.5 * ahead)) continue;
    const cost = Math.hypot(ahead, aside) + aside;
    if (cost < least) { least = cost; top = i; }
  }
  if (top < 0) return;
  const [x, y] = placeOf(top);
  view.x -= x < 30 ? x - 60 : x > width - 30 ? x - width + 60 : 0;
  view.y -= y < 30 ? y - 60 : y > height - 30 ? y - height + 60 : 0;
  select({ document: top });
}

// ---------------------------------------------------------------- selecting
function select({ document: i = -1, prototype: k = -1 }, { show = false } = {}) {
  Object.assign(state, { document: i, prototype: k });
  $("tip").hidden = true;
  if (show) {
    const [x, y] = i >= 0 ? placeOf(i) : placeOfPrototype(FITTED, k);
    if (x < 20 || y < 20 || x > width - 20 || y > height - 20) { view.x += width / 2 - x; view.y += height / 2 - y; }
  }
  drawMap(); drawSelected(); drawResults();
  document.querySelectorAll(".card").forEach(card => card.classList.toggle("chosen", Number(card.dataset.prototype) === k));
  $("spoken").textContent = i >= 0 ? `${summary(i)}. ${inShort(i).slice(0, 200)}` : k >= 0 ? `Prototype ${numbered(k)}, ${percent(cards[k].share)} of the ${thing}s. ${nickname(k)}` : "Nothing selected";
}

const disc = k => make("span", { class: "disc", css: { background: colourOf(FITTED, k), color: onDisc(FITTED, k) } }, numbered(k));
const bars = rows => make("ul", { class: "bars" }, ...rows.map(({ name, value, from, to, colour }) => make("li", {}, make("span", { class: "said", dir: "auto" }, name), make("span", {}, value),
  make("span", { class: "track" }, make("span", { class: "fill", css: { left: `${100 * from}%`, width: `${Math.max(0.5, 100 * (to - from))}%`, background: colour } })))));
const deviations = (rows, k) => bars(rows.map(([c, value, apart]) => {
  const reach = Math.min(1, Math.abs(apart) / 4) / 2;
  return { name: table.names[c], value: `${number(value, 4)}, ${far(apart)} (${signed(apart)})`, from: apart > 0 ? 0.5 : 0.5 - reach, to: apart > 0 ? 0.5 + reach : 0.5, colour: colourOf(FITTED, k) };
}));

function drawSelected() {
  const box = $("selected");
  if (state.document >= 0) box.replaceChildren(...documentDetails(state.document));
  else if (state.prototype >= 0) box.replaceChildren(...prototypeDetails(state.prototype));
  else box.replaceChildren(make("p", { class: "quiet" }, `Choose a ${thing} or a prototype on the map, or search${data.texts ? " for words" : " for names of rows and of columns that stand out"}.`));
}

function documentDetails(i) {
  const s = state.stage, fitted = assigned(FITTED).best[i], typical = cards[fitted].typical;
  const rows = sharesOf(i, s).slice(0, 5).map(([k, q]) => {
    const inside = members(s, k);
    return { name: inside.length === 1 ? `${numbered(inside[0])} ${nickname(inside[0])}` : inWords(inside), value: percent(q), from: 0, to: q, colour: colourOf(s, k) };
  });
  return [make("div", { class: "heading" }, make("span", { class: "dot", css: { background: colourOf(FITTED, fitted) } }), make("h3", { class: "said", dir: "auto" }, called(i))),
    data.texts ? make("blockquote", { dir: "auto", tabindex: 0 }, data.texts[i] || "(empty)") : null,
    make("h4", {}, `Probabilities at τ = ${number(stages[s].tau)}${s === FITTED ? ", the fitted model" : ""}`), bars(rows),
    make("p", { class: "quiet" }, `Nearest prototype ${numbered(fitted)}, at a distance of ${number(away[i])} in the units of the data`
      + (typical ? `, ${number(away[i] / typical, 2)} times what is typical of its ${thing}s (median ${number(typical)}).` : ".")),
    C ? make("h4", {}, "Columns that stand out, in standard deviations from the mean of all") : null, C ? deviations(outstanding(i, 6), fitted) : null,
    make("button", { type: "button", class: "small", onclick: () => select({ prototype: fitted }, { show: true }) }, `To prototype ${numbered(fitted)}`)].filter(Boolean);
}

function prototypeDetails(k) {
  const card = cards[k];
  return [make("div", { class: "heading" }, disc(k), make("h3", {}, `Prototype ${numbered(k)}${merged ? `, cluster ${model.labels[k]}` : ""}`), make("b", {}, percent(card.share))),
    card.words.length ? make("ul", { class: "tags", "aria-label": "Characteristic words" }, ...card.words.map(word => make("li", { class: "said", dir: "auto" }, word))) : null,
    C ? make("h4", {}, "Columns that stand out, in standard deviations from the mean of all") : null, C ? (card.columns.length ? deviations(card.columns, k) : make("p", { class: "quiet" }, `None: its ${thing}s are like all of them.`)) : null,
    make("p", { class: "quiet" }, card.typical === null ? `No ${thing} of the sample is nearest to it.` : `Its ${thing}s lie at a distance of ${number(card.typical)} from it (median, units of the data). Below: those that belong to it, the nearest first.`)].filter(Boolean);
}

// ---------------------------------------------------------------- search
const plain = text => text.toLocaleLowerCase().normalize("NFKD").replace(/\p{M}/gu, "");
const corpus = Array.from({ length: n }, (_, i) => plain(`${called(i)} ${data.texts ? data.texts[i] : outstanding(i, 3).map(([c]) => table.names[c]).join(" ")}`));
const vocabulary = cards.map((card, k) => plain(`prototype ${numbered(k)} ${merged ? `cluster ${model.labels[k]}` : ""} ${card.words.join(" ")} ${card.columns.map(([c]) => table.names[c]).join(" ")}`));
const LISTED = 60, idle = [...cards.keys()].filter(k => cards[k].typical === null);

function search(query) {
  state.query = query;
  const words = plain(query).split(/\s+/).filter(Boolean), all = text => words.every(word => text.includes(word));
  state.matches = words.length ? new Set([...corpus.keys()].filter(i => all(corpus[i]))) : null;
  if (state.matches) state.matches.prototypes = new Set([...cards.keys()].filter(k => all(vocabulary[k])));
  drawMap(); drawResults();
}

function results() {  // what the list shows: prototypes, then documents
  if (state.matches) return [[...state.matches.prototypes], [...state.matches]];
  if (state.document >= 0) return [[], []];
  if (state.prototype < 0) return [[...cards.keys()].filter(k => !idle.includes(k)).sort((a, b) => cards[b].share - cards[a].share), []];
  const { best } = assigned(FITTED), own = [...Array(n).keys()].filter(i => best[i] === state.prototype);
  return [[], own.sort((a, b) => away[a] - away[b])];
}

function pick({ document: i = -1, prototype: k = -1 }) {
  const fitted = i >= 0 ? assigned(FITTED).best[i] : k, current = i >= 0 ? i === state.document : k === state.prototype;
  const words = i >= 0 ? inShort(i) : titleOf(k);
  return make("button", { type: "button", class: "pick", "aria-current": current ? "true" : null, onclick: () => select(i >= 0 ? { document: i } : { prototype: k }, { show: true }) },
    make("span", { class: "dot", css: { background: colourOf(FITTED, fitted) } }), make("span", { class: "words said", dir: "auto" }, words || "(empty)"),
    make("span", { class: "name" }, i >= 0 ? `${isolated(called(i))} · prototype ${numbered(fitted)}` : `prototype ${numbered(k)} · ${percent(cards[k].share)}`));
}

function drawResults() {
  const [prototypes, documents] = results(), list = $("results"), held = list.contains(document.activeElement) ? [...list.querySelectorAll("button")].indexOf(document.activeElement) : -1;
  const listed = [...prototypes.slice(0, LISTED).map(k => ({ prototype: k })), ...documents.slice(0, LISTED).map(i => ({ document: i }))];
  list.replaceChildren(...listed.map(one => make("li", {}, pick(one))));
  if (held >= 0) list.querySelectorAll("button")[held]?.focus();
  const more = documents.length > LISTED ? ` The first ${LISTED} are listed.` : "";
  $("found").textContent = state.matches ? `${plural(documents.length, thing)} and ${plural(prototypes.length, "prototype")} of ${n.toLocaleString("en")} and ${K} found.${more}` : state.prototype >= 0 ? `${plural(documents.length, thing)} of prototype ${numbered(state.prototype)}.${more}` : "";
}

function walk(event) {  // up and down through the list with the arrows
  const all = [$("search"), ...$("results").querySelectorAll("button")], at = all.indexOf(document.activeElement), to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: event.target.id === "search" ? NaN : 1, End: event.target.id === "search" ? NaN : all.length - 1 }[event.key];
  if (event.key === "Escape" && (state.query || at > 0)) { event.preventDefault(); $("search").value = ""; search(""); $("search").focus(); }
  if (at < 0 || to === undefined || !all[to]) return;
  event.preventDefault();
  all[to].focus();
}

// ---------------------------------------------------------------- temperature
const depth = tau => -Math.log(tau), hot = depth(stages[0].tau), cold = Math.max(depth(stages[COLDEST].tau), depth(stages[FITTED].tau), hot + 0.1);
const ALONG = tau => Math.min(1, Math.max(0, (depth(tau) - hot) / (cold - hot)));
const still = matchMedia("(prefers-reduced-motion: reduce)");
let playing = null;

function go(s, { gently = true } = {}) {
  const before = state.stage;
  if (s === before) return;
  state.stage = s;
  if (tween) cancelAnimationFrame(tween.request);
  tween = null;
  if (gently && !still.matches) {
    const near = Math.abs(s - before) === 1 && s !== FITTED && before !== FITTED, start = performance.now(), long = 320;
    const move = now => {
      const x = Math.min(1, (now - start) / long), smooth = x * x * (3 - 2 * x);
      tween.passed = smooth; tween.at = s > before ? smooth : 1 - smooth;
      drawMap();
      if (x < 1) tween.request = requestAnimationFrame(move); else { tween = null; drawMap(); }
    };
    tween = { from: before, finer: near ? Math.max(s, before) : undefined, at: 1, passed: 0, request: 0 };
    tween.request = requestAnimationFrame(move);
  } else drawMap();
  drawTemperature();
  if (state.document >= 0) drawSelected();
}

function measured(s) {
  const { best, sure } = assigned(s);
  let clear = 0;
  for (let i = 0; i < n; i++) clear += sure[i] > 0.9;
  return { clear: clear / n, used: new Set(best).size };
}

function drawTemperature() {
  const stage = stages[state.stage], { clear } = measured(state.stage), T = model.critical * stage.tau, fitted = state.stage === FITTED;
  const facts = [[`${number(stage.tau)}`, `τ = T / T_c, ${fitted ? "the fitted model" : "on the way"}`, `T = ${number(T)} in squared units of the data`], [stage.count.toLocaleString("en"), stage.count === 1 ? "prototype" : "distinct prototypes"],
    [stage.entropy > 0 && stage.entropy < 0.001 ? "under 0.001 nats" : `${number(stage.entropy, 2)} nats`, `entropy: as unsure as among ${Math.exp(stage.entropy).toFixed(stage.entropy < 2.3 ? 2 : 0)}`], [percent(clear), `of ${thing}s over 90 % sure`]];
  $("readout").replaceChildren(...facts.map(([value, words, title]) => make("div", { title }, make("dd", {}, value), make("dt", {}, words))));
  $("tau").value = 1000 * ALONG(stage.tau);
  $("tau").setAttribute("aria-valuetext", `tau ${number(stage.tau)}, ${plural(stage.count, "prototype")}${fitted ? ", the fitted model" : ""}`);
  $("fitted").setAttribute("aria-pressed", fitted);
  drawRiver();
  charts.forEach(chart => chart.cursor());
  document.querySelectorAll(".card").forEach(card => {
    const k = Number(card.dataset.prototype), others = members(state.stage, homes[state.stage][k]).filter(j => j !== k).map(numbered);
    card.querySelector(".together").textContent = others.length ? `At τ = ${number(stage.tau)} still one with ${others.length > 8 ? plural(others.length, "other prototype") : others.join(", ")}.` : "";
  });
}

function nearestStage(x) {  // x from 0, hot, to 1, cold
  let top = 0;
  for (let s = 0; s <= COLDEST; s++) if (Math.abs(ALONG(stages[s].tau) - x) < Math.abs(ALONG(stages[top].tau) - x)) top = s;
  return top;
}
$("tau").addEventListener("input", event => { stop(); go(nearestStage(event.target.value / 1000)); });
$("tau").addEventListener("change", drawTemperature);
$("tau").addEventListener("keydown", event => {
  const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }[event.key];
  const to = event.key === "Home" ? 0 : event.key === "End" ? COLDEST : by && (state.stage === FITTED ? nearestStage(ALONG(stages[FITTED].tau)) : state.stage + by);
  if (to === undefined) return;
  event.preventDefault();
  stop(); go(Math.min(COLDEST, Math.max(0, to)));
});
function stop() { clearTimeout(playing); playing = null; $("play").textContent = "Cool"; }
$("play").addEventListener("click", () => {
  if (playing) return stop();
  $("play").textContent = "Stop";
  go(0, { gently: false });
  const next = () => {
    if (state.stage >= COLDEST) { stop(); return go(FITTED); }
    go(state.stage + 1);
    playing = setTimeout(next, still.matches ? 700 : 340);
  };
  playing = setTimeout(next, 600);
});
$("fitted").addEventListener("click", () => { stop(); go(FITTED); });

// ---------------------------------------------------------------- the river: prototypes part while it flows to the cold
const flow = (() => {  // for each stage and prototype: top and bottom of its band, 0 to 1
  const order = [], bands = [], children = stages.slice(0, COLDEST + 1).map(stage => Array.from({ length: stage.count }, () => []));
  for (let s = 1; s <= COLDEST; s++) stages[s].parents.forEach((parent, k) => children[s - 1][parent].push(k));
  const across = (s, k) => maps[0].prototypes[s][2 * k + 1 - line1];
  order[0] = [...Array(stages[0].count).keys()];
  for (let s = 1; s <= COLDEST; s++) order[s] = order[s - 1].flatMap(k => children[s - 1][k].sort((a, b) => across(s, b) - across(s, a)));
  for (let s = 0; s <= COLDEST; s++) {
    const whole = stages[s].mass.reduce((a, b) => a + b, 0) || 1;
    let y = 0;
    bands[s] = [];
    for (const k of order[s]) { bands[s][k] = [y, y + stages[s].mass[k] / whole]; y = bands[s][k][1]; }
  }
  return { bands, order, children };
})();

const SIDE = 10;  // half the thumb of the slider
let painted = null;  // the streams, which change with size and colours only
function drawRiver() {
  const canvas = $("river"), [pen, w, h] = fit2(canvas), low = h - 18, X = tau => SIDE + ALONG(tau) * (w - 2 * SIDE);
  if (painted && painted.width === canvas.width && painted.height === canvas.height) pen.drawImage(painted, 0, 0, w, h);
  else {
    drawStreams(pen, w, low, X);
    painted = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    painted.getContext("2d").drawImage(canvas, 0, 0);
  }
  riverScale(pen, w, low, h, X);
}

function drawStreams(pen, w, low, X) {
  const gap = Math.min(1.5, 0.25 * low / K);
  for (let s = 0; s <= COLDEST; s++) for (const k of flow.order[s]) {
    const [a, b] = flow.bands[s][k], x = X(stages[s].tau), colour = colourOf(s, k), left = s ? X(stages[s - 1].tau) : x - 1;
    let [pa, pb] = [a, b];
    if (s) {  // its part of the band that it comes from
      const parent = stages[s].parents[k], [top, bottom] = flow.bands[s - 1][parent], own = flow.children[s - 1][parent], whole = own.reduce((sum, j) => sum + stages[s].mass[j], 0) || 1;
      pa = top;
      for (const j of own) { if (j === k) break; pa += (bottom - top) * stages[s].mass[j] / whole; }
      pb = pa + (bottom - top) * stages[s].mass[k] / whole;
    }
    const paint = pen.createLinearGradient(left, 0, x, 0);
    paint.addColorStop(0, s ? colourOf(s - 1, stages[s].parents[k]) : colour);
    paint.addColorStop(1, colour);
    pen.fillStyle = paint;
    const parted = s && flow.children[s - 1][stages[s].parents[k]].length === 1, g0 = s === 0 || parted ? gap / 2 : 0, bend = (left + x) / 2;
    pen.beginPath();
    pen.moveTo(left - 0.4, pa * low + g0);
    pen.bezierCurveTo(bend, pa * low + g0, bend, a * low + gap / 2, x, a * low + gap / 2);
    pen.lineTo(x, b * low - gap / 2);
    pen.bezierCurveTo(bend, b * low - gap / 2, bend, pb * low - g0, left - 0.4, pb * low - g0);
    pen.fill();
  }
}

function riverScale(pen, w, low, h, X) {
  pen.font = "11px system-ui, sans-serif"; pen.fillStyle = quiet; pen.textAlign = "center";
  let last = -Infinity;
  for (const power of [0, -1, -2, -3, -4, -5, -6]) for (const lead of [1, 0.5, 0.2]) {
    const tau = lead * 10 ** power, x = X(tau), text = power === 0 && lead === 1 ? "τ = 1" : tau < 0.0009 ? `${lead < 1 ? lead * 10 : 1}e${lead < 1 ? power - 1 : power}` : String(+tau.toPrecision(1));
    if (depth(tau) > cold + 1e-9 || depth(tau) < hot - 1e-9 || x - last < 34) continue;
    pen.fillText(text, Math.min(w - 14, Math.max(16, x)), h - 4);
    last = x;
  }
  const x = X(stages[state.stage].tau), own = X(stages[FITTED].tau);
  pen.strokeStyle = ink; pen.lineWidth = 1; pen.setLineDash([2, 3]); pen.beginPath(); pen.moveTo(own, 0); pen.lineTo(own, low); pen.stroke(); pen.setLineDash([]);
  pen.strokeStyle = paper; pen.lineWidth = 5; pen.beginPath(); pen.moveTo(x, 0); pen.lineTo(x, low); pen.stroke();
  pen.strokeStyle = ink; pen.lineWidth = 2; pen.stroke();
}
let steering = false;
const steer = event => { const box = $("river").getBoundingClientRect(); stop(); go(nearestStage((event.clientX - box.left - SIDE) / (box.width - 2 * SIDE)), { gently: false }); };
$("river").addEventListener("pointerdown", event => { steering = true; $("river").setPointerCapture(event.pointerId); steer(event); });
$("river").addEventListener("pointermove", event => steering && steer(event));
for (const end of ["pointerup", "pointercancel"]) $("river").addEventListener(end, () => { steering = false; });

// ---------------------------------------------------------------- curves
const charts = [];
function scale(low, high, from, to) { const span = high - low || 1; return x => from + (x - low) / span * (to - from); }
function ticks(low, high, most = 4) {
  const raw = (high - low || 1) / most, power = 10 ** Math.floor(Math.log10(raw)), by = [1, 2, 5, 10].map(f => f * power).find(f => f >= raw), found = [];
  for (let i = Math.ceil(low / by - 1e-9); i * by <= high + 1e-9 * by; i++) found.push(+(i * by).toPrecision(6));
  return found;
}

function drawn({ lines, xs, ys, xTicks, yTicks, marks = [], label }) {  // an SVG of lines in a frame of 320 x 170
  const x = scale(...xs, 44, 312), y = scale(...ys, 142, 10), svg = make("svg", { viewBox: "0 0 320 170", role: "img", "aria-label": label });
  for (const t of yTicks) svg.append(make("line", { class: "grid", x1: 44, x2: 312, y1: y(t), y2: y(t) }), make("text", { x: 38, y: y(t) + 4, "text-anchor": "end" }, number(t)));
  for (const [t, text] of xTicks) svg.append(make("text", { x: x(t), y: 160, "text-anchor": "middle" }, text));
  for (const { points, colour, step: stepped } of lines) {
    const path = points.map(([a, b], i) => `${i ? stepped ? `H${x(a).toFixed(1)}V` : `L${x(a).toFixed(1)},` : `M${x(a).toFixed(1)},`}${y(b).toFixed(1)}`).join("");
    svg.append(make("path", { class: "curve", d: path, css: { stroke: colour } }));
  }
  for (const [a, b] of marks) svg.append(make("circle", { class: "mark", cx: x(a), cy: y(b), r: 4 }));
  return { svg, x, y };
}

function coolingChart(name, column, unitName, words, options = {}) {
  const path = stages.slice(0, COLDEST + 1), own = stages[FITTED][column], top = Math.max(...path.map(row => row[column]), own), ys = [0, top * 1.05 || 1];
  const points = path.map(row => [ALONG(row.tau), row[column]]), xTicks = [];
  for (const tau of [1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5]) if (depth(tau) <= cold + 1e-9 && (!xTicks.length || ALONG(tau) - xTicks.at(-1)[0] > 0.12)) xTicks.push([ALONG(tau), xTicks.length ? String(tau) : "τ = 1"]);
  const { svg, x, y } = drawn({ lines: [{ points, colour: "var(--blue)", step: options.step }], xs: [0, 1], ys, xTicks, yTicks: ticks(...ys).filter(t => !options.step || Number.isInteger(t)), marks: [[ALONG(stages[FITTED].tau), own]],
    label: `${name} from τ = ${number(path[0].tau)}, ${number(path[0][column])}, to τ = ${number(path.at(-1).tau)}, ${number(path.at(-1)[column])}` });
  const cursor = make("line", { class: "cursor", y1: 10, y2: 142 }), point = make("circle", { class: "mark", r: 4, css: { fill: "var(--blue)" } }), now = make("p", { class: "now quiet" });
  svg.append(cursor, point);
  svg.addEventListener("pointerdown", event => { const box = svg.getBoundingClientRect(); stop(); go(nearestStage(((event.clientX - box.left) / box.width * 320 - 44) / 268)); });
  charts.push({ cursor() {
    const stage = stages[state.stage], at = x(ALONG(stage.tau));
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at);
    point.setAttribute("cx", at); point.setAttribute("cy", y(stage[column]));
    now.textContent = `${number(stage[column])} ${unitName} at τ = ${number(stage.tau)}`;
  } });
  return make("figure", { class: "panel live" }, make("h3", {}, name), now, svg, make("figcaption", {}, words));
}

function trainingChart({ name, x: axis, lines }) {
  const entries = Object.entries(lines), all = entries.flatMap(([, points]) => points), xs = [Math.min(...all.map(p => p[0])), Math.max(...all.map(p => p[0]))];
  const low = Math.min(...all.map(p => p[1])), high = Math.max(...all.map(p => p[1])), ys = [low >= 0 && low < 0.5 * high ? 0 : low, high === low ? low + 1 : high];
  const { svg, x } = drawn({ lines: entries.map(([, points], i) => ({ points, colour: css((dark ? 0.74 : 0.55), 0.14 * Math.cos(4.2 + 2.4 * i), 0.14 * Math.sin(4.2 + 2.4 * i)) })), xs, ys, xTicks: ticks(...xs).map(t => [t, number(t)]), yTicks: ticks(...ys), label: `${name} against ${axis}, from ${number(all[0][1])} to ${number(all.at(-1)[1])}` });
  for (const warning of data.warnings) { const at = /^step (\d+):/.exec(warning); if (at && axis === "step" && at[1] >= xs[0] && at[1] <= xs[1]) svg.append(make("line", { class: "cursor", x1: x(+at[1]), x2: x(+at[1]), y1: 10, y2: 142 })); }
  const last = entries.slice(0, 4).map(([of, points]) => `${of ? of + ": " : ""}${number(points[0][1])} → ${number(points.at(-1)[1])}`).join(" · ");
  return make("figure", { class: "panel" }, make("h3", { class: "said", dir: "auto" }, name), svg, make("figcaption", { class: "said", dir: "auto" }, `Against ${axis}. ${last}${entries.length > 4 ? " …" : ""}`));
}

function drawCurves() {
  charts.length = 0;
  $("curves").replaceChildren(
    coolingChart("Prototypes", "count", "", "How many have parted. Long flat stretches are numbers of clusters that the data support. The dot is the fitted model.", { step: true }),
    coolingChart("Distortion L_q", "distortion", "of the variance", "The mean squared distance to the prototypes, each weighted by its probability, as a share of the variance of the data: what the prototypes do not tell."),
    coolingChart("Entropy H", "entropy", "nats", `How unsure the mean assignment is: 0 where every ${thing} has one prototype, ln k where all of k are equally likely. It falls where assignments sharpen.`));
  const training = data.history.length + data.warnings.length > 0;
  $("training").hidden = $("training-link").hidden = !training;
  $("warnings").replaceChildren(...data.warnings.map(warning => make("li", { class: "said", dir: "auto" }, `⚠ ${warning}`)));
  $("history").replaceChildren(...data.history.map(trainingChart));
}

// ---------------------------------------------------------------- cards
const FIRST = 24;
let all = K <= 1.5 * FIRST;
function drawCards() {
  const order = [...cards.keys()].filter(k => !idle.includes(k)).sort((a, b) => (merged ? model.labels[a] - model.labels[b] : 0) || cards[b].share - cards[a].share), shown = all ? order : order.slice(0, FIRST), parts = [];
  shown.forEach((k, rank) => {
    if (merged && (rank === 0 || model.labels[shown[rank - 1]] !== model.labels[k])) {
      const own = order.filter(j => model.labels[j] === model.labels[k]);
      parts.push(make("h3", {}, make("span", { class: "dot", css: { background: colourOf(FITTED, k), marginTop: 0 } }), `Cluster ${model.labels[k]}: ${plural(own.length, "prototype")}, ${percent(own.reduce((sum, j) => sum + cards[j].share, 0))} of the ${thing}s`));
    }
    parts.push(cardOf(k));
  });
  if (idle.length) parts.push(make("p", { class: "quiet wide" }, `No ${thing} of this sample is nearest to ${plural(idle.length, "other prototype")}: ${idle.map(numbered).join(", ")}.`));
  if (!all) parts.push(make("button", { type: "button", onclick: () => { all = true; drawCards(); drawTemperature(); } }, `Show all ${K}`));
  $("cards").replaceChildren(...parts);
}

function cardOf(k) {
  const card = cards[k], title = titleOf(k);
  return make("article", { class: `card${state.prototype === k ? " chosen" : ""}`, "data-prototype": k, "aria-label": `Prototype ${numbered(k)}`, css: { borderTopColor: colourOf(FITTED, k) } },
    make("div", { class: "heading" }, disc(k), make("h3", { class: "said", dir: "auto" }, title), make("b", {}, percent(card.share))),
    card.words.length > 3 ? make("ul", { class: "tags", "aria-label": "More characteristic words" }, ...card.words.slice(3).map(word => make("li", { class: "said", dir: "auto" }, word))) : null,
    card.columns.length ? make("h4", {}, "Columns that stand out") : null, card.columns.length ? deviations(card.columns, k) : null,
    make("h4", {}, card.examples.length ? `Nearest ${thing}s` : `No ${thing} of this sample is nearest to it`),
    make("ul", { class: "examples" }, ...card.examples.slice(0, 3).map(i => make("li", {}, exampleOf(i)))),
    make("p", { class: "together" }), make("button", { type: "button", class: "small", onclick: () => { select({ prototype: k }, { show: true }); $("map").scrollIntoView({ block: "center" }); $("map").focus({ preventScroll: true }); } }, "Show on the map"));
}
const exampleOf = i => make("button", { type: "button", class: "pick", onclick: () => { select({ document: i }, { show: true }); $("map").scrollIntoView({ block: "center" }); $("map").focus({ preventScroll: true }); } },
  make("span", { class: "dot", css: { background: colourOf(FITTED, assigned(FITTED).best[i]) } }), make("span", { class: "words said", dir: "auto" }, inShort(i) || "(empty)"), make("span", { class: "name" }, called(i)));

// ---------------------------------------------------------------- words about it
function tell() {
  const sample = data.shown < data.total ? `${n.toLocaleString("en")} of ${data.total.toLocaleString("en")} ${thing}s are shown` : plural(n, thing);
  $("lead").textContent = `${sample}, ${plural(K, "prototype")}${merged ? ` in ${plural(model.clusters, "cluster")}` : model.automatic ? ", a number found from the data" : ""}, assignments at τ = ${number(model.tau)}.`;
  sayMap();
  $("tau-words").replaceChildren(
    make("p", {}, `The temperature T says how far a ${thing} looks for prototypes, as a squared distance: a prototype that is farther than the nearest one by much more than T (in squared distance) is as good as absent.`),
    make("p", {}, `Above the critical temperature T_c all prototypes fall together at the mean of the data, wherever they start: there is no clustering. T_c is twice the largest variance of the data along any direction, here ${number(model.critical)} in squared units of the data.`),
    make("p", {}, `τ = T / T_c is the temperature as a share of that. It has no unit and means the same for any data: at 1 the first split happens, each further split waits for its own lower τ, and towards 0 each ${thing} belongs to one prototype. The fitted model stands at τ = ${number(model.tau)}, T = ${number(model.temperature)}.`));
  $("cards-says").textContent = data.texts ? "Each prototype with its share of the documents, the words that its documents have and others lack (class-based tf-idf, a word counted once per document), and the documents nearest to it."
    : "Each prototype with its share of the rows, the columns in which its rows differ from the mean of all, in standard deviations (s.d.), and the rows nearest to it.";
  const notes = [`Shares, words and columns are counted over the ${data.given.toLocaleString("en")} ${thing}s given to this page${data.total > data.given ? `, a sample of ${data.total.toLocaleString("en")}` : ""}; a ${thing} counts for its nearest prototype.${data.shown < data.given ? ` ${n.toLocaleString("en")} of them, drawn evenly, are on the page.` : ""}`,
    `The slider shows stages of a real cooling: deterministic annealing of ${data.cooled.toLocaleString("en")} of these ${thing}s, in which prototypes part when their temperature comes and carry masses. “Fitted model” shows the prototypes as they were fitted, which were refined after cooling, and its own probabilities.${model.fitted > K ? ` It was fitted with ${model.fitted} prototypes; those that never parted lie in one place and are shown as one, which leaves ${K}.` : ""}`,
    `Probabilities are those of the model, to five decimals. Those under a thousandth, and beyond the twelve largest of a ${thing}, are not on the page: together at most ${percent(picture.left_out)} of any ${thing} at any temperature.`,
    `${data.texts ? "A word is characteristic by its share of the words of the prototype's documents times ln(1 + A / its frequency in all), A being the mean number of words of a prototype; it is at least twice as frequent there as elsewhere. " : ""}Colours are those of ${merged ? "clusters" : "prototypes"}; a ${thing} has the mixture of its probabilities. The numbers of ${merged ? "clusters are those of the model's labels" : "prototypes are the model's labels"}.`,
    data.texts && data.texts.some(text => text.length >= 599) ? "Long texts are cut after 600 characters; the search sees what is kept." : null];
  $("about").replaceChildren(...notes.filter(Boolean).map(note => make("p", {}, note)));
}

function sayMap() {
  const { name, spread, nearest } = state.map, dots = `Each small dot is a ${thing}, each numbered disc a prototype`;
  const what = name === "neighbours" ? `${dots}. On this map of neighbours (t-SNE) those near each other are alike; how far groups are apart, and their sizes, mean nothing. A prototype stands at the mean place of its ${thing}s.`
    : picture.axes ? `${dots}, by the columns of the data.` : `${dots}, on the plane of ${name}, in which ${name === "axes 1 and 2" ? "the prototypes spread most" : "they spread less"}; it keeps ${percent(spread)} of their spread.`;
  $("map-says").textContent = `${what} For ${percent(nearest)} of the ${thing}s the prototype that is nearest here is their own. Colours mix as the probabilities do: what is undecided is grey.`;
}

// ---------------------------------------------------------------- beginning
function everything() { theme(); drawCurves(); drawCards(); drawSelected(); drawResults(); drawMap(); drawTemperature(); }
if (maps.length > 1) {
  $("plane").hidden = false;
  $("plane").append(...maps.map(({ name }, i) => make("option", { value: i }, name)));
  $("plane").addEventListener("change", event => { state.map = maps[event.target.value]; sayMap(); wholeMap(); });
}
$("closer").addEventListener("click", () => zoom(1.4));
$("farther").addEventListener("click", () => zoom(1 / 1.4));
$("whole").addEventListener("click", wholeMap);
$("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark ? "light" : "dark"; everything(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", everything);
$("search").addEventListener("input", event => search(event.target.value));
document.querySelector(".inspector").addEventListener("keydown", walk);
new ResizeObserver(() => { drawMap(); drawRiver(); }).observe(map);
frame();
tell();
everything();
