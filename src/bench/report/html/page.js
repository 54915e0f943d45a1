"use strict";
// Sorts a table by the column whose heading is pressed, and the other way when it is pressed again.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const index = [...heading.parentNode.children].indexOf(heading);
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = "number" in heading.dataset;
    const key = (row) => {
      const cell = row.children[index];
      const text = cell.dataset.sort ?? cell.textContent.trim();
      return number ? parseFloat(text) : text;
    };
    const compare = (a, b) => {
      if (!number) return (down ? -1 : 1) * a.localeCompare(b);
      // What has no number stands last, whichever way.
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return down ? b - a : a - b;
    };
    const body = heading.closest("table").tBodies[0];
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => compare(a, b));
    body.append(...rows.map(([, row]) => row));
  });
}
