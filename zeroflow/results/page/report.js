// Filters, figures and themes of the report; its tables: tables.js. Figures are kept as JSON beside their place and drawn when they come into view.
// What a mark carries, `meta`, is written by zeroflow.results.figures.style.
(() => {
  "use strict";
  const KEYS = ["dataset", "method", "optimizer", "queries"];
  const LEGEND_LINE = 21, BOTTOM = 50;
  const FEW = 16;  // settings that a figure shows all of
  // Colours of the light page that a dark one swallows.
  const ON_DARK = {"#000000": "#f2f2f2", "#0072B2": "#4ca6e0", "#D55E00": "#ff8540", "#009E73": "#26c49a", "rgba(255,255,255,0.8)": "rgba(23,25,28,0.8)"};
  const root = document.documentElement;
  const templates = JSON.parse(document.getElementById("templates").textContent);
  const chosen = Object.fromEntries(KEYS.map((key) => [key, new Set()]));
  const keep = document.getElementById("keep-baseline");
  const figures = [...document.querySelectorAll(".figure")].map((place) => ({
    place, plot: place.querySelector(".plot"), note: place.querySelector(".note"), select: place.querySelector("select"),
    button: place.querySelector("button.all"), whole: false, spec: null, stale: true, near: false,
  }));

  // Nothing chosen of a key: all pass. A mark without a key belongs to all of its values.
  function passes(own) {
    const asked = own.baseline && keep.checked ? ["dataset"] : KEYS;
    return asked.every((key) => !chosen[key].size || own[key] === undefined || own[key] === "all" || chosen[key].has(own[key]));
  }

  // A copy of a trace with the points alone that pass: every array that is as long as the list of points is thinned.
  function thinned(trace) {
    const points = trace.meta.points, stays = points.map(passes);
    if (stays.every(Boolean)) return trace;
    const thin = (value) => {
      if (Array.isArray(value)) return value.length === points.length ? value.filter((_, i) => stays[i]) : value;
      if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, thin(v)]));
      return value;
    };
    const {meta, ...rest} = trace;
    return {...thin(rest), meta, visible: stays.some(Boolean) ? trace.visible ?? true : false};
  }

  // The Pareto front of those points that pass: no other has as little memory and as much accuracy.
  function front(trace) {
    let best = -Infinity;
    const stays = trace.meta.front.filter(([,, own]) => passes(own)).sort((a, b) => a[0] - b[0] || b[1] - a[1])
      .filter(([, avg]) => avg > best && (best = avg, true));
    return {...trace, x: stays.map(([memory]) => memory), y: stays.map(([, avg]) => avg), visible: stays.length > 0};
  }

  // Of too many groups the best of each method and optimizer, and of too many of those the best; and which these are, in words.
  function best(groups, limit) {
    const ranked = [...groups].sort((a, b) => (b.rank ?? -1) - (a.rank ?? -1));
    if (ranked.length <= Math.min(FEW, limit)) return {few: ranked, said: ""};
    const seen = new Set(), name = (group) => (group.keys ? `${group.keys.method} ${group.keys.optimizer}` : group.group);
    const each = ranked.filter((group) => !seen.has(name(group)) && seen.add(name(group))), few = each.slice(0, limit);
    const which = each.length < ranked.length ? "of each method and optimizer the one with the best Avg" : "those with the best Avg";
    const cut = each.length < ranked.length && few.length < each.length ? `, and of these the best ${few.length}` : "";
    return {few, said: `${few.length} of ${ranked.length} settings: ${which}${cut}.`};
  }

  // The Avg by which a group is ranked: of several points that of the best one which passes.
  function rankOf(own) {
    return own.ranks ? Math.max(-1, ...own.ranks.filter((_, i) => passes(own.points[i]))) : own.rank;
  }

  // Which groups of marks are drawn: those that pass, of too many the best, or the one that is chosen.
  function shownGroups(figure, meta) {
    const found = new Map();
    for (const {meta: own} of figure.spec.data) {
      if (!own) continue;
      const keys = own.front?.map(([,, point]) => point) ?? own.points ?? [own.keys];
      if (keys.some(passes) && !found.has(own.group)) found.set(own.group, {...own, rank: rankOf(own), free: Boolean(own.front) || keys.some((k) => k.baseline)});
    }
    let all = [...found.values()];
    figure.note.textContent = all.length || !figure.spec.data.some((t) => t.meta) ? "" : "Nothing here passes the filters.";
    if (meta.choose) {
      const select = figure.select, before = select.value;
      const first = all.reduce((a, b) => ((b.rank ?? -1) > (a.rank ?? -1) ? b : a), all[0] ?? {});
      select.replaceChildren(...all.map((g) => new Option(g.label, g.group)));
      select.value = all.some((g) => String(g.group) === before) && figure.asked ? before : String(first.group);
      all = all.filter((g) => String(g.group) === select.value);
    } else if (meta.limit) {
      const counted = all.filter((g) => !g.free), {few, said} = best(counted, meta.limit);
      figure.button.hidden = few.length === counted.length;
      figure.button.textContent = figure.whole ? "show the best alone" : `show all ${counted.length}`;
      if (!figure.button.hidden && !figure.whole) {
        const stay = new Set(few.map((g) => g.group));
        all = all.filter((g) => g.free || stay.has(g.group));
        figure.note.textContent = said;
      }
    }
    return new Set(all.map((g) => g.group));
  }

  function isDark() { return root.dataset.theme === "dark"; }

  function coloured(value) {
    if (!isDark()) return value;
    let text = JSON.stringify(value);
    for (const [light, dark] of Object.entries(ON_DARK)) text = text.replaceAll(`"${light}"`, `"${dark}"`);
    return JSON.parse(text);
  }

  function draw(figure) {
    figure.spec ??= JSON.parse(figure.place.querySelector("script").textContent);
    const meta = figure.spec.layout.meta ?? {}, groups = shownGroups(figure, meta);
    const data = figure.spec.data.map((trace) => {
      if (!trace.meta) return trace;
      const own = trace.meta.front ? front(trace) : trace.meta.points ? thinned(trace) : trace;
      return {...own, visible: groups.has(trace.meta.group) ? (own.visible === false && !meta.choose ? false : true) : false};
    });
    const layout = structuredClone(figure.spec.layout);
    layout.template = isDark() ? templates.dark : templates.light;
    figure.plot.style.minHeight = "";
    figure.plot.style.maxWidth = meta.max_width ? `${meta.max_width}px` : "";
    figure.plot.style.minWidth = meta.min_width ? `${meta.min_width}px` : "";
    const width = Math.max(figure.place.clientWidth, meta.min_width ?? 0);
    const rows = meta.row_height ? new Set(data.filter((trace) => trace.visible !== false).flatMap((trace) => trace.y)).size : 0;
    const height = meta.height + (meta.row_height ?? 0) * rows;
    layout.height = height + (meta.legend ? LEGEND_LINE : 0);
    layout.margin = {...layout.margin, b: BOTTOM, t: Math.max(30, layout.margin?.t ?? 0)};
    if (width < 640) layout.margin = {...layout.margin, l: 44, r: 8};
    figure.plot.hidden = data.length > 0 && data.every((trace) => trace.visible === false);
    figure.stale = false;
    if (figure.plot.hidden) return;
    // How tall the legend is shows when it is there.
    const fit = () => {
      const legend = figure.plot.querySelector(".legend"), tall = legend ? legend.getBBox().height : 0;
      const wanted = Math.round(height + tall);
      return Math.abs(wanted - figure.plot.layout.height) > 4 ? Plotly.relayout(figure.plot, {height: wanted}) : null;
    };
    const until = (trace, end) => ({type: trace.type, x: trace.x.slice(0, end), y: trace.y.slice(0, end)});
    const frames = (figure.spec.frames ?? []).map(({name, traces, ends}) => ({name, traces, data: traces.map((number, i) => until(figure.spec.data[number], ends[i]))}));
    const config = {modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], displaylogo: false, responsive: true, toImageButtonOptions: {format: "svg", filename: figure.place.id}};
    Plotly.react(figure.plot, {data: coloured(data), layout: coloured(layout), config, frames})
      .then(fit).then(() => { figure.place.dataset.drawn = "yes"; });
  }

  function refresh() {
    for (const part of document.querySelectorAll("[data-dataset]")) {
      part.hidden = chosen.dataset.size > 0 && !chosen.dataset.has(part.dataset.dataset);
    }
    Tables.show(passes);
    for (const figure of figures) {
      figure.stale = true;
      if (figure.near) draw(figure);
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = figures.find((each) => each.place === entry.target);
      figure.near = entry.isIntersecting;
      if (figure.near && figure.stale) draw(figure);
    }
  }, {rootMargin: "500px"});

  for (const button of document.querySelectorAll("#filters button[data-key]")) {
    const values = chosen[button.dataset.key], value = button.dataset.value;
    const press = (on) => { values[on ? "add" : "delete"](value); button.setAttribute("aria-pressed", String(on)); };
    press(button.getAttribute("aria-pressed") === "true");
    button.addEventListener("click", () => { press(!values.has(value)); refresh(); });
  }
  document.getElementById("clear").addEventListener("click", () => {
    for (const values of Object.values(chosen)) values.clear();
    for (const button of document.querySelectorAll("#filters button[data-key]")) button.setAttribute("aria-pressed", "false");
    refresh();
  });
  keep.addEventListener("change", refresh);

  for (const figure of figures) {
    figure.select?.addEventListener("change", () => { figure.asked = true; draw(figure); });
    figure.button.addEventListener("click", () => {
      figure.whole = !figure.whole;
      figure.button.setAttribute("aria-pressed", String(figure.whole));
      draw(figure);
    });
  }

  function remember(theme) { try { localStorage.setItem("theme", theme); } catch { /* a page from a file may not */ } }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    refresh();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    root.dataset.theme = event.matches ? "dark" : "light";
    refresh();
  });

  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; refresh(); } });
  addEventListener("beforeprint", () => figures.filter((figure) => figure.stale).forEach(draw));

  if (innerWidth < 640) document.getElementById("filters").open = false;
  refresh();
  for (const figure of figures) seen.observe(figure.place);
})();
