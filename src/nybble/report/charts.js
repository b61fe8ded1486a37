"use strict";
// The charts over all layers, and those of one layer.

const data = JSON.parse(document.getElementById("data").textContent);
const only = new Set(); // kinds that the legend picked; empty means all
const shown = (layer) => only.size === 0 || only.has(layer.kind);
const kindOf = (layer) => data.kinds.indexOf(layer.kind);
const blocks = Math.max(0, ...data.layers.map((layer) => layer.depth ?? 0));
const outside = data.layers.some((layer) => layer.depth === undefined);
const place = (layer) => layer.depth ?? blocks + 1;
const middle = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

// One kind's curve (through the median where a block has several) and its points.
function series(kind, key, x, y, extra, size) {
  const layers = data.layers.filter((layer) => layer.kind === data.kinds[kind] && layer[key] !== undefined);
  const usable = layers.filter((layer) => key === "sqnr" || layer[key] > 0);
  const depths = [...new Set(usable.filter((l) => l.depth !== undefined).map(place))].sort((a, b) => a - b);
  const curve = depths.map((d) => [x(d), y(middle(usable.filter((l) => place(l) === d).map((l) => l[key])))]);
  const made = [svg("path", { class: `curve ${colourOf(kind)} ${extra ? "other" : ""}`, d: path(curve) })];
  for (const layer of usable) {
    const text = `${layer.name}: ${key === "sqnr" ? `${number(layer[key])} dB` : percent(layer[key])}${extra ? " (round-to-nearest)" : ""}`;
    made.push(opens(mark(kind, x(place(layer)), y(layer[key]), size, extra, text), layer));
  }
  return made;
}

function opens(node, layer) {
  node.classList.add("link");
  node.addEventListener("click", () => openLayer(data.layers.indexOf(layer)));
  return node;
}

function depthAxis() {
  const format = (value) => (outside && value === blocks + 1 ? "outside" : String(value));
  return { kind: "linear", low: -0.5, high: blocks + (outside ? 1.5 : 0.5), whole: true, count: 8, gap: 26, label: "block (depth in the model)", format };
}

function byDepth(keys, y, label, width) {
  const size = width < 500 ? 2.2 : 3, picked = data.kinds.map((_, kind) => kind).filter((kind) => only.size === 0 || only.has(data.kinds[kind]));
  const marks = (xs, ys) => keys.toReversed().flatMap((key) => picked.flatMap((kind) => series(kind, key, xs, ys, key === "rtn_error" ? "hollow" : "", size)));
  return { height: 330, x: depthAxis(), y, label, marks };
}

function errorChart(width) {
  const differs = data.layers.some((l) => Math.abs((l.error ?? 0) - (l.rtn_error ?? 0)) > 1e-6 * (l.rtn_error ?? 0));
  const keys = differs ? ["error", "rtn_error"] : ["error"];
  const values = data.layers.filter(shown).flatMap((layer) => keys.map((key) => layer[key])).filter((value) => value > 0);
  if (!values.length) return null;
  const y = { ...logRange(values), label: "lost share of output power (%)", format: (value) => number(100 * value) };
  return byDepth(keys, y, "Relative output error of each layer against its block, logarithmic; the table of layers has the numbers.", width);
}

function sqnrChart(width) {
  const values = data.layers.filter(shown).map((layer) => layer.sqnr).filter((value) => value !== undefined);
  if (!values.length) return null;
  const low = Math.min(...values), high = Math.max(...values), room = Math.max(0.5, (high - low) * 0.06);
  const y = { kind: "linear", low: low - room, high: high + room, label: "SQNR (dB)" };
  return byDepth(["sqnr"], y, "Signal to quantization noise of each weight against its block; the table of layers has the numbers.", width);
}

function spreadChart(width) {
  const layers = data.layers.filter((l) => shown(l) && l.input_picture?.inter > 0 && l.input_picture.intra > 0);
  if (!layers.length) return null;
  const range = logRange(layers.flatMap((l) => [l.input_picture.inter, l.input_picture.intra]));
  const x = { ...range, label: "intra-channel variance / mean square" }, y = { ...range, label: "inter-channel variance / mean square" };
  const marks = (xs, ys, box) => [
    svg("line", { class: "axis", "stroke-dasharray": "5 4", x1: box.left, y1: box.bottom, x2: box.right, y2: box.top }),
    svg("text", { class: "over", x: box.left + 0.15 * (box.right - box.left) + 12, y: box.bottom - 0.15 * (box.bottom - box.top) + 8 }, "inter = intra"),
    ...layers.map((layer) => {
      const { inter, intra } = layer.input_picture;
      return opens(mark(kindOf(layer), xs(intra), ys(inter), width < 500 ? 3 : 4, "faint", `${layer.name}: inter ${number(inter)}, intra ${number(intra)}`), layer);
    }),
  ];
  return { height: Math.min(430, Math.max(300, width * 0.8)), x, y, marks, label: "Inter-channel against intra-channel variance of each layer's input, both logarithmic." };
}

