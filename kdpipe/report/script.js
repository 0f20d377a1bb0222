"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const minus = (text) => text.replace("-", "\u2212");

  // ------------------------------------------------------------------------------------------- theme

  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `${theme.textContent} theme`); };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();
  addEventListener("beforeprint", () => document.querySelectorAll("details.print").forEach((one) => { one.open = true; }));

  // -------------------------------------------------------- charts: one cursor over all of them, by round

  const charts = read("chart-data");
  const pictures = [...document.querySelectorAll("svg[data-chart]")];
  const moveCursor = (round) => {
    for (const picture of pictures) {
      const [left, right, first, last] = picture.dataset.x.split(" ").map(Number);
      const x = round === null ? 0 : left + ((right - left) * (round - first)) / Math.max(1, last - first);
      const cursor = picture.querySelector(".cursor");
      cursor.setAttribute("visibility", round === null ? "hidden" : "visible");
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      const told = [];
      for (const [label, rounds, shown] of round === null ? [] : charts[picture.dataset.chart]) {
        let at = -1;
        rounds.forEach((number, index) => { if (number <= round) at = index; });
        if (at >= 0 && (rounds[at] === round || rounds.length > 1)) told.push((label ? label + " " : "") + shown[at]);
      }
      picture.closest("figure").querySelector("output").textContent = told.length ? `round ${round}: ${told.join(", ")}` : "";
    }
  };
  for (const picture of pictures) {
    const [left, right, first, last] = picture.dataset.x.split(" ").map(Number);
    let round = null;
    const go = (to) => { round = Math.min(last, Math.max(first, to)); moveCursor(round); };
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 340;
      go(Math.round(first + ((last - first) * (x - left)) / (right - left)));
    });
    picture.addEventListener("pointerleave", () => moveCursor(null));
    picture.addEventListener("focus", () => go(round === null ? last : round));
    picture.addEventListener("blur", () => moveCursor(null));
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); go(round + step); }
      if (event.key === "Home") { event.preventDefault(); go(first); }
      if (event.key === "End") { event.preventDefault(); go(last); }
    });
  }

  // ------------------------------------------------------------------------------------------ token view

  const data = read("token-data");
  if (!data) return;
  const BATCH = 12;
  const EDGES = [0.1, 0.5, 1.5, 4];
  const UNITS = 10000;
  const list = document.getElementById("list");
  const tip = document.getElementById("tip");
  const more = document.getElementById("more");
  const state = { set: 0, filter: "all", sort: "worst", search: "", shown: BATCH };

  const value = (item, key, at) => (item[key] && item[key][at] !== null ? item[key][at] / UNITS : null);
  const gap = (item, at) => {
    const s = value(item, "s", at), t = value(item, "t", at);
    return s === null || t === null ? null : s - t;
  };
  for (const set of data.sets)
    for (const item of set.items) {
      const gaps = item.p.map((_, at) => gap(item, at)).filter((one) => one !== null);
      item.worst = gaps.reduce((most, one) => Math.max(most, Math.abs(one)), 0);
      item.mean = gaps.length ? gaps.reduce((sum, one) => sum + one, 0) / gaps.length : null;
      item.words = (item.id + "\n" + item.q + "\n" + item.p.map(piece).join("") + "\n" + (item.after || "") + "\n" + (item.before || "")).toLowerCase();
    }
  function piece(place) {
    const found = data.pieces[place];
    return typeof found === "string" ? found : found[0];
  }
  const kind = (place) => (typeof data.pieces[place] === "string" ? "text" : data.pieces[place][1]);
  const flipped = (item) => "was" in item && item.was !== item.is;
  const FILTERS = {
    all: () => true,
    right: (item) => item.ok,
    wrong: (item) => !item.ok,
    truncated: (item) => item.cut,
    flipped,
  };
  const SORTS = {
    worst: (a, b) => b.worst - a.worst,
    mean: (a, b) => (b.mean ?? -1e9) - (a.mean ?? -1e9),
    long: (a, b) => b.p.length - a.p.length,
    order: (a, b) => a.i - b.i,
  };
  const shade = (one) => {
    const size = EDGES.filter((edge) => Math.abs(one) >= edge).length;
    return size ? (one > 0 ? "p" : "n") + size : "";
  };
  const nats = (one, digits = 4) => minus(one.toFixed(digits));
  const chance = (one) => {
    const share = 100 * Math.exp(one);
    return share >= 10 ? share.toFixed(1) + " %" : share >= 0.01 ? share.toPrecision(2) + " %" : "< 0.01 %";
  };
  const reading = (text) => (text === "" ? "(part of a character)" : text.replaceAll("\n", "\u21b5").replace(/^ +/, (gone) => "\u2423".repeat(gone.length)));

  const row = (...cells) => {
    const line = make("tr");
    cells.forEach((cell) => line.append(make("td", "", cell)));
    return line;
  };
  const describe = (item, at) => {
    tip.replaceChildren(make("div", "what", reading(piece(item.p[at]))));
    const s = value(item, "s", at), t = value(item, "t", at), d = value(item, "d", at), difference = gap(item, at);
    const table = make("table");
    if (s !== null) table.append(row("student", nats(s), chance(s)));
    if (t !== null) table.append(row("teacher", nats(t), chance(t)));
    if (difference !== null) table.append(row("student \u2212 teacher", (difference >= 0 ? "+" : "") + nats(difference), "nats"));
    if (d !== null) table.append(row("KL at this place", nats(d), "nats"));
    tip.append(table);
    if (item.t && t === null) tip.append(make("div", "cap", "not scorable: the teacher has no such token"));
    if (!item.t) tip.append(make("div", "cap", "no teacher scored this text"));
    const others = item.alt ? item.alt[at] : [];
    if (others.length) {
      tip.append(make("div", "cap", "the teacher would say"));
      const ranked = make("table");
      for (let k = 0; k < others.length; k += 2) {
        const line = row(reading(piece(others[k])), nats(others[k + 1] / UNITS), chance(others[k + 1] / UNITS));
        if (t !== null && Math.abs(others[k + 1] / UNITS - t) < 1e-3 && piece(others[k]).trim() === piece(item.p[at]).trim()) line.className = "own";
        ranked.append(line);
      }
      tip.append(ranked);
    }
  };
  const show = (token, item) => {
    describe(item, Number(token.dataset.at));
    tip.hidden = false;
    const box = token.getClientRects()[0];
    if (!box) return;
    const wide = document.documentElement.clientWidth;
    const left = Math.max(12, Math.min(box.left, wide - tip.offsetWidth - 12));
    const fitsBelow = box.bottom + tip.offsetHeight + 10 < innerHeight;
    const top = fitsBelow || box.top < tip.offsetHeight + 10 ? box.bottom + 7 : box.top - tip.offsetHeight - 7;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
    token.setAttribute("aria-describedby", "tip");
  };
  const hide = () => { tip.hidden = true; };
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const tokens = (item) => {
    const box = make("div", "tokens");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "tokens; arrow keys move between them");
    let worst = 0;
    item.p.forEach((place, at) => {
      const one = gap(item, at);
      const token = make("span", "tok");
      if (kind(place) !== "text") token.classList.add(kind(place));
      if (item.t && one === null) token.classList.add("none");
      if (one !== null && shade(one)) token.classList.add(shade(one));
      const text = piece(place);
      if (kind(place) === "part") token.textContent = "\u00b7";
      else
        text.split("\n").forEach((line, number) => {
          if (number) { token.append(make("span", "nl", "\u21b5")); token.append("\n"); }
          token.append(line);
        });
      token.tabIndex = -1;
      token.dataset.at = at;
      if (one !== null && Math.abs(one) > Math.abs(gap(item, worst) ?? 0)) worst = at;
      box.append(token);
    });
    if (box.children.length) box.children[worst].tabIndex = 0;
    if (item.more) box.append(make("span", "tok special", ` \u2026 ${item.more} more tokens`));
    const own = (event) => event.target.closest(".tok[data-at]");
    box.addEventListener("focusin", (event) => { if (own(event)) show(own(event), item); });
    box.addEventListener("focusout", hide);
    box.addEventListener("pointerover", (event) => { if (own(event)) show(own(event), item); });
    box.addEventListener("pointerleave", hide);
    box.addEventListener("keydown", (event) => {
      const at = Number(document.activeElement.dataset.at);
      const count = item.p.length;
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: count - 1 }[event.key];
      if (to === undefined || to < 0 || to >= count) return;
      event.preventDefault();
      document.activeElement.tabIndex = -1;
      box.children[to].tabIndex = 0;
      box.children[to].focus();
    });
    return box;
  };
  const graded = (right) => (right === null ? "" : make("span", right ? "right" : "wrong", right ? "right" : "wrong"));

  const card = (set, item) => {
    const box = make("article");
    const head = make("div", "head");
    head.append(make("b", "", item.id + (item.n ? ` #${item.n}` : "")), graded(item.ok));
    if (item.src !== "student") head.append(make("span", "", item.src === "teacher" ? "written by the teacher" : "reference text"));
    if (item.cut) head.append(make("span", "", "cut at the length limit"));
    if (item.ok !== null) head.append(make("span", "", `expected ${item.e || "?"}, ${item.a === null ? "no answer found" : "found " + item.a}`));
    if (item.mean !== null) head.append(make("span", "", `mean ${nats(item.mean, 3)}, largest ${nats(item.worst, 2)} nats`));
    if (item.by && data.sets.some((one) => one.items.some((other) => other.by && other.by !== item.by))) head.append(make("span", "", `teacher ${item.by}`));
    box.append(head, make("p", "q", item.q));
    if (set.scored) box.append(tokens(item));
    if ("was" in item) {
      const pair = make("div", "pair");
      for (const [title, right, text] of [["at first", item.was, item.before], ["now", item.is, item.after]]) {
        const side = make("div");
        const label = make("h4", "", item.is === null ? "answer " + title : "graded " + title + ": ");
        label.append(graded(right));
        side.append(label, make("p", "plain", text));
        pair.append(side);
      }
      if (set.scored) {
        const fold = make("details");
        fold.append(make("summary", "", flipped(item) ? "The graded answer flipped" : item.is === null ? "The answers at first and now" : "The graded answers"), pair);
        box.append(fold);
      } else box.append(pair);
    } else if (!set.scored) box.append(make("p", "plain", item.p.map(piece).join("")));
    return box;
  };

  const picked = () => {
    const set = data.sets[state.set];
    const wanted = state.search.toLowerCase();
    return set.items.filter((item) => FILTERS[state.filter](item) && item.words.includes(wanted)).sort(SORTS[state.sort]);
  };
  const draw = () => {
    const set = data.sets[state.set];
    if (!set.flips && state.filter === "flipped") state.filter = "all";
    const found = picked();
    hide();
    list.replaceChildren(...found.slice(0, state.shown).map((item) => card(set, item)));
    more.hidden = found.length <= state.shown;
    more.textContent = `Show ${Math.min(BATCH, found.length - state.shown)} more`;
    const left = set.total > set.items.length ? ` (the page holds ${set.items.length} of ${set.total}: of ${set.graded ? "wrong, right, truncated and flipped ones" : "truncated ones and others"} in turn those with the largest disagreement)` : "";
    document.getElementById("count").textContent = `${Math.min(found.length, state.shown)} of ${found.length} shown${left}`;
    document.getElementById("set-note").textContent = set.note;
    document.querySelectorAll("#sets button").forEach((one, at) => one.setAttribute("aria-pressed", String(at === state.set)));
    document.querySelectorAll("#filters button").forEach((one) => {
      const name = one.dataset.filter;
      one.setAttribute("aria-pressed", String(name === state.filter));
      one.disabled = name === "flipped" && !set.flips;
      one.querySelector(".number").textContent = one.disabled ? "" : set.items.filter(FILTERS[name]).length;
    });
  };
  data.sets.forEach((set, at) => {
    const one = make("button", "", set.title);
    one.type = "button";
    one.addEventListener("click", () => { state.set = at; state.shown = BATCH; draw(); });
    document.getElementById("sets").append(one);
  });
  document.querySelectorAll("#filters button").forEach((one) =>
    one.addEventListener("click", () => { state.filter = one.dataset.filter; state.shown = BATCH; draw(); }));
  document.getElementById("sort").addEventListener("change", (event) => { state.sort = event.target.value; draw(); });
  document.getElementById("search").addEventListener("input", (event) => { state.search = event.target.value; state.shown = BATCH; draw(); });
  more.addEventListener("click", () => {
    const before = state.shown;
    state.shown += BATCH;
    draw();
    const next = list.children[before];
    if (next) { next.tabIndex = -1; next.focus({ preventScroll: true }); }
  });
  document.getElementById("viewer").hidden = false;
  draw();
})();
