// Tables of the report: which lines are shown, their order, the seeds of a line, columns that stay in sight, files made of them.
const Tables = (() => {
  "use strict";
  const SIDE = 0.55;  // the share of a table's window that columns in sight may take
  const MOST_STUCK = 6;  // as the style sheet has them
  const tables = [...document.querySelectorAll("table[data-table]")];
  const known = new WeakMap();  // of a line: what it is filtered by, its words, the lines of its seeds
  let passes = () => true;

  const sheetOf = (table) => table.closest(".sheet");
  const lines = (table) => [...table.tBodies[0].rows].filter((row) => row.dataset.keys);
  const heads = (table) => [...table.tHead.rows[0].cells].map((cell) => cell.textContent);

  function about(row) {
    if (!known.has(row)) {
      const words = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      known.set(row, {keys: JSON.parse(row.dataset.keys), words, seeds: [], open: false});
    }
    return known.get(row);
  }

  function show(table) {
    const sheet = sheetOf(table), all = lines(table), datasets = new Set();
    const typed = sheet.querySelector("input[type=search]").value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of all) {
      const own = about(row);
      row.hidden = !passes(own.keys) || !typed.every((word) => own.words.includes(word));
      for (const seed of own.seeds) seed.hidden = row.hidden || !own.open;
      if (row.hidden) continue;
      left += 1;
      datasets.add(own.keys.dataset);
    }
    sheet.querySelector(".count").textContent = `${left} of ${all.length} lines`;
    // A data set that all lines share is said by the filters.
    table.toggleAttribute("data-one", datasets.size === 1 && heads(table)[0] === "dataset");
    stick(table);
  }

  // The first words of a line stay in sight, as many as leave room for numbers.
  function stick(table) {
    const window = table.parentNode.clientWidth, stuck = [];
    const names = [...(lines(table)[0]?.cells ?? [])].findIndex((cell) => cell.tagName !== "TH");
    let left = 0;
    for (const [i, cell] of [...table.tHead.rows[0].cells].slice(0, Math.min(Math.max(names, 0), MOST_STUCK)).entries()) {
      const width = cell.getBoundingClientRect().width;
      if (!width) continue;  // a hidden column
      if (stuck.length && left + width > SIDE * window) break;
      table.style.setProperty(`--left-${i + 1}`, `${left}px`);
      stuck.push(i + 1);
      left += width;
    }
    table.dataset.stuck = stuck.join(" ");
  }

  // Numbers by size, what was not measured last, whichever way.
  function sortBy(table, column, descending) {
    const read = (row) => {
      const text = row.cells[column].textContent.replaceAll(",", ""), value = parseFloat(text);
      return text === "-" || text === "" ? null : Number.isNaN(value) || !/^[-+\d.]/.test(text) ? text : value;
    };
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    const rows = lines(table).map((row) => [read(row), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : descending ? compare(b, a) : compare(a, b)));
    table.tBodies[0].append(...rows.flatMap(([, row]) => [row, ...about(row).seeds]));
  }

  // A line for each seed, from the table of cells, below their mean.
  function seedsOf(row, table) {
    const cells = document.querySelector("table[data-table=cells]"), there = heads(cells).map((head) => head.toLowerCase());
    const wanted = new Set(row.dataset.cells.split(" "));
    const found = lines(cells).filter((line) => wanted.has(line.lastElementChild.textContent));
    return found.map((cell) => {
      const line = document.createElement("tr"), value = (head) => cell.cells[there.indexOf(head.toLowerCase())]?.textContent;
      line.className = "seed";
      line.title = `cell ${cell.lastElementChild.textContent}`;
      for (const [i, head] of heads(table).entries()) {
        const place = document.createElement(row.cells[i].tagName);
        place.className = row.cells[i].className;
        if (head === "method") place.textContent = `seed ${value("seed")}`;
        else if (place.tagName === "TD") place.textContent = value(head) ?? "";
        if (place.tagName === "TH") place.scope = "row";
        line.append(place);
      }
      return line;
    });
  }

  function offerSeeds(table) {
    const n = heads(table).indexOf("n");
    for (const row of lines(table)) {
      const count = row.dataset.cells?.split(" ").length ?? 0;
      if (count < 2) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = count;
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `${count} seeds`);
      button.title = "show each seed";
      button.addEventListener("click", () => {
        const own = about(row);
        own.open = !own.open;
        if (!own.seeds.length) row.after(...(own.seeds = seedsOf(row, table)));
        button.setAttribute("aria-expanded", String(own.open));
        show(table);
      });
      row.cells[n].replaceChildren(button);
    }
  }

  // What is shown of a table, without its seeds: heads and cells of the columns and lines in sight.
  function shown(table) {
    const from = table.hasAttribute("data-one") ? 1 : 0;
    return {
      heads: heads(table).slice(from),
      lines: lines(table).filter((row) => !row.hidden).map((row) => [...row.cells].slice(from)),
      left: [...table.tHead.rows[0].cells].slice(from).map((cell) => cell.classList.contains("text")),
    };
  }

  function asCsv(table) {
    const {heads: names, lines: rows} = shown(table);
    const wide = names.map((_, i) => rows.some((row) => row[i].textContent.includes(" ± ")));
    const plain = (text) => (text === "-" ? "" : /^[-+]?[\d,]+(\.\d+)?$/.test(text) ? text.replaceAll(",", "").replace(/^\+/, "") : text);
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const split = (text, i) => (wide[i] ? [...text.split(" ± "), ""].slice(0, 2) : [text]);
    const made = [
      names.flatMap((name, i) => (wide[i] ? [name, `${name} ±`] : [name])),
      ...rows.map((row) => row.flatMap((cell, i) => split(cell.textContent, i)).map(plain)),
    ];
    return made.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  }

  const TEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "<": "\\textless{}", "|": "\\textbar{}", ">": "\\textgreater{}",
  };
  const tex = (text) => [...text].map((letter) => TEX[letter] ?? letter).join("");

  function asLatex(table) {
    const {heads: names, lines: rows, left} = shown(table), sheet = sheetOf(table);
    const written = (cell) => {
      const text = cell.textContent === "-" ? "--" : tex(cell.textContent);
      return cell.querySelector("b") ? `\\textbf{${text}}` : cell.querySelector("u") ? `\\underline{${text}}` : text;
    };
    const title = sheet.querySelector("h2, h3").textContent;
    return [
      "% needs \\usepackage{booktabs}", "\\begin{table}", "\\centering", `\\caption{${tex(title)}.}`,
      `\\label{tab:${table.dataset.table}}`, `\\begin{tabular}{${left.map((is) => (is ? "l" : "r")).join("")}}`, "\\toprule",
      `${names.map(tex).join(" & ")} \\\\`, "\\midrule", ...rows.map((row) => `${row.map(written).join(" & ")} \\\\`),
      "\\bottomrule", "\\end{tabular}", "\\end{table}", "",
    ].join("\n");
  }

  function save(text, name, type) {
    const link = document.createElement("a"), address = URL.createObjectURL(new Blob([text], {type}));
    Object.assign(link, {href: address, download: name});
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  for (const table of tables) {
    const sheet = sheetOf(table);
    if (table.dataset.table === "summary") offerSeeds(table);
    sheet.querySelector("input[type=search]").addEventListener("input", () => show(table));
    sheet.querySelector("[data-export=csv]").addEventListener("click", () => save(asCsv(table), `${table.dataset.table}.csv`, "text/csv"));
    sheet.querySelector("[data-export=latex]").addEventListener("click", () => save(asLatex(table), `${table.dataset.table}.tex`, "text/x-tex"));
    for (const heading of table.tHead.rows[0].cells) {
      heading.querySelector("button").addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") !== "descending";
        for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortBy(table, heading.cellIndex, descending);
      });
    }
  }

  // Show the lines whose keys pass, in every table.
  return {show: (filter) => { passes = filter; tables.forEach(show); }};
})();
