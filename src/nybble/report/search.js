"use strict";
// The two charts of a search: what is lost at each budget, and the bits of each layer against its sensitivity.

const data = JSON.parse(document.getElementById("data").textContent);
const range = (values, room) => {
  const low = Math.min(...values), high = Math.max(...values), more = room * (high - low || 1);
  return { kind: "linear", low: low - more, high: high + more };
};

function front() {
  const points = [...data.front, ...data.compared].filter((point) => point.loss > 0);
  if (!points.length) return null;
  const x = { ...range(points.map((point) => point.cost), 0.04), label: data.unit };
  const y = { ...logRange(points.map((point) => point.loss)), label: "expected loss" };
  const marks = (xs, ys) => {
    const kept = data.front.filter((point) => point.loss > 0);
    return [
      svg("path", { class: "curve k0", d: path(kept.map((point) => [xs(point.cost), ys(point.loss)])) }),
      ...kept.map((point) => mark(0, xs(point.cost), ys(point.loss), 3, "", `${number(point.cost)}: ${number(point.loss)}`)),
      ...data.compared.filter((point) => point.loss > 0).map((point) =>
        mark(point.name === "searched" ? 1 : point.name.startsWith("uniform") ? 2 : 3, xs(point.cost), ys(point.loss), 5, "hollow",
          `${point.name}: ${number(point.loss)} at ${number(point.cost)}`)),
    ];
  };
  return { height: 320, x, y, marks, label: "Expected loss, logarithmic, against the budget; the table above has the compared choices." };
}

function layers() {
  const points = data.layers.filter((layer) => layer.sensitivity > 0);
  if (!points.length) return null;
  const x = { ...logRange(points.map((layer) => layer.sensitivity)), label: "largest sensitivity of a weight" };
  const y = { ...range(points.map((layer) => layer.bits), 0.08), label: "bits", whole: true };
  const marks = (xs, ys) => points.map((layer) => mark(0, xs(layer.sensitivity), ys(layer.bits), 4, "faint", `${layer.name}: ${layer.weights}`));
  return { height: 300, x, y, marks, label: "Bits of each layer against its sensitivity, logarithmic; the table below has the numbers." };
}

for (const [name, make] of [["front", front], ["layers", layers]]) {  // a search in training has neither
  const figure = document.querySelector(`[data-chart=${name}]`);
  if (figure) plot(figure, make);
}