// The range of a histogram that holds values or grid.
function used(picture, grid) {
  const { edge, counts } = picture, step = (2 * edge) / counts.length;
  const full = counts.map((count, i) => (count ? i : -1)).filter((i) => i >= 0);
  const ends = [...full.flatMap((i) => [-edge + i * step, -edge + (i + 1) * step]), ...grid];
  return ends.length ? [Math.max(-edge, Math.min(...ends)), Math.min(edge, Math.max(...ends))] : [-edge, edge];
}

function histogram(picture, label) {
  const grid = data.grids[picture.format] ?? [], [low, high] = used(picture, grid);
  const { edge, counts } = picture, step = (2 * edge) / counts.length, room = (high - low) * 0.01;
  const x = { kind: "linear", low: low - room, high: high + room, label };
  const y = { kind: "sqrt", low: 0, high: Math.max(1, ...counts), label: "values a bin (square-root axis)", format: compact };
  const bands = (picture.thresholds ?? []).map(([from, to]) => [Math.max(from, low), Math.min(to, high)]).filter(([from, to]) => from <= to);
  const marks = (xs, ys, box) => [
    ...counts.map((count, i) => [count, -edge + i * step]).filter(([count]) => count).map(([count, from]) => {
      const left = xs(from), text = `${number(from)} to ${number(from + step)}: ${count.toLocaleString("en")} values`;
      return svg("rect", { class: "bar", x: left, y: ys(count), width: Math.max(0.5, xs(from + step) - left - 0.6), height: box.bottom - ys(count) }, svg("title", {}, text));
    }),
    ...bands.map(([from, to]) => svg("rect", { class: "band", x: xs(from) - 0.75, y: box.top, width: xs(to) - xs(from) + 1.5, height: box.bottom - box.top }, svg("title", {}, from === to ? `threshold ${number(from)}` : `threshold, ${number(from)} to ${number(to)}`))),
    ...grid.flatMap((value) => [
      ...(grid.length <= 40 ? [svg("line", { class: "value through", x1: xs(value), x2: xs(value), y1: box.top, y2: box.bottom })] : []),
      svg("line", { class: "value", x1: xs(value), x2: xs(value), y1: box.bottom - 7, y2: box.bottom + 4 }, svg("title", {}, number(value, 6))),
    ]),
  ];
  return () => ({ height: 240, x, y, marks, label: `Histogram of ${counts.length} bins, ${grid.length} grid values; ${percent(picture.clipped)} of the values lie beyond the grid.` });
}

const compact = (value) => (value >= 1e6 ? `${number(value / 1e6)}M` : value >= 1e3 ? `${number(value / 1e3)}k` : number(value));

function channelChart(channels) {
  const at = (i) => (channels.length > 1 ? (100 * i) / (channels.length - 1) : 50);
  const values = channels.flat().filter((value) => value > 0);
  const line = (key) => channels.map((pair, i) => [at(i), pair[key]]).filter(([, value]) => value > 0);
  const marks = (xs, ys) => [0, 1].flatMap((key) => {
    const points = line(key).map(([i, value]) => [xs(i), ys(value)]);
    if (!points.length) return [];
    const at = Math.floor(points.length / 2), near = points.slice(Math.max(0, at - 10), at + 11);
    return [
      svg("path", { class: `curve k${key} ${key ? "other" : ""}`, d: path(points) }),
      ...points.map(([px, py]) => svg("path", { class: `mark k${key} ${key ? "hollow" : ""}`, d: SHAPES[key](1.7), transform: `translate(${px.toFixed(1)} ${py.toFixed(1)})` })),
      svg("text", { class: "label over", x: points[at][0], y: Math.min(...near.map((point) => point[1])) - 7, "text-anchor": "middle" }, key ? "mean" : "largest"),
    ];
  });
  const x = { kind: "linear", low: 0, high: 100, label: "channels, loudest to quietest (%)" };
  return () => values.length ? { height: 240, x, y: { ...logRange(values), label: "magnitude" }, marks, label: `Largest and mean magnitude of ${channels.length} channels from the loudest to the quietest.` } : null;
}

