"use strict";
// The chart of a sweep: a curve a series, a bar where repeats say how sure a mean is.

const data = JSON.parse(document.getElementById("data").textContent);
const only = new Set(); // curves that the legend picked; empty means all
const picked = () => data.curves.map((curve, kind) => ({ ...curve, kind })).filter((curve) => only.size === 0 || only.has(curve.kind));

function axis(values, label) {
  const low = Math.min(...values), high = Math.max(...values);
  if (low > 0 && high / low > 8) return { ...logRange(values), label: `${label} (logarithmic)` };
  const room = 0.06 * (high - low || Math.abs(high) || 1);
  return { kind: "linear", low: low - room, high: high + room, label };
}

function curves() {
  const points = picked().flatMap((curve) => curve.points);
  if (!points.length) return null;
  const x = axis(points.map((point) => point.x), data.x);
  const y = axis(points.flatMap((point) => [point.mean, point.low ?? point.mean, point.high ?? point.mean]), data.y);
  const marks = (xs, ys) => picked().flatMap(({ kind, ...curve }) => [
    svg("path", { class: `curve ${colourOf(kind)}`, d: path(curve.points.map((point) => [xs(point.x), ys(point.mean)])) }),
    ...curve.points.filter((point) => point.low !== null).map((point) =>
      svg("line", { class: `curve ${colourOf(kind)}`, x1: xs(point.x), x2: xs(point.x), y1: ys(point.low), y2: ys(point.high) })),
    ...curve.points.map((point) => mark(kind, xs(point.x), ys(point.mean), 3.5, "",
      `${curve.name}: ${number(point.mean, 4)} at ${number(point.x)}, ${point.count} run${point.count > 1 ? "s" : ""}`)),
  ]);
  return { height: 380, x, y, marks, label: `${data.y} against ${data.x}; the table below has the numbers.` };
}

const figure = document.querySelector("[data-chart=curves]");
if (figure) {
  const redraw = plot(figure, curves), legend = document.querySelector(".legend");
  data.curves.forEach((curve, kind) => {
    const glyph = svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, svg("path", { class: `mark ${colourOf(kind)}`, d: shapeOf(kind)(4.2) }));
    const button = html("button", { type: "button", "aria-pressed": "false" }, glyph, curve.name);
    button.addEventListener("click", () => {
      only.has(kind) ? only.delete(kind) : only.add(kind);
      button.setAttribute("aria-pressed", String(only.has(kind)));
      redraw();
    });
    legend.append(button);
  });
}
