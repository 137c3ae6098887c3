"use strict";
// Sorts a table by the column whose heading is pressed: numbers by size, units included.
const UNITS = { ns: 1e-9, us: 1e-6, "\u00b5s": 1e-6, ms: 1e-3, s: 1, min: 60, h: 3600, d: 86400,
  B: 1, KiB: 1024, MiB: 1048576, GiB: 1073741824, TiB: 1099511627776,
  k: 1e3, M: 1e6, G: 1e9, T: 1e12, J: 1, kJ: 1e3, MJ: 1e6, GJ: 1e9 };
function sizeOf(text) {
  const found = /^\s*(?:spent\s+)?([-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)\s*(\S*)/i.exec(text);
  if (!found) return null;
  return Number(found[1].replaceAll(",", "")) * (UNITS[found[2]] ?? 1);
}
function compare(a, b) {
  const sizes = [sizeOf(a), sizeOf(b)];
  if (sizes[0] !== null && sizes[1] !== null) return sizes[0] - sizes[1];
  if ((sizes[0] === null) !== (sizes[1] === null)) return sizes[0] === null ? 1 : -1;
  return a.localeCompare(b);
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const column = [...heading.parentElement.children].indexOf(heading);
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = heading.closest("table").tBodies[0];
    const rows = [...body.rows];
    rows.sort((a, b) => (down ? -1 : 1) *
      compare(a.cells[column].textContent, b.cells[column].textContent));
    body.append(...rows);
  });
}
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
