"use strict";
const $ = id => document.getElementById(id);
const el = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined) e.textContent = text; return e; };
const number = v => v.toLocaleString("en", {maximumFractionDigits: v < 100 ? 1 : 0});
const bytes = v => { for (const u of ["B", "kB", "MB", "GB", "TB"]) { if (v < 1000 || u === "TB") return (u === "B" ? v : v.toFixed(1)) + " " + u; v /= 1000; } };
const list = (id, rows) => $(id).replaceChildren(...rows.map(([name, value, more]) => { const d = el("div"), v = el("dd", "", value); if (more) v.append(" ", el("small", "", more)); d.append(el("dt", "", name), v); return d; }));
let key = "", timer = 0;

function state(text, cls) { $("state").textContent = text; $("state").className = "state " + cls; }

async function poll() {
  clearTimeout(timer);
  try {
    const answer = await fetch("stats", {headers: key ? {Authorization: "Bearer " + key} : {}, cache: "no-store"});
    $("key-card").hidden = answer.status !== 401;
    if (answer.status === 401) { state("needs a key", "bad"); document.documentElement.dataset.ready = "yes"; return; }
    if (!answer.ok) throw new Error(answer.status);
    draw(await answer.json()); state("live", "ok");
  } catch (error) { state("no answer from the server", "bad"); }
  timer = setTimeout(poll, document.hidden ? 5000 : 1000);
}
$("key-form").onsubmit = event => { event.preventDefault(); key = $("key").value; poll(); };
document.onvisibilitychange = () => { if (!document.hidden && $("key-card").hidden) poll(); };
