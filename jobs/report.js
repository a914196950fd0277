"use strict";
// Sorting and filtering of the list of videos. Without it the page is complete, only fixed in its order.
(() => {
  document.documentElement.classList.add("scripted");
  const table = document.getElementById("list"), body = table.tBodies[0], rows = [...body.rows];
  const find = document.getElementById("find"), which = document.getElementById("which"), count = document.getElementById("count");
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.v);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = rows.map((row) => [value(row, column), row]);
      // What is not known stays at the end, whichever way.
      keyed.sort(([a], [b]) => (a === "") - (b === "") || (up ? compare(a, b) : compare(b, a)));
      body.append(...keyed.map(([, row]) => row));
    });
  });
  const filter = () => {
    const words = find.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (!which.value || row.dataset.s === which.value) && (!words || row.textContent.toLowerCase().includes(words));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = words || which.value ? `${shown} of ${rows.length}` : "";
  };
  find.addEventListener("input", filter);
  which.addEventListener("change", filter);
})();
