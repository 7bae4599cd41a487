"use strict";
// Whatever a model wrote enters the page through textContent alone.
const at = (selector) => document.querySelector(selector);
const token = new URLSearchParams(location.hash.slice(1)).get("token") || "";
const raterKey = "minisft-arena-rater";
let rater = localStorage.getItem(raterKey);
if (!rater) {
  rater = "r" + [...crypto.getRandomValues(new Uint8Array(6))].map((b) => b.toString(16).padStart(2, "0")).join("");
  localStorage.setItem(raterKey, rater);
}
let current = null, mode = "vote", ready = false;

async function call(path, values) {
  const response = await fetch(path, {
    method: "POST", body: JSON.stringify(values),
    headers: { "content-type": "application/json", ...(token ? { "x-arena-token": token } : {}) },
  });
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}
const ask = async (path, values) => (await call(path, values)).json();

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fail(error) {
  at("#error").textContent = error.message;
  at("#error").hidden = false;
}

function turn(message) {
  const made = element("div", undefined, "turn");
  made.append(element("span", message.role, "role"), document.createTextNode(message.content));
  return made;
}

// A list of the turns that both conversations share; what differs stands in the columns.
function show(showing) {
  current = { ...showing, thumbs: [null, null], edited: [null, null] };
  ready = false;
  at("#error").hidden = true;
  const [left, right] = showing.talks;
  const shared = left.filter((m, i) => right[i] && right[i].content === m.content && right[i].role === m.role);
  const asked = showing.kind === "chat" ? left.slice(-1) : shared;
  at("#prompt").replaceChildren(...asked.map(turn));
  for (const side of [0, 1]) column(side);
  at("#pair").hidden = at("#choices").hidden = at("#comment-label").hidden = false;
  at("#comment").value = "";
  lock(true);
  const shown = current;  // whoever switches to the chat meanwhile must not be let vote there by the answers of before
  Promise.all([0, 1].map(fill)).then(() => { if (current === shown) { ready = true; lock(false); } }, fail);
}

function column(side) {
  const box = document.querySelector(`[data-side="${side}"]`);
  const answer = box.querySelector(".answer"), tools = box.querySelector(".tools");
  answer.replaceChildren();
  if (current.kind === "chat")
    answer.append(...current.talks[side].slice(0, -1).map(turn));
  current[side] = answer.appendChild(element("span"));
  const editor = element("textarea");
  editor.hidden = true;
  editor.rows = 6;
  editor.setAttribute("aria-label", "Better answer");
  editor.addEventListener("input", () => { current.edited[side] = editor.value; });
  const edit = element("button", "Edit");
  edit.addEventListener("click", () => {
    editor.hidden = !editor.hidden;
    if (!editor.hidden && !editor.value) editor.value = current[side].textContent;
    if (!editor.hidden) editor.focus();
  });
  tools.replaceChildren(...["up", "down"].map((name) => thumb(side, name)), edit, editor);
}

function thumb(side, name) {
  const button = element("button", name === "up" ? "Good" : "Bad");
  button.setAttribute("aria-label", `thumb ${name}`);
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const on = current.thumbs[side] !== name;
    current.thumbs[side] = on ? name : null;
    for (const other of button.parentNode.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(on));
  });
  return button;
}

async function fill(side) {
  const showing = current, target = showing[side];
  if (showing.answers[side] !== null) { target.textContent = showing.answers[side]; return; }
  const response = await call("/api/answer", { ticket: showing.ticket, index: side });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) target.append(part.value);
}

function lock(locked) {
  for (const button of document.querySelectorAll("#choices button")) button.disabled = locked;
}

async function vote(choice) {
  if (!ready) return;
  ready = false;
  lock(true);
  const edited = current.edited.map((text, side) => (text === current[side].textContent ? null : text));
  const values = { ticket: current.ticket, choice, thumbs: current.thumbs, edited, comment: at("#comment").value };
  try {
    await ask("/api/vote", values);
    if (mode === "vote") await next(); else at("#progress").textContent = "Saved. Write on, or go back to voting.";
  } catch (error) {
    ready = true;
    lock(false);
    fail(error);
  }
}

function empty(message) {
  current = null;
  ready = false;
  at("#prompt").replaceChildren();
  at("#pair").hidden = at("#choices").hidden = at("#comment-label").hidden = true;
  at("#progress").textContent = message;
}

async function next() {
  try {
    const showing = await ask("/api/next", { rater });
    const { judged, prompts } = showing.progress;
    at("#to-chat").hidden = !showing.chat;
    if (showing.done) return empty(`Thank you: you have judged all ${prompts} prompts.`);
    at("#progress").textContent = `${judged} of ${prompts} judged`;
    show(showing);
  } catch (error) { fail(error); }
}

function switchTo(name) {
  mode = name;
  at("#to-vote").setAttribute("aria-pressed", String(name === "vote"));
  at("#to-chat").setAttribute("aria-pressed", String(name === "chat"));
  at("#ask").hidden = name !== "chat";
  if (name === "vote") next(); else { empty("Both models answer you; then say which did better."); at("#text").focus(); }
}

async function send(event) {
  event.preventDefault();
  const text = at("#text").value;
  if (!text.trim()) return;
  try {
    show(await ask("/api/chat", { rater, text, ticket: current ? current.ticket : "" }));
    at("#text").value = "";
  } catch (error) { fail(error); }
}

async function results() {
  if (!at("#results").open) return;
  const found = await ask("/api/results", {});
  const range = (i) => (i ? `${(100 * i.estimate).toFixed(1)} % (${(100 * i.low).toFixed(1)} to ${(100 * i.high).toFixed(1)})` : "no votes");
  const flips = found.flip_rate === null || found.flip_rate === undefined ? "no pair in both orders" : `${(100 * found.flip_rate).toFixed(0)} %`;
  const lines = [["votes", found.votes], ["win rate of B, valid at any time", range(found.always_valid)], ["flip rate", flips],
    ["A", found.models.a], ["B", found.models.b]];
  at("#results dl").replaceChildren(...lines.flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]));
}

document.addEventListener("keydown", (event) => {
  if (event.target.closest("textarea, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { 1: "left", 2: "tie", 3: "both_bad", 4: "right", ArrowLeft: "left", ArrowRight: "right" }[event.key];
  if (choice && current) { event.preventDefault(); vote(choice); }
});
for (const button of document.querySelectorAll("#choices button")) button.addEventListener("click", () => vote(button.dataset.choice));
at("#to-vote").addEventListener("click", () => switchTo("vote"));
at("#to-chat").addEventListener("click", () => switchTo("chat"));
at("#ask").addEventListener("submit", send);
at("#results").addEventListener("toggle", results);
next();
