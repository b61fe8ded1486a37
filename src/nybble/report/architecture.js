"use strict";
// The chart of a search of an architecture: what is reached at each cost.

const data = JSON.parse(document.getElementById("data").textContent);
const range = (values) => {
  const low = Math.min(...values), high = Math.max(...values), more = 0.06 * (high - low || 1);
  return { kind: "linear", low: low - more, high: high + more };
};

function front() {
  const x = { ...range(data.front.map((point) => point.cost)), label: data.unit };
  const y = { ...range(data.front.map((point) => point.score)), label: data.score };
  const marks = (xs, ys) => data.front.map((point) =>
    mark(point.name === "found" ? 1 : 0, xs(point.cost), ys(point.score), point.name ? 5 : 3, point.name ? "hollow" : "",
      `${point.name ? `${point.name}: ` : ""}${number(point.score)} at ${number(point.cost)}`));
  return { height: 320, x, y, marks, label: `${data.score} against ${data.unit}; search.json has the numbers.` };
}

const place = document.querySelector("[data-chart=front]");
if (place) plot(place, front);
