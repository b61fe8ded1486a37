"use strict";
// Small plots as inline SVG, drawn at the width they get, and again when it changes.

const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`,
  (r) => `M${-r},${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0,${-1.25 * r}L${1.2 * r},${r}H${-1.2 * r}Z`,
  (r) => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0Z`,
  (r) => `M0,${1.25 * r}L${1.2 * r},${-r}H${-1.2 * r}Z`,
  (r) => `M${-r},${-r}L${r},${r}M${r},${-r}L${-r},${r}`,
  (r) => `M${-1.3 * r},0H${1.3 * r}M0,${-1.3 * r}V${1.3 * r}`,
];

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const number = (value, digits = 3) =>
  value === 0 ? "0" : Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4 ? value.toExponential(Math.min(1, digits - 1))
    : Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 8 });
const percent = (value) => `${number(100 * value)}\u00a0%`;

// A different colour and a different shape for each kind; both together are unique for the first 56.
const shapeOf = (kind) => SHAPES[kind % SHAPES.length];
const colourOf = (kind) => `k${kind % 8}`;

const BENDS = { linear: (v) => v, sqrt: (v) => Math.sqrt(Math.max(v, 0)), log: (v) => Math.log10(v) };

function scale(axis, from, to) {
  const bend = BENDS[axis.kind], low = bend(axis.low), high = bend(axis.high);
  return (value) => from + (to - from) * (high === low ? 0.5 : (bend(value) - low) / (high - low));
}

// Round numbers between low and high, the coarsest first, so that those that would crowd can be dropped.
function candidates(axis) {
  if (axis.values) return axis.values;
  const found = [], { low, high, kind } = axis;
  if (kind === "linear") {
    const raw = (high - low) / (axis.count ?? 5), power = 10 ** Math.floor(Math.log10(raw));
    let step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
    if (axis.whole) step = Math.max(1, Math.round(step));
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }
  const first = kind === "log" ? Math.floor(Math.log10(low)) : 0, last = Math.floor(Math.log10(high));
  const decades = Math.log10(high) - Math.log10(low);
  const multiples = kind === "sqrt" ? [5, 2, 1] : decades > 2.5 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
  if (kind === "sqrt") found.push(0);
  for (let power = last; power >= first; power--) {
    for (const m of multiples) {
      const value = Number((m * 10 ** power).toPrecision(3));
      if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) found.push(value);
    }
  }
  return found;
}

function ticks(axis, position, gap) {
  const kept = [];
  for (const value of candidates(axis)) {
    if (kept.every((other) => Math.abs(position(other) - position(value)) >= gap)) kept.push(value);
  }
  return kept;
}

// Room around values on a logarithmic axis.
function logRange(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return { kind: "log", low: low / 1.25, high: high * 1.25 };
}

/* Draw into a figure. spec: height; x, y: {kind, low, high, label, whole, values, format}; label: what the picture says
   to those who can't see it; marks(x, y, box): SVG nodes. */
function plot(figure, make) {
  let width = 0;
  const draw = () => {
    figure.querySelector(":scope > svg, :scope > p")?.remove();
    const spec = make(width);
    if (!spec) { figure.append(html("p", { class: "dim" }, "Nothing to draw: no such values.")); return; }
    figure.append(picture(spec, width));
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now > 0 && now !== width) { width = now; draw(); }
  }).observe(figure);
  return () => width && draw();
}

function picture(spec, width) {
  const height = spec.height, box = { left: 54, right: width - 10, top: 12, bottom: height - 42 };
  const x = scale(spec.x, box.left, box.right), y = scale(spec.y, box.bottom, box.top);
  const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.label });
  for (const value of ticks(spec.y, y, 20)) {
    made.append(svg("line", { class: "rule", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
    made.append(svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, (spec.y.format ?? number)(value)));
  }
  for (const value of ticks(spec.x, x, spec.x.gap ?? 42)) {
    made.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4 }));
    made.append(svg("text", { x: x(value), y: box.bottom + 17, "text-anchor": "middle" }, (spec.x.format ?? number)(value)));
  }
  made.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  made.append(svg("text", { class: "label", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, spec.x.label));
  const middle = (box.top + box.bottom) / 2;
  made.append(svg("text", { class: "label", transform: `translate(11 ${middle}) rotate(-90)`, "text-anchor": "middle" }, spec.y.label));
  made.append(...spec.marks(x, y, box));
  return made;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

function mark(kind, x, y, size, extra, title) {
  const place = `translate(${x.toFixed(1)} ${y.toFixed(1)})`;
  return svg("path", { class: `mark ${colourOf(kind)} ${extra}`, d: shapeOf(kind)(size), transform: place }, svg("title", {}, title));
}