function shiftChart(counts) {
  const x = { kind: "linear", low: -0.6, high: counts.length - 0.4, whole: true, values: counts.map((_, i) => i), gap: 20, label: "shift of the exponent (powers of two)" };
  const y = { kind: "sqrt", low: 0, high: 1.15 * Math.max(...counts, 1), label: "columns (square-root axis)", format: compact };
  const marks = (xs, ys, box) => counts.flatMap((count, i) => {
    const wide = Math.min(40, 0.7 * (xs(1) - xs(0)));
    return [
      svg("rect", { class: "bar", x: xs(i) - wide / 2, y: ys(count), width: wide, height: box.bottom - ys(count) }),
      svg("text", { class: "label", x: xs(i), y: ys(count) - 4, "text-anchor": "middle" }, count.toLocaleString("en")),
    ];
  });
  return () => ({ height: 240, x, y, marks, label: `Columns of each shift: ${counts.map((count, i) => `${count} of ${i}`).join(", ")}.` });
}

function spreadBars({ inter, intra }) {
  const bars = [["inter", inter], ["intra", intra]];
  const x = { kind: "linear", low: -0.6, high: 1.6, values: [0, 1], format: (i) => `${bars[i][0]}-channel`, label: "variance between and within channels" };
  const y = { kind: "linear", low: 0, high: 1.18 * (Math.max(inter, intra) || 1), label: "variance / mean square" };
  const marks = (xs, ys, box) => bars.flatMap(([, value], i) => [
    svg("rect", { class: "bar", x: xs(i) - 26, y: ys(value), width: 52, height: box.bottom - ys(value) }),
    svg("text", { class: "label", x: xs(i), y: ys(value) - 4, "text-anchor": "middle" }, number(value)),
  ]);
  return () => ({ height: 240, x, y, marks, label: `Inter-channel variance ${number(inter)}, intra-channel variance ${number(intra)}.` });
}

function figure(title, below, make) {
  const made = html("figure", { class: "card" }, html("figcaption", {}, title, html("span", { class: "dim" }, below)));
  plot(made, make);
  return made;
}

// What a row opens to.
function details(layer) {
  const weight = layer.weight_picture, input = layer.input_picture, figures = [];
  const gridded = (p) => `${p.format ? `Lines: the ${data.grids[p.format].length} values of the format. ` : ""}${percent(p.clipped)} lie beyond the largest.${p.thresholds ? " Shaded: thresholds; wide where each block has its own, or no weight is near." : ""}`;
  if (weight) figures.push(figure("Weights on their grid", gridded(weight), histogram(weight, "weight / scale (units of the grid)")));
  if (input) {
    const own = input.histogram.format;
    figures.push(figure(own ? "Inputs on their grid" : "Inputs (kept in float)", own ? gridded(input.histogram) : "Over the largest magnitude.",
      histogram(input.histogram, own ? "input / scale (units of the grid)" : "input / largest magnitude")));
    figures.push(figure("Input channels", "Largest (solid) and mean (dashed) magnitude.", channelChart(input.channels)));
    figures.push(figure("Between and within channels", input.intra ? `Inter is ${number(input.inter / input.intra)} times intra.` : "", spreadBars(input)));
  }
  if (layer.input_shifts) figures.push(figure("Exponent shifts", "How many input columns have each shift.", shiftChart(layer.input_shifts)));
  const facts = [
    ["Weights", layer.weights ?? "float"], ["Inputs", layer.inputs ?? "float"], ["Outputs", layer.outputs],
    ["Bits a weight", number(layer.bits, 5)], ["Static input scale", layer.input_scale && number(layer.input_scale, 4)],
    ["Clip: lowest, median, highest", layer.clip?.map((c) => number(c)).join(", ")], ["Notes", layer.notes?.join("; ")],
  ].filter(([, value]) => value).map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, String(value))));
  const body = html("div", { class: "inside" }, html("dl", { class: "facts" }, ...facts));
  body.append(figures.length ? html("div", { class: "two" }, ...figures) : html("p", { class: "dim" }, "No histograms were kept for this layer."));
  return body;
}

const MAKERS = { error: errorChart, sqnr: sqnrChart, spread: spreadChart };
const redraws = [...document.querySelectorAll("[data-chart]")].map((host) => plot(host, MAKERS[host.dataset.chart]));
// A legend button; every legend has the same, and all show the same choice.
function legendButton(kind, i) {
  const glyph = svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, svg("path", { class: `mark ${colourOf(i)}`, d: shapeOf(i)(4.2) }));
  const button = html("button", { type: "button", "aria-pressed": "false" }, glyph, kind);
  button.addEventListener("click", () => {
    only.has(kind) ? only.delete(kind) : only.add(kind);
    for (const legend of legends) legend.children[i].setAttribute("aria-pressed", String(only.has(kind)));
    redraws.forEach((draw) => draw());
  });
  return button;
}

const legends = [...document.querySelectorAll(".legend")];
for (const legend of legends) legend.append(...data.kinds.map(legendButton));
