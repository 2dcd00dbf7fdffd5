// Sorts a table by the heads of its columns, and hides the runs that a form leaves out.
"use strict";
{
  const inWords = new Intl.Collator(undefined, { numeric: true });

  // A button in each head of the last row of heads: a click, Enter or Space sorts.
  for (const table of document.querySelectorAll(".scroll > table:not(.unsorted)")) {
    const heads = [...[...table.tHead.rows].at(-1).cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table.tBodies[0], heads, column));
      head.append(button);
    });
  }

  // Stable, missing values last in both directions.
  function sort(body, heads, column) {
    const head = heads[column];
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const key = head.classList.contains("text")
      ? (cell) => cell.textContent.trim() || null
      : (cell) => ("value" in cell.dataset ? Number(cell.dataset.value) : null);
    const compare = head.classList.contains("text") ? inWords.compare : (a, b) => a - b;
    const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
    rows.sort(([a], [b]) =>
      a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b),
    );
    body.append(...rows.map(([, row]) => row));
  }

  // The forms, each of the tables and charts in its section.
  for (const form of document.querySelectorAll("form.filter")) {
    const section = form.closest("section");
    const runs = JSON.parse(form.querySelector("script").textContent);
    const rows = [...section.querySelectorAll("tr[data-runs]")];
    const choices = [...form.querySelectorAll("select")];
    const filter = () => {
      const words = form.querySelector("input").value.toLowerCase().split(/\s+/);
      const chosen = choices.filter((choice) => choice.value !== "");
      const shown = runs.flatMap((run, number) => {
        const said = Object.entries(run).map(([name, value]) => `${name}=${value}`);
        const text = said.join(" ").toLowerCase();
        const fits =
          chosen.every((choice) => run[choice.name] === choice.value) &&
          words.every((word) =>
            /=./.test(word) ? said.some((one) => one.toLowerCase() === word) : text.includes(word),
          );
        return fits ? [number] : [];
      });
      const among = new Set(shown.map(String));
      for (const row of rows) row.hidden = !row.dataset.runs.split(" ").some((n) => among.has(n));
      form.querySelector("output").textContent = `${shown.length} of ${runs.length} runs`;
      for (const figure of section.querySelectorAll("figure.chart"))
        figure.view?.signal("shown", shown).runAsync();
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    form.hidden = false;
    filter();
    // The lines that are chosen in a chart are marked in the tables.
    addEventListener("load", async () => {
      await window.drawn;
      const mark = (name, { run = [] }) => {
        for (const row of rows)
          row.classList.toggle("chosen", row.dataset.runs.split(" ").some((n) => run.includes(Number(n))));
      };
      for (const figure of section.querySelectorAll("figure.chart"))
        figure.view?.addSignalListener("chosen", mark);
    });
  }
}
