"use strict";
// The table of layers: sorted by its headings, filtered by name, each row opens to its details.

const table = document.getElementById("layers"), body = table.tBodies[0], box = document.getElementById("table-box");
const rows = [...body.rows], opened = new Map();
const names = rows.map((row) => row.cells[0].textContent);

function order(column, numeric, down) {
  const key = (row) => (numeric ? row.cells[column].dataset.v : row.cells[column].textContent);
  const natural = new Intl.Collator("en", { numeric: true });
  return [...rows].sort((a, b) => {
    const p = key(a), q = key(b), empty = (v) => v === undefined || v === "";
    if (empty(p) || empty(q)) return empty(p) - empty(q); // without a value: last, whichever way
    const less = numeric ? p - q : natural.compare(p, q);
    return down ? -less : less;
  });
}

[...table.tHead.rows[0].cells].forEach((heading, column) => {
  heading.firstElementChild.addEventListener("click", () => {
    const numeric = heading.classList.contains("n"), before = heading.getAttribute("aria-sort");
    const down = before === "none" ? numeric : before === "ascending"; // the largest first, then the smallest
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...order(column, numeric, down).flatMap((row) => (opened.has(row) ? [row, opened.get(row)] : [row])));
  });
});

function filter() {
  const wanted = document.getElementById("filter").value.trim().toLowerCase();
  let count = 0;
  rows.forEach((row, i) => {
    row.hidden = !names[i].toLowerCase().includes(wanted);
    if (opened.has(row)) opened.get(row).hidden = row.hidden;
    count += !row.hidden;
  });
  document.getElementById("count").textContent = count === rows.length ? `${count} layers` : `${count} of ${rows.length} layers`;
}
document.getElementById("filter").addEventListener("input", filter);

function toggle(index, wanted) {
  const row = rows[index], button = row.cells[0].firstElementChild, open = wanted ?? !opened.has(row);
  if (open === opened.has(row)) return;
  button.setAttribute("aria-expanded", String(open));
  if (!open) { opened.get(row).remove(); opened.delete(row); return; }
  const inside = details(data.layers[index]);
  inside.style.width = `${box.clientWidth}px`;
  const detail = html("tr", { class: "detail" }, html("td", { colspan: row.cells.length }, inside));
  opened.set(row, detail);
  row.after(detail);
}

function openLayer(index) {
  document.getElementById("filter").value = "";
  filter();
  toggle(index, true);
  rows[index].scrollIntoView({ block: "start" });
  rows[index].cells[0].firstElementChild.focus({ preventScroll: true });
}

rows.forEach((row, index) => row.cells[0].firstElementChild.addEventListener("click", () => toggle(index)));
new ResizeObserver(() => {
  for (const detail of opened.values()) detail.querySelector(".inside").style.width = `${box.clientWidth}px`;
}).observe(box);

// A table that is cut at its edge says so.
for (const area of document.querySelectorAll(".scroll")) {
  const hint = html("p", { class: "swipe" }, "The table goes on: scroll it sideways \u2192");
  area.before(hint);
  const check = () => { hint.hidden = area.scrollWidth <= area.clientWidth + 1; };
  const watch = new ResizeObserver(check);
  watch.observe(area);
  watch.observe(area.querySelector("table"));
}
