// The scoreboard's filters. The address keeps the choice: scoreboard.html#paper=pope2020&verdict=fails&words=trust
document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("filters"), table = document.getElementById("claims-table");
  if (!form || !table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const text = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  const fields = [...form.elements].filter(field => field.name);

  function show() {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = fields.filter(field => field.tagName === "SELECT" && field.value);
    let count = 0;
    for (const row of rows) {
      row.hidden = !(chosen.every(field => row.dataset[field.name] === field.value)
        && words.every(word => text.get(row).includes(word)));
      count += !row.hidden;
    }
    form.querySelector("output").textContent = `${count} of ${rows.length} claims`;
  }

  function remember() {
    const state = new URLSearchParams(fields.filter(field => field.value).map(field => [field.name, field.value]));
    history.replaceState(null, "", `#${state}`);
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const field of fields) field.value = state.get(field.name) ?? "";
    show();
  }

  function sort(column, button) {
    const down = button.ariaSort === "ascending";
    for (const head of table.tHead.rows[0].cells) head.ariaSort = null;
    button.ariaSort = down ? "descending" : "ascending";
    const key = row => row.cells[column].textContent;
    rows.sort((a, b) => (down ? -1 : 1) * key(a).localeCompare(key(b), "en", { numeric: true }));
    body.append(...rows);
  }

  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(column, head));
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(column, head); });
  });
  form.addEventListener("input", () => { show(); remember(); });
  form.addEventListener("submit", event => event.preventDefault());
  window.addEventListener("hashchange", recall);
  recall();
});
